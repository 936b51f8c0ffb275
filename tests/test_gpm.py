"""Gradient projection memory: past inputs of a layer keep their outputs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
from flax import linen as nn

from fmeta import UsageError, adapters, continual, losses, optim, tuning
from fmeta.learner import finetune

KEY = jax.random.key(5)
LOSS, PARAMS, BATCH, FORWARD = toys.problem(dropout=0.2)
FIRST = 'body/layer_0/kernel'


class Deep(nn.Module):
  """Two dense layers without an activation."""

  @nn.compact
  def __call__(self, x, train=False):
    return nn.Dense(3, name='head')(nn.Dense(5, name='body')(x))


def linear():
  module = Deep()
  forward = toys.forward_of(module)
  return forward, toys.init_of(module, features=6)[0]


def low_rank(rank, rows=9, seed=0, features=6):
  random = np.random.default_rng(seed)
  x = random.normal(size=(rows, rank)) @ random.normal(size=(rank, features))
  return {
    'x': jnp.asarray(x),
    'label': jnp.asarray(random.integers(0, 3, rows)),
  }


def columns(basis):
  """The filled columns, which must come first."""
  basis = np.asarray(basis, float)
  held = np.any(basis != 0, axis=0)
  assert np.all(held[: held.sum()])
  return basis[:, held]


def consolidated(hold, state, params, batches, forward):
  return hold.consolidate(state, params, params, {}, forward, batches, KEY)


@pytest.mark.parametrize('parts', [1, 9])
def test_outputs_of_a_linear_network_on_old_inputs_do_not_change(parts, x64):
  forward, params = linear()
  old, new = low_rank(2), low_rank(6, seed=1)
  params = toys.double(params)
  loss = losses.supervised(forward, losses.softmax_cross_entropy)
  learner = finetune(
    loss, optim.sgd(0.3), penalty=continual.gpm('.*/kernel', energy=1.0)
  )
  batches = [
    jax.tree.map(lambda x, k=k: x[k::parts], old) for k in range(parts)
  ]
  state = learner.init(params, KEY)
  step = jax.jit(learner.step)
  for _ in range(3):  # learns freely until the task ends
    state, _ = step(state, old, KEY)
  state = learner.end_task(state, forward, batches, KEY)
  before = state.trainable
  for _ in range(20):
    state, _ = step(state, new, KEY)
  answers = lambda p, batch: np.asarray(forward(p, {}, batch, None)[0])
  np.testing.assert_allclose(
    answers(state.trainable, old), answers(before, old), rtol=0, atol=1e-12
  )
  moved = answers(state.trainable, new) - answers(before, new)
  assert np.abs(moved).max() > 0.1


def test_the_energy_decides_how_many_directions_are_held():
  random = np.random.default_rng(0)
  directions, _ = np.linalg.qr(random.normal(size=(6, 6)))
  # Squares 16, 4, 1 of 21: their sums are .76, .95, 1.
  values = np.array([4.0, 2.0, 1.0])
  rows, _ = np.linalg.qr(random.normal(size=(8, 3)))
  x = jnp.asarray((rows * values) @ directions[:, :3].T, jnp.float32)
  batch = {'x': x, 'label': jnp.zeros(8, jnp.int32)}
  for energy, number in [(0.5, 1), (0.77, 2), (0.96, 3), (1.0, 3)]:
    hold = continual.gpm(FIRST, energy=jnp.asarray(energy))
    state = hold.init(PARAMS, PARAMS)
    state = consolidated(hold, state, PARAMS, [batch], FORWARD)
    found = columns(state['basis']['body']['layer_0']['kernel'])
    assert found.shape[1] == number
    expected = directions[:, :number]
    np.testing.assert_allclose(
      found @ found.T, expected @ expected.T, atol=1e-6
    )


def by_hand(basis, inputs, energy):
  """Equations 8 and 9, in float64."""
  columns = np.asarray(inputs, float).T
  held = basis @ basis.T @ columns
  left, singular, _ = np.linalg.svd(columns - held, full_matrices=False)
  number, total = 0, np.sum(columns**2)
  while np.sum(held**2) + np.sum(singular[:number] ** 2) < energy * total:
    number += 1
  return np.concatenate([basis, left[:, :number]], 1)


def test_the_bases_of_three_tasks_are_those_of_the_papers_equations():
  hold = continual.gpm(FIRST, energy=0.8)
  state, expected, sizes = hold.init(PARAMS, PARAMS), np.zeros((6, 0)), []
  for seed in range(3):
    batch = toys.batch_of(8, seed=seed)
    state = consolidated(hold, state, PARAMS, [batch], FORWARD)
    expected = by_hand(expected, batch['x'], 0.8)
    found = columns(state['basis']['body']['layer_0']['kernel'])
    np.testing.assert_allclose(
      found.T @ found, np.eye(found.shape[1]), atol=1e-6
    )
    np.testing.assert_allclose(
      found @ found.T, expected @ expected.T, atol=1e-5
    )
    sizes.append(found.shape[1])
  assert sizes[0] < sizes[2] <= 6


def test_a_direction_that_is_hardly_new_is_orthonormal_to_the_basis():
  hold = continual.gpm(FIRST, energy=1.0)
  old, new = low_rank(3), low_rank(3, seed=1)
  state = consolidated(hold, hold.init(PARAMS, PARAMS), PARAMS, [old], FORWARD)
  near = {**old, 'x': old['x'] + 1e-5 * new['x']}
  state = consolidated(hold, state, PARAMS, [near], FORWARD)
  found = columns(state['basis']['body']['layer_0']['kernel'])
  assert found.shape[1] > 3
  gram = found.T @ found
  np.testing.assert_allclose(gram, np.eye(len(gram)), rtol=0, atol=1e-6)


def test_a_full_basis_stays_as_it_is():
  hold = continual.gpm(FIRST, energy=1.0)
  state = hold.init(PARAMS, PARAMS)
  full = consolidated(hold, state, PARAMS, [BATCH], FORWARD)
  assert columns(full['basis']['body']['layer_0']['kernel']).shape == (6, 6)
  again = consolidated(hold, full, PARAMS, [toys.batch_of(9, seed=4)], FORWARD)
  jax.tree.map(np.testing.assert_array_equal, again, full)


def test_kernels_are_projected_biases_stop_and_others_move():
  hold = continual.gpm(FIRST, energy=1.0)
  start = hold.init(PARAMS, PARAMS)
  grads = jax.tree.map(jnp.ones_like, PARAMS)
  jax.tree.map(np.testing.assert_array_equal, hold.direct(grads, start), grads)
  old = low_rank(2)
  state = consolidated(hold, start, PARAMS, [old], FORWARD)
  found = jax.jit(hold.direct)(grads, state)
  layer = found['body'].pop('layer_0')
  basis = columns(state['basis']['body']['layer_0']['kernel'])
  np.testing.assert_allclose(
    layer['kernel'], (np.eye(6) - basis @ basis.T) @ np.ones((6, 5)), atol=1e-6
  )
  np.testing.assert_allclose(old['x'] @ layer['kernel'], 0, atol=1e-5)
  assert not np.any(layer['bias'])
  grads['body'].pop('layer_0')
  jax.tree.map(np.testing.assert_array_equal, found, grads)


def test_rows_of_no_weight_are_no_inputs():
  hold = continual.gpm('.*/kernel', energy=1.0)
  padded = {**BATCH, 'weight': jnp.asarray([1.0, 1, 0, 0, 0, 0, 0, 0])}
  state = hold.init(PARAMS, PARAMS)
  found = consolidated(hold, state, PARAMS, [padded], FORWARD)
  real = jax.tree.map(lambda x: x[:2], BATCH)
  expected = consolidated(hold, state, PARAMS, [real], FORWARD)
  for x, y in zip(
    jax.tree.leaves(found), jax.tree.leaves(expected), strict=True
  ):
    x, y = columns(x), columns(y)
    assert x.shape[1] == 2
    np.testing.assert_allclose(x @ x.T, y @ y.T, atol=1e-6)


def test_a_layer_that_runs_twice_on_sequences_holds_all_its_inputs():
  class Twice(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
      layer = nn.Dense(6, name='body', use_bias=False)
      return nn.Dense(3, name='head')(layer(layer(x)).mean(1))

  module = Twice()
  forward = toys.forward_of(module)
  x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 2, 6)), jnp.float32)
  params = module.init(KEY, x)['params']
  hold = continual.gpm('body/kernel', energy=1.0)
  state = hold.init(params, params)
  state = consolidated(hold, state, params, [{'x': x}], forward)
  kernel = np.asarray(params['body']['kernel'])
  inputs = np.concatenate([x[0], x[0] @ kernel])
  basis = columns(state['basis']['body']['kernel'])
  assert basis.shape[1] == np.linalg.matrix_rank(inputs) == 4
  np.testing.assert_allclose(
    inputs @ basis @ basis.T, inputs, rtol=0, atol=1e-5
  )


def test_a_layer_run_on_rows_of_sequences_holds_those_of_real_examples():
  class Rows(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
      hidden = nn.Dense(4, name='body')(x.reshape(-1, 6))
      return nn.Dense(3, name='head')(hidden.reshape(*x.shape[:2], 4).mean(1))

  module = Rows()
  x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 2, 6)), jnp.float32)
  params = module.init(KEY, x)['params']
  hold = continual.gpm('body/kernel', energy=1.0)
  batch = {'x': x, 'weight': jnp.asarray([1.0, 0.0, 1.0])}
  state = consolidated(
    hold, hold.init(params, params), params, [batch], toys.forward_of(module)
  )
  basis = columns(state['basis']['body']['kernel'])
  real = x[jnp.asarray([0, 2])].reshape(4, 6)
  assert basis.shape[1] == 4
  np.testing.assert_allclose(real @ basis @ basis.T, real, rtol=0, atol=1e-5)


def test_a_frozen_kernel_has_no_basis():
  some, _ = tuning.select('head/.*').init(PARAMS, KEY)
  state = continual.gpm('.*/kernel', energy=0.9).init(some, PARAMS)
  assert list(state['basis']) == ['head']


@pytest.mark.parametrize(
  'pattern, said',
  [
    ('bdoy/.*', "no parameter matches 'bdoy/"),
    ('head/bias', r"'head/bias' \[3\] is no kernel of nn.Dense"),
  ],
)
def test_what_is_no_dense_kernel_is_refused(pattern, said):
  with pytest.raises(UsageError, match=said):
    continual.gpm(pattern, energy=0.9).init(PARAMS, PARAMS)


def test_factors_and_layers_that_never_run_are_refused():
  hold = continual.gpm('.*/kernel', energy=0.9)
  lora = adapters.lora(FIRST, rank=2)
  with pytest.raises(UsageError, match="lora_a' moves 'body/layer_0/kernel'"):
    finetune(LOSS, optim.sgd(0.1), tuning=lora, penalty=hold).init(PARAMS, KEY)
  params = toys.three_kernels()
  with pytest.raises(UsageError, match='no nn.Dense ran with'):
    consolidated(
      hold, hold.init(params, params), params, [BATCH], toys.three_layers
    )
