"""Feature distillation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import streamed
import toys

from fmeta import UsageError, penalty

PARAMS = toys.three_kernels()
BATCH = toys.batch_of(5, weight=[1, 2, 1, 0, 1])


def _features(params, model_state, batch, rng):
  assert rng is None  # evaluation mode
  hidden = jnp.tanh(batch['x'] @ params['body']['layer_0']['kernel'])
  return hidden.reshape(-1, 5, 1), model_state


def _taught(made):
  teacher = jax.tree.map(lambda x: x + 0.2, PARAMS)
  state = made.init(PARAMS, PARAMS)
  after = made.consolidate(
    state, teacher, teacher, {}, _features, [], streamed.KEY
  )
  return state, after, teacher


def test_value_is_half_the_squared_distance_and_zero_at_the_teacher():
  made = penalty.feature_distillation(_features, 3.0)
  start, state, teacher = _taught(made)
  student = jax.tree.map(lambda x: 1.3 * x, PARAMS)
  slope = jax.value_and_grad(
    lambda p, state: made.value(p, p, state, BATCH, None)
  )
  then, now = (
    np.asarray(_features(p, {}, BATCH, None)[0])[..., 0]
    for p in (teacher, student)
  )
  rows = 0.5 * ((now - then) ** 2).sum(-1)
  by_hand = 3.0 * np.average(rows, weights=BATCH['weight'])
  value, grads = slope(student, state)
  np.testing.assert_allclose(value, by_hand, rtol=1e-6)
  assert value > 0.01 and np.any(grads['body']['layer_0']['kernel'])
  assert not np.any(grads['head']['kernel'])
  for nothing in (slope(teacher, state), slope(student, start)):
    assert not any(np.any(x) for x in jax.tree.leaves(nothing))


def test_the_mean_over_rows_needs_no_weights():
  made = penalty.feature_distillation(_features, 1.0)
  _, state, _ = _taught(made)
  plain = {'x': BATCH['x']}
  even = {**plain, 'weight': jnp.full(5, 2.0)}
  values = [made.value(PARAMS, PARAMS, state, b, None) for b in (plain, even)]
  np.testing.assert_allclose(*values, rtol=1e-6)
  empty = {**plain, 'weight': jnp.zeros(5)}
  assert made.value(PARAMS, PARAMS, state, empty, None) == 0


def test_features_without_a_feature_axis_are_refused():
  made = penalty.feature_distillation(
    lambda params, state, batch, rng: (batch['x'][:, 0], state), 1.0
  )
  _, state, _ = _taught(made)
  with pytest.raises(UsageError, match=r'give \[B, \.\.\.\]'):
    made.value(PARAMS, PARAMS, state, BATCH, None)
