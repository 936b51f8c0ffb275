"""The parts of MAML++ against loops written by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toys

from fmeta import fewshot, gradients, losses, meta, optim, train, tree, tuning
from fmeta.errors import UsageError
from fmeta.learner import adapt, finetune
from fmeta.testing import assert_close
from fmeta.types import Aux

KEY = jax.random.key(6)
STEPS = 2
LOSS = losses.supervised(toys.three_layers, losses.softmax_cross_entropy)
HEAD = tuning.select('body/layer_1/.*', 'head/.*')


def episodes(tasks=2):
  parts = [
    {
      'support': toys.batch_of(4, seed=k),
      'query': toys.batch_of(3, seed=10 + k),
    }
    for k in range(tasks)
  ]
  return jax.tree.map(lambda *x: jnp.stack(x), *parts)


def step_rates():
  """Another rate for each leaf and step."""
  moving = HEAD.init(toys.three_kernels(), KEY)[0]
  rates = fewshot.step_rates_init(moving, STEPS, 0.1)
  shifts = {'body/layer_1/kernel': 0.01, 'head/kernel': 0.3}
  return tree.map_with_name(
    lambda name, x: x + shifts[name] * jnp.arange(1.0, STEPS + 1), rates
  )


def learned(rates):
  return finetune(LOSS, fewshot.step_rates(rates), tuning=HEAD)


def value(fast, params, part):
  return LOSS(tree.combine(params, fast), {}, part, None)[0]


def by_hand(params, rates, batch, weights):
  """Every step and every task in a Python loop."""
  total = 0.0
  for k in range(2):
    support, query = (
      jax.tree.map(lambda x, k=k: x[k], batch[part])
      for part in ('support', 'query')
    )
    fast = HEAD.init(params, KEY)[0]
    for step in range(STEPS):
      slopes = jax.grad(value)(fast, params, support)
      fast = jax.tree.map(
        lambda p, g, r, step=step: p - r[step] * g, fast, slopes, rates
      )
      total = total + weights[step] * value(fast, params, query) / 2
  return total


WEIGHTS = np.array([0.3, 0.7])


def weighted(batch, weights=WEIGHTS):
  return {**batch, 'step_weight': jnp.tile(jnp.asarray(weights)[None], (2, 1))}


def test_the_multi_step_loss_with_step_rates_is_its_hand_written_sum(x64):
  params = toys.double({'model': toys.three_kernels(), 'hyper': step_rates()})
  batch = toys.double(episodes())
  loss = fewshot.multi_step_loss(learned, LOSS, STEPS)

  def ours(params):
    return loss(params, {}, weighted(batch), None)

  def theirs(params):
    return by_hand(params['model'], params['hyper'], batch, WEIGHTS)

  (found, aux), grads = jax.jit(jax.value_and_grad(ours, has_aux=True))(params)
  expected, slopes = jax.jit(jax.value_and_grad(theirs))(params)
  np.testing.assert_allclose(found, expected, rtol=1e-12)
  assert_close(slopes, grads, 'gradient', 1e-12)
  assert all(np.all(x != 0) for x in jax.tree.leaves(grads['hyper']))
  assert aux.weight == 2 and aux.outputs.shape == (2, 3, 3)


def test_all_weight_on_the_last_step_is_maml(x64):
  params, batch = toys.double((toys.three_kernels(), episodes()))
  inner = finetune(LOSS, optim.sgd(0.1), tuning=HEAD)
  last = fewshot.annealed_weights(STEPS, 10)(10)
  losses_of = {
    'multi': fewshot.multi_step_loss(inner, LOSS, STEPS),
    'plain': meta.episode_loss(inner, LOSS, STEPS),
  }

  @jax.jit
  def run(params):
    return [
      jax.value_and_grad(
        lambda p, f=f: f(p, {}, weighted(batch, last), KEY), has_aux=True
      )(params)
      for f in losses_of.values()
    ]

  assert_close(*run(params), 'multi-step = MAML', 1e-12)


def test_step_rates_are_descent_with_a_rate_per_leaf_and_step(x64):
  rates = {'a': jnp.asarray([0.5, 0.25]), 'b': jnp.asarray([0.1, 1.0])}

  def quadratic(params, model_state, batch, rng):
    value = 0.5 * sum(jnp.sum(p**2) for p in params.values())
    return value, Aux(model_state, {}, jnp.ones(()))

  learner = finetune(quadratic, fewshot.step_rates(rates))
  start = {'a': jnp.asarray([2.0]), 'b': jnp.asarray([3.0])}
  _, seen = adapt(
    learner,
    learner.init(start, KEY),
    lambda _: {},
    KEY,
    num_steps=4,
    every=lambda state, aux: state.trainable,
  )
  # p <- (1 - r) p; steps beyond the last rate use it again.
  shrinks = {'a': [0.5, 0.75, 0.75, 0.75], 'b': [0.9, 0.0, 0.0, 0.0]}
  for name, factors in shrinks.items():
    expected = start[name] * np.cumprod(factors)
    np.testing.assert_allclose(seen[name][:, 0], expected, rtol=1e-12)


def test_offsets_lead_their_leaf_and_let_others_through(x64):
  path = jnp.asarray([[0.5], [-1.0]])

  def quadratic(params, model_state, batch, rng):
    value = 0.5 * jnp.sum(params['a'] ** 2 * params['b'])
    return value, Aux(model_state, {}, jnp.ones(()))

  def inner(path):
    moves = fewshot.step_offsets({'b': path})
    return finetune(quadratic, optax.chain(optim.sgd(0.1), moves))

  def last(path, num_steps=4):
    learner, start = inner(path), {'a': jnp.ones(1), 'b': jnp.full(1, 2.0)}
    state = learner.init(start, KEY)
    every = lambda state, aux: state.trainable
    state, seen = adapt(
      learner, state, lambda _: {}, KEY, num_steps=num_steps, every=every
    )
    return state.trainable['a'][0], seen

  value, seen = last(path)
  # From 2: plus 0.5, then minus 1 for good.
  np.testing.assert_allclose(seen['b'][:, 0], [2.5, 1.0, 1.0, 1.0], rtol=1e-12)
  shrinks = np.cumprod([1 - 0.1 * b for b in (2.0, 2.5, 1.0, 1.0)])
  np.testing.assert_allclose(seen['a'][:, 0], shrinks, rtol=1e-12)
  # d/do_1 of (1 - .2) (1 - .1 (2 + o_1)) (1 - .1 (2 + o_2))^2.
  slope = jax.grad(lambda path: last(path)[0])(path)
  expected = [value * -0.1 / 0.75, value * -0.2 / 0.9]
  np.testing.assert_allclose(slope[:, 0], expected, rtol=1e-12)


def test_offsets_of_zero_steps_are_refused():
  with pytest.raises(UsageError, match='0 inner steps have no path'):
    fewshot.step_offsets_init({'b': jnp.zeros(1)}, 0)


def test_equal_step_rates_are_sgd_bitwise():
  moving = HEAD.init(toys.three_kernels(), KEY)[0]
  rates = fewshot.step_rates_init(moving, 2, 0.1)
  batch = jax.tree.map(lambda x: x[0], episodes()['support'])

  def after(optimizer):
    learner = finetune(LOSS, optimizer, tuning=HEAD)
    state = learner.init(toys.three_kernels(), KEY)
    step = jax.jit(learner.step)
    for _ in range(3):
      state, _ = step(state, batch, KEY)
    return state.trainable

  assert_close(
    after(optim.sgd(0.1)), after(fewshot.step_rates(rates)), 'sgd', 0.0
  )


def test_weights_anneal_from_equal_to_the_last_step():
  weights = fewshot.annealed_weights(4, 10)
  np.testing.assert_allclose(weights(0), [0.25] * 4)
  np.testing.assert_allclose(weights(5), [0.125] * 3 + [0.625])
  for late in (10, 11, 1000):
    np.testing.assert_array_equal(weights(late), [0, 0, 0, 1])
  for i in range(12):
    np.testing.assert_allclose(weights(i).sum(), 1, rtol=1e-6)


def test_meta_batches_carry_the_weights_of_their_index():
  source = fewshot.with_step_weights(
    lambda i: episodes(), fewshot.annealed_weights(2, 4)
  )
  np.testing.assert_allclose(source(2)['step_weight'], [[0.25, 0.75]] * 2)
  assert set(source(0)) == {'support', 'query', 'step_weight'}


def test_annealing_compiles_once():
  traces = []
  inner = finetune(LOSS, optim.sgd(0.1), tuning=HEAD)
  outer = finetune(fewshot.multi_step_loss(inner, LOSS, 2), optim.adam(0.01))

  @jax.jit
  def step(state, batch):
    traces.append(batch)
    return outer.step(state, batch, KEY)[0]

  source = fewshot.with_step_weights(
    lambda i: episodes(), fewshot.annealed_weights(2, 3)
  )
  state = outer.init(toys.three_kernels(), KEY)
  for i in range(5):
    state = step(state, source(i))
  assert len(traces) == 1


def test_the_derivative_s_order_anneals_by_stages():
  # Two stages of one fit: first order, then second, with Adam's moments kept.
  def outer(how):
    inner = finetune(LOSS, optim.sgd(0.5), tuning=HEAD, value_and_grad=how)
    return finetune(meta.episode_loss(inner, LOSS, 1), optim.adam(0.01))

  first, second = outer(gradients.first_order()), outer(gradients.plain)
  start = first.init(toys.three_kernels(), KEY)
  batch = episodes()
  fitted = train.fit(
    first,
    jax.tree.map(jnp.copy, start),
    [
      train.Stage('first order', lambda i: batch, 2),
      train.Stage('second order', lambda i: batch, 2, learner=second),
    ],
    KEY,
  )
  expected, only_first = start, start
  steps = jax.jit(first.step), jax.jit(second.step)
  for k in range(4):
    expected, _ = steps[k // 2](expected, batch, KEY)
    only_first, _ = steps[0](only_first, batch, KEY)
  assert_close(expected.trainable, fitted.params, 'two stages', 1e-6)
  kernel = only_first.trainable['head']['kernel']
  assert np.abs(kernel - fitted.params['head']['kernel']).max() > 1e-4


def test_what_does_not_fit_is_refused_in_one_line():
  params, batch = toys.three_kernels(), episodes()
  inner = finetune(LOSS, optim.sgd(0.1))
  with pytest.raises(UsageError, match='needs an inner step'):
    fewshot.multi_step_loss(inner, LOSS, 0)
  loss = fewshot.multi_step_loss(inner, LOSS, 3)
  with pytest.raises(UsageError, match=r'step_weight None .* need \[tasks, 3'):
    loss(params, {}, batch, None)
  with pytest.raises(UsageError, match=r'step_weight \(2, 2\) of a batch'):
    loss(params, {}, weighted(batch), None)
  with pytest.raises(UsageError, match="no step rates for 'body/layer_0"):
    finetune(LOSS, fewshot.step_rates(step_rates())).init(params, KEY)
  with pytest.raises(UsageError, match='0 inner steps have no rates'):
    fewshot.step_rates_init(params, 0, 0.1)
  with pytest.raises(UsageError, match='0 inner steps, 5 iterations'):
    fewshot.annealed_weights(0, 5)
