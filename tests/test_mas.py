"""Memory aware synapses."""

import jax
import jax.numpy as jnp
import numpy as np
import streamed
import toys

from fmeta import optim, penalty, tree
from fmeta.learner import finetune


def _problem(rows=7, seed=0):
  random = np.random.default_rng(seed)
  kernel = jnp.asarray(random.normal(size=(3, 2)))
  batch = {
    'x': jnp.asarray(random.normal(size=(rows, 3))),
    'target': jnp.asarray(random.normal(size=(rows, 2))),
  }
  return {'kernel': kernel}, batch


def _in_closed_form(kernel, x):
  """E |2 y_k x_i| of a linear model y = x W."""
  return np.abs(2 * (x @ kernel)[:, None] * np.asarray(x)[:, :, None]).mean(0)


def _importance(params, batches, moving=None):
  moving = params if moving is None else moving
  return penalty.output_sensitivity(
    streamed.linear, params, moving, {}, batches, streamed.KEY
  )


def test_importance_of_a_linear_model_in_closed_form(x64):
  params, batch = _problem()
  by_hand = _in_closed_form(params['kernel'], batch['x'])
  found = _importance(params, [batch])['kernel']
  np.testing.assert_allclose(found, by_hand, rtol=1e-12)
  # Of the batch's mean gradient it would be less: opposite signs cancel.
  both = 2 * np.asarray(batch['x']).T @ (batch['x'] @ params['kernel']) / 7
  assert np.all(np.abs(both) < by_hand)


def test_batch_size_and_padding_change_nothing(x64):
  params, batch = _problem()
  whole = _importance(params, [batch])['kernel']
  parts = [
    {'x': batch['x'][:4]},
    {
      'x': jnp.concatenate([batch['x'][4:], batch['x'][:1]]),
      'weight': jnp.asarray([1.0, 2.0, 1.0, 0.0]),
    },
  ]
  parted = _importance(params, parts)['kernel']
  np.testing.assert_allclose(parted, whole, rtol=1e-12)


def test_of_a_model_with_more_layers_by_differences(x64):
  params, batch = toys.double((toys.three_kernels(), toys.batch_of(5)))
  found = penalty.output_sensitivity(
    toys.three_layers, params, params, {}, [batch], streamed.KEY
  )

  def lengths(params):
    outputs, _ = toys.three_layers(params, {}, batch, None)
    return np.asarray((outputs**2).sum(-1))

  def at(name, index, offset):
    return lengths(
      tree.map_with_name(
        lambda n, x: x.at[index].add(offset) if n == name else x, params
      )
    )

  for name in tree.names(params):
    for index in ((0, 0), (2, 1)):
      slopes = (at(name, index, 1e-6) - at(name, index, -1e-6)) / 2e-6
      np.testing.assert_allclose(
        tree.get(found, name)[index], np.abs(slopes).mean(), rtol=1e-7
      )


def test_importances_add_up_and_the_anchor_is_the_latest(x64):
  params, first = _problem()
  second = _problem(seed=1)[1]
  made = penalty.mas(3.0)
  learner = finetune(streamed.half_squares(), optim.sgd(0.1), penalty=made)
  passed = streamed.run(learner, params, [[first] * 2, [second] * 2])
  ends = [path[-1].trainable['kernel'] for path, _ in passed]
  by_hand = _in_closed_form(ends[0], first['x']) + _in_closed_form(
    ends[1], second['x']
  )
  state = passed[-1][1].penalty_state
  np.testing.assert_allclose(state['importance']['kernel'], by_hand, rtol=1e-12)
  np.testing.assert_array_equal(state['anchor']['kernel'], ends[1])
  # lambda sum_i Omega_i (p_i - p*_i)^2, without a half.
  moved = {'kernel': ends[1] + 2.0}
  value, slope = jax.value_and_grad(
    lambda p: made.value(p, p, state, {}, None)
  )(moved)
  np.testing.assert_allclose(value, 3.0 * 4.0 * by_hand.sum(), rtol=1e-12)
  np.testing.assert_allclose(
    slope['kernel'], 3.0 * 2 * 2.0 * by_hand, rtol=1e-12
  )
