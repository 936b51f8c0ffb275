"""Rates as learnable logarithms, and the plain list that comes out."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from fmeta import optim, tuning
from fmeta.errors import UsageError
from fmeta.learner import adapt, finetune
from fmeta.meta import episode_loss
from fmeta.testing import assert_close, assert_same, check_gradient
from fmeta.types import Aux

KEY = jax.random.key(15)
PATTERNS = ('body/.*/bias', 'body/.*', 'head/.*')
LOGS = np.log([0.3, 0.05, 0.2])
LOSS, PARAMS, _, _ = toys.problem(sizes=(4,))
OPTIMIZERS = {
  'sgd': lambda rates: optim.sgd(1.0, multipliers=rates),
  'adam': lambda rates: optim.adamw(
    1.0, weight_decay=0.0, clip_norm=None, eps_root=1e-8, multipliers=rates
  ),
}


def _inner(optimizer):
  def learner(logs):
    rates = optim.learned_rates(PATTERNS, logs)
    return finetune(LOSS, OPTIMIZERS[optimizer](rates))

  return learner


def _episodes(tasks=2):
  parts = [
    {
      'support': toys.batch_of(4, seed=k),
      'query': toys.batch_of(3, seed=10 + k),
    }
    for k in range(tasks)
  ]
  return jax.tree.map(lambda *x: jnp.stack(x), *parts)


@pytest.mark.parametrize('optimizer', OPTIMIZERS)
def test_gradients_of_log_rates_agree_with_central_differences(optimizer, x64):
  loss, episodes = (
    episode_loss(_inner(optimizer), LOSS, 2),
    toys.double(_episodes()),
  )
  model = toys.double(PARAMS)

  def objective(logs):
    return loss({'model': model, 'hyper': logs}, {}, episodes, KEY)[0]

  grads = check_gradient(objective, jnp.asarray(LOGS))
  assert np.all(np.asarray(grads) != 0)


def test_the_gradient_of_a_log_rate_has_its_closed_form(x64):
  # L(l) = |t - exp(l) g - d|^2 / 2 by leaf, so dL/dl = -exp(l) g' (t_1 - d).
  random = np.random.default_rng(0)
  t, c, d = ({k: random.normal(size=3) for k in 'ab'} for _ in range(3))

  def loss(params, model_state, batch, rng):
    del rng
    gaps = [params[k] - batch[k] for k in 'ab']
    value = 0.5 * sum((gap**2).sum() for gap in gaps)
    return value, Aux(model_state, {}, jnp.ones(()))

  def inner(logs):
    rates = optim.learned_rates(('a', 'b'), logs)
    return finetune(loss, optim.sgd(1.0, multipliers=rates))

  episode = {'support': c, 'query': d}
  episodes = jax.tree.map(lambda x: jnp.asarray(x)[None], episode)
  meta_loss, logs = episode_loss(inner, loss, 1), jnp.asarray([-1.0, -2.0])

  @jax.jit
  def value(logs):
    return meta_loss({'model': t, 'hyper': logs}, {}, episodes, KEY)[0]

  found = jax.grad(value)(logs)
  expected = []
  for k, rate in zip('ab', np.exp(logs), strict=True):
    g = t[k] - c[k]
    expected.append(-rate * g @ (t[k] - rate * g - d[k]))
  np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_the_outer_loop_moves_rates_and_no_weight():
  params = {'model': PARAMS, 'hyper': jnp.asarray(LOGS, jnp.float32)}
  loss = episode_loss(_inner('sgd'), LOSS, 2)
  outer = finetune(loss, optim.adam(0.1), tuning=tuning.select('hyper'))
  after, _ = jax.jit(outer.step)(outer.init(params, KEY), _episodes(), KEY)
  after = outer.params(after)
  assert_same(PARAMS, after['model'], 'model')
  # Adam's first step is the rate in the direction of the sign.
  np.testing.assert_allclose(
    # float32: 0.1 is the difference of logarithms of some units
    np.abs(after['hyper'] - params['hyper']),
    0.1,
    rtol=1e-4,
  )


@pytest.mark.parametrize('optimizer', OPTIMIZERS)
def test_plain_rates_fine_tune_bitwise_as_they_were_learned(
  optimizer, optimised
):
  logs, support = jnp.asarray(LOGS, jnp.float32), toys.batch_of(4)

  def tuned(learner, params):
    return adapt(
      learner, learner.init(params, KEY), lambda _: support, KEY, num_steps=4
    )[0].trainable

  inside = jax.jit(lambda params, logs: tuned(_inner(optimizer)(logs), params))
  rates = optim.plain_rates(optim.learned_rates(PATTERNS, logs))
  # As it comes back from `rates.json`.
  rates = json.loads(json.dumps(rates))
  plain = finetune(LOSS, OPTIMIZERS[optimizer](rates))
  outside = jax.jit(lambda params: tuned(plain, params))
  assert_same(inside(PARAMS, logs), outside(PARAMS), 'plain = learned')


def test_a_rate_of_zero_is_a_frozen_leaf():
  batch = toys.batch_of(4)
  rates = [('head/.*', 0.1), ('.*', 0.0)]
  whole = finetune(LOSS, OPTIMIZERS['adam'](rates))
  part = finetune(
    LOSS, OPTIMIZERS['adam'](rates), tuning=tuning.select('head/.*')
  )
  ends = [
    jax.jit(learner.step)(learner.init(PARAMS, KEY), batch, KEY)[0]
    for learner in (whole, part)
  ]
  assert_same(PARAMS['body'], ends[0].trainable['body'], 'body')
  assert_close(
    ends[0].trainable['head'], ends[1].trainable['head'], 'head', 1e-6
  )


def test_what_hardly_moves_is_left_out():
  rates = (('a', 1.0), ('b', 0.3), ('c', np.float32(0.05)))
  assert optim.moving(rates, 0.0) == ('a', 'b', 'c')
  assert optim.moving(rates, 0.1) == ('a', 'b')
  assert optim.moving(rates, 1.0) == ('a',)


def test_wrong_numbers_of_rates_and_shares_are_refused():
  with pytest.raises(UsageError, match=r'logs of shape \(2,\) for 3 patterns'):
    optim.learned_rates(PATTERNS, jnp.zeros(2))
  with pytest.raises(UsageError, match='share=1.5 of 1 rates; give a share'):
    optim.moving([('a', 1.0)], 1.5)
  with pytest.raises(UsageError, match='share=0.5 of 0 rates'):
    optim.moving([], 0.5)
