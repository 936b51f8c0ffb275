"""Sharpness-aware gradients against a few lines written by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from fmeta import gradients, optim, sharpness, tuning
from fmeta.errors import UsageError
from fmeta.learner import finetune
from fmeta.types import Aux

KEY = jax.random.key(4)
LOSS, PARAMS, BATCH, _ = toys.problem()
SCALES = {
  'sam': (sharpness.sharpness_aware(0.3), lambda t: np.ones_like(t)),
  'asam': (
    sharpness.adaptive_sharpness_aware(0.3, 0.1),
    lambda t: np.abs(t) + 0.1,
  ),
}


def quadratic(trainable, frozen, model_state, batch, rng):
  """(t - c)' A (t - c) / 2: its gradient is known everywhere."""
  away = trainable['t'] - batch['c']
  value = 0.5 * away @ frozen['A'] @ away
  return value, Aux({'seen': value}, {'value': value}, jnp.ones(()))


A = np.diag([4.0, 1.0]) + 0.5
T, C = np.asarray([1.0, -2.0]), np.asarray([0.5, 1.0])


@pytest.mark.parametrize('name', SCALES)
def test_it_is_the_gradient_at_the_worst_point_of_the_ball(name, x64):
  wrapper, scale = SCALES[name]
  (value, aux), grads = wrapper(quadratic)(
    {'t': jnp.asarray(T)}, {'A': jnp.asarray(A)}, {}, {'c': C}, KEY
  )
  gradient = A @ (T - C)
  scaled = scale(T) * gradient
  worst = T + 0.3 * scale(T) * scaled / np.linalg.norm(scaled)
  np.testing.assert_allclose(grads['t'], A @ (worst - C), rtol=1e-12)
  # Value and state are those of the weights themselves.
  expected = 0.5 * (T - C) @ A @ (T - C)
  np.testing.assert_allclose(value, expected, rtol=1e-12)
  assert aux.model_state['seen'] == aux.metrics['value'] == value


def test_no_direction_of_that_length_is_steeper_to_first_order(x64):
  _, scale = SCALES['asam']
  gradient = A @ (T - C)
  scaled = scale(T) * gradient
  e = 0.3 * scale(T) * scaled / np.linalg.norm(scaled)
  angles = np.linspace(0, 2 * np.pi, 1001)
  ball = 0.3 * np.stack([np.cos(angles), np.sin(angles)], 1) * scale(T)
  assert gradient @ e >= (ball @ gradient).max() - 1e-12


ROWS = {
  'x': jnp.asarray([[1.0, 2.0], [0.5, -1.0], [3.0, 0.0], [1.0, 1.0]]),
  'weight': jnp.asarray([1.0, 2.0, 0.0, 0.5]),
}


def _gradient(value_and_grad, rows=ROWS):
  """Of a weighted mean of tanh(t x)^2."""

  def fun(trainable, frozen, model_state, batch, rng):
    total = batch['weight'].sum()
    values = jnp.tanh(batch['x'] @ trainable['t']) ** 2
    mean = jnp.sum(batch['weight'] * values) / total
    return mean, Aux({}, {}, total)

  run = jax.jit(lambda t: value_and_grad(fun)(t, {}, {}, rows, KEY)[1])
  return run({'t': jnp.asarray([0.3, -0.2])})['t']


def test_the_whole_batch_is_perturbed_once_around_an_accumulation():
  around = sharpness.sharpness_aware(0.5, gradients.accumulate(2))
  np.testing.assert_allclose(
    _gradient(around), _gradient(sharpness.sharpness_aware(0.5)), rtol=1e-5
  )


def test_each_microbatch_is_perturbed_within_an_accumulation():
  sam = sharpness.sharpness_aware(0.5)
  first, second = (
    _gradient(sam, {key: x[part] for key, x in ROWS.items()})
    for part in (slice(0, 2), slice(2, 4))
  )
  found = _gradient(gradients.accumulate(2, sam))
  np.testing.assert_allclose(found, (3 * first + 0.5 * second) / 3.5, rtol=1e-5)
  assert np.abs(found - _gradient(sam)).max() > 1e-3


def test_a_radius_of_zero_is_the_plain_gradient():
  np.testing.assert_allclose(
    _gradient(sharpness.sharpness_aware(0.0)),
    _gradient(gradients.plain),
    rtol=1e-6,
  )


def _near(found, expected):
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6),
    found,
    expected,
  )


def test_both_gradients_see_the_same_dropout():
  keys = []

  def fun(trainable, frozen, model_state, batch, rng):
    keys.append(np.asarray(jax.random.key_data(rng)))
    return trainable['t'].sum(), Aux({}, {}, jnp.ones(()))

  sharpness.sharpness_aware()(fun)({'t': jnp.ones(2)}, {}, {}, {}, KEY)
  assert len(keys) == 2 and (keys[0] == keys[1]).all()


def test_a_zero_gradient_has_a_finite_second_derivative():
  wrapper = sharpness.sharpness_aware(0.1)

  def of(c):
    grads = wrapper(quadratic)(
      {'t': jnp.ones(2)}, {'A': jnp.eye(2)}, {}, {'c': c}, KEY
    )[1]
    return grads['t'].sum()

  value, slope = jax.jit(jax.value_and_grad(of))(jnp.ones(2))
  assert value == 0 and np.isfinite(slope).all()


def test_only_trainable_leaves_are_perturbed_and_first_order_composes():
  learner = finetune(
    LOSS,
    optim.sgd(1.0),
    tuning=tuning.select('head/.*'),
    value_and_grad=gradients.first_order(sharpness.sharpness_aware(0.5)),
  )
  state = learner.init(PARAMS, KEY)
  after, _ = jax.jit(learner.step)(state, BATCH, KEY)

  def head_loss(head):
    return LOSS({**PARAMS, 'head': head}, {}, BATCH, None)[0]

  @jax.jit
  def by_hand(head):
    g = jax.grad(head_loss)(head)
    norm = jnp.sqrt(sum(jnp.sum(x**2) for x in jax.tree.leaves(g)))
    worst = jax.tree.map(lambda p, x: p + 0.5 * x / norm, head, g)
    step = jax.grad(head_loss)(worst)
    return jax.tree.map(lambda p, x: p - x, head, step)

  _near(after.trainable['head'], by_hand(PARAMS['head']))


def test_a_negative_radius_is_refused():
  for make in (
    sharpness.sharpness_aware,
    sharpness.adaptive_sharpness_aware,
  ):
    with pytest.raises(UsageError, match='rho=-1; give at least 0'):
      make(-1)
