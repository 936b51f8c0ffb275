"""Orthogonal gradient descent: past outputs stay where they are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from fmeta import UsageError, adapters, continual, optim, tuning
from fmeta.continual.ogd import true_logit
from fmeta.learner import finetune

KEY = jax.random.key(5)
LOSS, PARAMS, BATCH, FORWARD = toys.problem(dropout=0.2)
NEW = toys.batch_of(8, seed=1)


def logits_of(params, batch):
  outputs, _ = FORWARD(params, {}, batch, None)
  return jnp.take_along_axis(outputs, batch['label'][:, None], 1)[:, 0]


def remembered(hold, batches, params=PARAMS, trainable=None, key=KEY):
  trainable = params if trainable is None else trainable
  state = hold.init(trainable, params)
  return hold.consolidate(state, trainable, params, {}, FORWARD, batches, key)


def flat(leaves):
  return jnp.concatenate([x.ravel() for x in jax.tree.leaves(leaves)])


def test_the_basis_spans_the_gradients_of_the_true_logits(x64):
  params, batch = toys.double((PARAMS, BATCH))
  state = remembered(continual.ogd(20, 8), [batch], params)
  jacobian = jax.jacobian(lambda p: logits_of(p, batch))(params)
  rows = np.concatenate(
    [x.reshape(8, -1) for x in jax.tree.leaves(jacobian)], axis=1
  )
  assert state['count'] == np.linalg.matrix_rank(rows) == 8
  # The projector by QR.
  columns, _ = np.linalg.qr(rows.T)
  basis = np.asarray(state['basis'])
  np.testing.assert_allclose(basis.T @ basis, columns @ columns.T, atol=1e-12)


def test_the_projected_gradient_is_orthogonal_to_every_stored_one():
  hold = continual.ogd(20, 8)
  state = remembered(hold, [BATCH])
  grads = jax.grad(lambda p: LOSS(p, {}, NEW, KEY)[0])(PARAMS)
  left = jax.jit(hold.direct)(grads, state)
  assert jax.tree.map(jnp.shape, left) == jax.tree.map(jnp.shape, PARAMS)
  inner = state['basis'] @ flat(left)
  assert np.abs(inner).max() <= 1e-6 * np.linalg.norm(flat(grads))
  assert np.linalg.norm(flat(left)) > 0.1 * np.linalg.norm(flat(grads))
  # What is already orthogonal stays.
  again = hold.direct(left, state)
  np.testing.assert_allclose(flat(again), flat(left), atol=1e-7)


def test_stored_logits_change_in_second_order_only(x64):
  params, batch, new = toys.double((PARAMS, BATCH, NEW))
  learner = lambda rate, **options: finetune(LOSS, optim.sgd(rate), **options)
  old = logits_of(params, batch)

  def moved(rate, hold=None):
    inner = learner(rate, **({} if hold is None else {'penalty': hold}))
    state = inner.init(params, KEY)
    state = inner.end_task(state, FORWARD, [batch], KEY)
    state, _ = inner.step(state, new, KEY)
    return float(jnp.abs(logits_of(state.trainable, batch) - old).max())

  hold = continual.ogd(20, 8)
  assert moved(1e-3) > 1e-4
  # Halving the rate quarters the change: a slope of two.
  slope = np.log2(moved(2e-3, hold) / moved(1e-3, hold))
  assert slope == pytest.approx(2, abs=0.02)
  assert np.log2(moved(2e-3) / moved(1e-3)) == pytest.approx(1, abs=0.02)


def test_before_the_first_task_ends_the_gradient_is_bitwise_unchanged():
  hold = continual.ogd(4, 2)
  grads = {'a': jnp.asarray([-0.0, 1e-30, 3.0]), 'b': jnp.ones((2, 2))}
  grads['c'] = jnp.asarray([1.5, -0.0], jnp.bfloat16)
  found = jax.jit(hold.direct)(grads, hold.init(grads, grads))
  for x, y in zip(jax.tree.leaves(grads), jax.tree.leaves(found), strict=True):
    assert x.dtype == y.dtype
    assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def test_dependent_gradients_and_those_beyond_the_capacity_are_dropped():
  zero = {**BATCH, 'x': BATCH['x'].at[1].set(BATCH['x'][0])}
  zero['label'] = zero['label'].at[1].set(zero['label'][0])
  assert remembered(continual.ogd(20, 8), [zero])['count'] == 7
  full = remembered(continual.ogd(3, 8), [zero])
  assert full['count'] == 3 and full['basis'].shape[0] == 3
  dead = continual.ogd(3, 8, output=lambda outputs, row: 0.0 * outputs.sum())
  state = remembered(dead, [BATCH])
  assert state['count'] == 0 and not np.any(state['basis'])


def test_nearly_dependent_gradients_stay_orthonormal():
  near = BATCH['x'][:1] + 1e-3 * jnp.arange(8.0)[:, None] * BATCH['x'][1:2]
  batch = {'x': near, 'label': jnp.zeros(8, jnp.int32)}
  state = remembered(continual.ogd(8, 8), [batch])
  count = int(state['count'])
  assert 2 <= count < 8
  basis = np.asarray(state['basis'], float)[:count]
  np.testing.assert_allclose(basis @ basis.T, np.eye(count), atol=1e-6)


def test_rows_are_drawn_from_all_real_rows_without_replacement():
  hold = continual.ogd(8, 3, output=lambda outputs, row: outputs @ row['pick'])
  pick = np.eye(3, dtype=np.float32)[[0, 1, 2]]

  def forward(params, model_state, batch, rng):
    return params['w'][batch['row']][:, None] * jnp.ones((1, 3)), model_state

  rows = np.arange(12)
  batches = [
    {
      'row': rows[at],
      'pick': pick[rows[at] % 3],
      'weight': (rows[at] % 4 > 0).astype(np.float32),
    }
    for at in (slice(0, 8), slice(8, 12))
  ]
  params = {'w': jnp.ones(12)}
  state, counts = hold.init(params, params), np.zeros(12)
  for seed in range(40):
    found = hold.consolidate(
      state, params, params, {}, forward, batches, jax.random.key(seed)
    )
    assert found['count'] == 3
    counts += np.any(np.asarray(found['basis']) != 0, axis=0)
  every = continual.ogd(12, 12, lambda outputs, row: outputs @ row['pick'])
  found = every.consolidate(
    every.init(params, params), params, params, {}, forward, batches, KEY
  )
  assert found['count'] == 9
  # Nine real rows, three of them in each of 40 draws: 13 each in the mean.
  assert not np.any(counts[::4])
  assert np.all(counts[rows % 4 > 0] >= 4) and counts.max() <= 26


def test_only_what_moves_is_held():
  some = tuning.select('head/.*')
  trainable, _ = some.init(PARAMS, KEY)
  state = remembered(continual.ogd(4, 4), [BATCH], trainable=trainable)
  assert state['basis'].shape == (4, flat(trainable).size)
  assert state['count'] == 4


def test_factors_are_refused():
  lora = adapters.lora('body/.*/kernel', rank=2)
  learner = finetune(
    LOSS, optim.sgd(0.1), tuning=lora, penalty=continual.ogd(4, 4)
  )
  with pytest.raises(UsageError, match="lora_a' is no parameter of the model"):
    learner.end_task(learner.init(PARAMS, KEY), FORWARD, [BATCH], KEY)


def test_sizes_and_labels_are_checked():
  with pytest.raises(UsageError, match='capacity 0 and 3 rows'):
    continual.ogd(0, 3)
  with pytest.raises(UsageError, match=r"batch has \['x'\]: give output="):
    true_logit(jnp.ones(3), {'x': 1})
