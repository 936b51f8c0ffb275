"""Classes that a row may not answer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from fmeta import UsageError, continual, losses

PARAMS = toys.problem()[1]
FORWARD = toys.problem()[3]
ALLOWED = np.array([[True, True, False], [True, False, True]])
BATCH = {
  'x': np.linspace(-1, 1, 12, dtype=np.float32).reshape(2, 6),
  'label': np.array([1, 2]),
  'allowed': ALLOWED,
}


def test_the_loss_is_that_of_the_allowed_logits_alone():
  logits = np.array([[1.0, 2.0, 9.0], [0.5, 7.0, -1.0]], np.float32)
  found, _ = continual.masked(losses.softmax_cross_entropy)(logits, BATCH)
  by_hand = [
    np.log(np.exp(1.0) + np.exp(2.0)) - 2.0,
    np.log(np.exp(0.5) + np.exp(-1.0)) + 1.0,
  ]
  np.testing.assert_allclose(found, by_hand, rtol=1e-6)


def test_forbidden_classes_get_exactly_zero_gradient():
  loss = losses.supervised(
    FORWARD, continual.masked(losses.softmax_cross_entropy)
  )
  rows = {**BATCH, 'allowed': np.tile(ALLOWED[:1], (2, 1))}
  rows['label'] = np.array([0, 1])
  grads = jax.grad(lambda p: loss(p, {}, rows, None)[0])(PARAMS)
  assert not np.any(grads['head']['kernel'][:, 2])
  assert not np.any(grads['head']['bias'][2])
  assert np.all(grads['head']['bias'][:2])


def test_the_recorded_outputs_are_the_models_own():
  loss = losses.supervised(
    FORWARD, continual.masked(losses.softmax_cross_entropy)
  )
  _, aux = loss(PARAMS, {}, BATCH, None)
  own, _ = FORWARD(PARAMS, {}, BATCH, None)
  np.testing.assert_array_equal(aux.outputs, own)


@pytest.mark.parametrize('dtype', [jnp.float16, jnp.bfloat16, jnp.float32])
def test_no_answer_is_forbidden_and_none_is_nan(dtype):
  def loud(params, model_state, batch, rng):
    return jnp.full((2, 3), 60000, dtype).at[:, 0].set(-60000), model_state

  logits, _ = continual.masked_forward(loud)({}, {}, BATCH, None)
  probabilities = jax.nn.softmax(logits.astype(jnp.float32))
  assert not np.any(probabilities[~ALLOWED])
  assert np.all(np.isfinite(probabilities))


@pytest.mark.parametrize('given', [None, ALLOWED[:, :2]])
def test_a_mask_of_another_shape_is_refused(given):
  rows = {k: v for k, v in BATCH.items() if k != 'allowed'}
  rows = rows if given is None else {**rows, 'allowed': given}
  with pytest.raises(UsageError, match=r"'allowed' has shape .*give bool"):
    continual.masked_forward(FORWARD)(PARAMS, {}, rows, None)
