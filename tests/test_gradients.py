import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from fmeta import gradients, losses, optim
from fmeta.errors import UsageError
from fmeta.learner import finetune
from fmeta.types import Aux

KEY = jax.random.key(5)


def _scalar_problem(weights):
  """One weight p, gradient of row i is x_i: means are easy to see."""

  def forward(params, model_state, batch, rng):
    return params['p'] * batch['x'], model_state

  def criterion(outputs, batch):
    return outputs, {'x': batch['x']}

  batch = {
    'x': jnp.asarray([16.0, 18.0, 4.0, 1.0]),
    'weight': jnp.asarray(weights, jnp.float32),
  }
  return losses.supervised(forward, criterion), batch


def _step(loss_fn, batch, value_and_grad):
  learner = finetune(loss_fn, optim.sgd(1.0), value_and_grad=value_and_grad)
  state = learner.init({'p': jnp.asarray(0.0)}, KEY)
  return jax.jit(learner.step)(state, batch, KEY)


def test_unequal_microbatches_move_as_the_whole_batch_does():
  # One unit of 16, then 1 x 4 + 4 x 1 over five: 24 over six in all.
  loss_fn, batch = _scalar_problem([1, 0, 1, 4])
  whole, whole_aux = _step(loss_fn, batch, gradients.plain)
  parts, parts_aux = _step(loss_fn, batch, gradients.accumulate(2))
  np.testing.assert_allclose(whole.trainable['p'], -24 / 6, rtol=1e-6)
  np.testing.assert_allclose(
    parts.trainable['p'], whole.trainable['p'], rtol=1e-6
  )
  assert parts_aux.weight == whole_aux.weight == 6
  np.testing.assert_allclose(
    parts_aux.metrics['x'], whole_aux.metrics['x'], rtol=1e-6
  )
  np.testing.assert_array_equal(parts_aux.outputs, whole_aux.outputs)


def test_the_mean_of_means_would_move_another_way():
  # One unit of 21.5 and three of mean 3.5: 8, not (21.5 + 3.5) / 2 = 12.5.
  loss_fn, batch = _scalar_problem([1, 0, 1, 2])
  batch['x'] = jnp.asarray([21.5, 99.0, 2.5, 4.0])
  parts, _ = _step(loss_fn, batch, gradients.accumulate(2))
  np.testing.assert_allclose(parts.trainable['p'], -32 / 4, rtol=1e-6)


@pytest.mark.parametrize('num', [1, 2])
def test_a_batch_of_padding_moves_nothing(num):
  loss_fn, batch = _scalar_problem([0, 0, 0, 0])
  state, aux = _step(loss_fn, batch, gradients.accumulate(num))
  assert state.trainable['p'] == 0 and aux.weight == 0
  assert aux.metrics['loss'] == 0 and aux.metrics['grad_norm'] == 0


def test_a_microbatch_of_padding_counts_nothing():
  loss_fn, batch = _scalar_problem([1, 1, 0, 0])
  state, _ = _step(loss_fn, batch, gradients.accumulate(2))
  np.testing.assert_allclose(state.trainable['p'], -17.0, rtol=1e-6)


def test_an_accumulated_model_step_equals_the_plain_one():
  loss_fn, params, batch, _ = toys.problem()
  batch = {**batch, 'weight': jnp.asarray([1.0, 1, 0, 2, 0, 0, 0, 0.5])}

  def step(value_and_grad):
    learner = finetune(loss_fn, optim.sgd(0.1), value_and_grad=value_and_grad)
    return jax.jit(learner.step)(learner.init(params, KEY), batch, KEY)

  plain = step(gradients.plain)
  parts = step(gradients.accumulate(4))
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7),
    plain,
    parts,
  )


def test_model_state_passes_through_the_microbatches_in_order():
  def loss_fn(params, model_state, batch, rng):
    total = 0.5 * model_state['ema'] + batch['x'].sum()
    return params['p'] ** 2, Aux({'ema': total}, {}, jnp.ones(()))

  fun = gradients.accumulate(2)(
    lambda trainable, frozen, state, batch, rng: loss_fn(
      trainable, state, batch, rng
    )
  )
  x = {'x': jnp.asarray([1.0, 2.0, 3.0, 4.0])}
  (_, aux), grads = fun(
    {'p': jnp.asarray(3.0)}, {}, {'ema': jnp.asarray(2.0)}, x, KEY
  )
  assert aux.model_state['ema'] == 0.5 * (0.5 * 2 + 3) + 7
  assert grads['p'] == 6.0


def test_microbatches_must_divide_the_batch():
  loss_fn, batch = _scalar_problem([1, 1, 1, 1])
  with pytest.raises(UsageError, match='3 microbatches do not divide .* 4'):
    _step(loss_fn, batch, gradients.accumulate(3))


@pytest.mark.parametrize('num, lanes', [(4, 1), (4, 2), (4, 4), (8, 2)])
def test_lanes_change_where_sums_are_and_nothing_else(num, lanes):
  loss_fn, params, batch, _ = toys.problem(dropout=0.5)
  batch = {**batch, 'weight': jnp.asarray([1.0, 1, 0, 2, 0, 0, 0, 0.5])}

  def step(value_and_grad):
    learner = finetune(loss_fn, optim.sgd(0.1), value_and_grad=value_and_grad)
    return jax.jit(learner.step)(learner.init(params, KEY), batch, KEY)

  alone = step(gradients.accumulate(num))
  beside = step(gradients.accumulate(num, lanes=lanes))
  # Also each microbatch has the dropout that it has alone.
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7),
    alone,
    beside,
  )
  assert alone[1].outputs.shape == beside[1].outputs.shape


def test_lanes_must_divide_the_microbatches_and_have_no_state():
  with pytest.raises(UsageError, match='4 microbatches .* lanes=3'):
    gradients.accumulate(4, lanes=3)
  loss_fn, batch = _scalar_problem([1, 1, 1, 1])
  fun = gradients.accumulate(2, lanes=2)(
    lambda trainable, frozen, state, batch, rng: loss_fn(
      trainable, state, batch, rng
    )
  )
  with pytest.raises(UsageError, match='in order; choose lanes=1'):
    fun({'p': jnp.ones(())}, {}, {'ema': jnp.ones(())}, batch, KEY)


def test_each_microbatch_has_its_own_dropout():
  loss_fn, params, batch, _ = toys.problem(dropout=0.5)
  half = jax.tree.map(lambda x: x[:4], batch)
  twice = jax.tree.map(lambda x: jnp.concatenate([x, x]), half)
  learner = finetune(
    loss_fn, optim.sgd(0.1), value_and_grad=gradients.accumulate(2)
  )
  _, aux = jax.jit(learner.step)(learner.init(params, KEY), twice, KEY)
  assert np.any(aux.outputs[:4] != aux.outputs[4:])


def test_first_order_stops_the_gradient_and_the_statistics():
  def loss_fn(p, frozen, state, batch, rng):
    return p**3, Aux({'mean': 2 * p}, {}, jnp.ones(()))

  def outer(value_and_grad):
    def value(p):
      (_, aux), g = value_and_grad(loss_fn)(p, {}, {}, {}, KEY)
      return g + aux.model_state['mean']

    return value

  assert jax.grad(outer(gradients.plain))(2.0) == 12 + 2
  first = outer(gradients.first_order())
  assert jax.grad(first)(2.0) == 0 and first(2.0) == 12 + 4
  both = outer(gradients.first_order(gradients.plain))
  assert jax.jvp(both, (2.0,), (1.0,))[1] == 0
