"""What GEM, A-GEM and OGD must do exactly: KKT conditions, no NaN."""

import cones
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from fmeta import continual, optim
from fmeta.continual.gem import project, project_on_one
from fmeta.learner import finetune
from fmeta.memory import beside


@pytest.mark.parametrize('kind', cones.KINDS)
def test_the_dual_of_gem_meets_its_kkt_conditions_on_125_programs(kind, x64):
  # Eight kinds: one thousand programs of 2 to 20 tasks.
  rows, present, vectors = cones.draw(kind, 125)
  gram = rows @ rows.transpose(0, 2, 1)
  products = np.einsum('btp,bp->bt', rows, vectors)
  solve = jax.jit(jax.vmap(continual.nonnegative_qp))
  dual = np.asarray(solve(gram, products, present))
  assert np.all(dual >= 0) and not np.any(dual[~present])
  moved = vectors + np.einsum('bt,btp->bp', dual, rows)
  # <g~, g_k> / (|g| |g_k|): nonnegative, and zero where the dual is not.
  sizes = cones.lengths(rows) * cones.lengths(vectors)[:, None]
  slopes = np.einsum('btp,bp->bt', rows, moved) / sizes
  assert slopes.min() >= -1e-9
  assert np.abs(slopes[dual > 0]).max() <= 1e-9
  expected = [
    cones.nearest(cone, vector)
    for cone, vector in zip(rows, vectors, strict=True)
  ]
  # Rows that all but oppose each other to 1e-4 make a matrix of condition
  # 1e8, known to 1e-16: the projection itself moves by up to 1e-8 over 1e-4.
  atol = 1e-5 if kind == 'near opposites' else 1e-9
  np.testing.assert_allclose(moved, expected, rtol=0, atol=atol)


@pytest.mark.parametrize('opposed', [True, False])
def test_a_gem_is_gem_of_one_memory(opposed):
  loss, params, batch, _ = toys.problem(dropout=0.2)
  past = {'x': batch['x'], 'label': (batch['label'] + opposed) % 3}
  rows = {key: x[None] for key, x in past.items()}
  step = lambda taken: finetune(loss, optim.sgd(0.1), value_and_grad=taken)
  one, several = step(continual.a_gem()), step(continual.gem(margin=0.0))
  start = one.init(params, jax.random.key(0))
  key = jax.random.key(1)
  found, _ = jax.jit(one.step)(start, beside(batch, past, jnp.ones(8)), key)
  expected, _ = jax.jit(several.step)(
    start, beside(batch, rows, jnp.ones((1, 8))), key
  )
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7),
    found.trainable,
    expected.trainable,
  )
  alone, _ = jax.jit(finetune(loss, optim.sgd(0.1)).step)(start, batch, key)
  same = jax.tree.map(np.array_equal, found.trainable, alone.trainable)
  assert all(jax.tree.leaves(same)) != opposed


def test_a_reference_of_zero_changes_nothing():
  grads = {'a': jnp.asarray([1.0, -2.0]), 'b': jnp.asarray(3.0)}
  zero = jax.tree.map(jnp.zeros_like, grads)
  several = jax.tree.map(lambda x: jnp.stack([x, x]), zero)
  for found in (
    jax.jit(project_on_one)(grads, zero),
    jax.jit(project)(grads, several, jnp.asarray([True, False]), 0.5),
    # Its derivative has no NaN, either.
    jax.grad(
      lambda g: sum(
        jnp.vdot(x, y)
        for x, y in zip(
          jax.tree.leaves(project_on_one(g, zero)),
          jax.tree.leaves(grads),
          strict=True,
        )
      )
    )(grads),
  ):
    jax.tree.map(np.testing.assert_array_equal, found, grads)


def test_the_basis_of_ogd_is_orthonormal_and_full_rank_rows_alone_enter():
  _, params, batch, forward = toys.problem()
  twice = jax.tree.map(lambda x: jnp.concatenate([x, x[:3]]), batch)
  hold = continual.ogd(capacity=20, rows_per_task=11)
  state = hold.init(params, params)
  for seed in range(2):
    key = jax.random.key(seed)
    state = hold.consolidate(state, params, params, {}, forward, [twice], key)
  # Eight different examples, whatever how often they come.
  count = int(state['count'])
  assert count == 8
  gram = np.asarray(state['basis'], float) @ np.asarray(state['basis']).T
  expected = np.diag(np.arange(20) < count).astype(float)
  np.testing.assert_allclose(gram, expected, atol=1e-6)
