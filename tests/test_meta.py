import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from fmeta import adapters, gradients, meta, optim, through, tree, tuning
from fmeta.errors import UsageError
from fmeta.learner import adapt, finetune
from fmeta.testing import assert_close
from fmeta.types import Aux

KEY = jax.random.key(14)
RATE, STEPS = 0.1, 3


def _quadratic(params, model_state, batch, rng):
  """(t - c)' A (t - c) / 2."""
  offset = params['t'] - batch['c']
  value = 0.5 * offset @ batch['A'] @ offset
  return value, Aux(model_state, {}, jnp.ones((), value.dtype))


def _symmetric(random, n=3):
  root = random.normal(size=(n, n))
  return jnp.asarray(root @ root.T / n + np.eye(n))


def _episodes(tasks):
  random = np.random.default_rng(2)
  parts = [
    {
      part: {'A': _symmetric(random), 'c': jnp.asarray(random.normal(size=3))}
      for part in ('support', 'query')
    }
    for _ in range(tasks)
  ]
  return jax.tree.map(lambda *x: jnp.stack(x), *parts)


def _inner(value_and_grad=gradients.plain, rate=RATE):
  return finetune(_quadratic, optim.sgd(rate), value_and_grad=value_and_grad)


def _grad(loss_fn, params, episodes, rng=None):
  return jax.jit(lambda p, e: jax.grad(lambda p: loss_fn(p, {}, e, rng)[0])(p))(
    params, episodes
  )


def _closed_forms(t, episodes):
  """MAML, FOMAML and Reptile by linear algebra, a task at a time."""
  out = {'maml': [], 'fomaml': [], 'reptile': []}
  tasks = episodes['support']['c'].shape[0]
  for k in range(tasks):
    s, q = (
      jax.tree.map(lambda x, k=k: x[k], episodes[part])
      for part in ('support', 'query')
    )
    power = np.linalg.matrix_power(np.eye(3) - RATE * s['A'], STEPS)
    adapted = s['c'] + power @ (t - s['c'])
    query = q['A'] @ (adapted - q['c'])
    out['maml'].append(power.T @ query)
    out['fomaml'].append(query)
    out['reptile'].append((np.eye(3) - power) @ (t - s['c']))
  return {name: np.mean(values, 0) for name, values in out.items()}


@pytest.mark.parametrize('name', ['maml', 'fomaml', 'reptile'])
def test_quadratic_episodes_have_their_closed_forms(name, x64):
  losses = {
    'maml': meta.episode_loss(_inner(), _quadratic, STEPS),
    'fomaml': meta.episode_loss(
      _inner(gradients.first_order()), _quadratic, STEPS
    ),
    'reptile': meta.reptile_loss(_inner(), STEPS),
  }
  episodes, t = _episodes(4), jnp.asarray([1.0, -2.0, 0.5])
  expected = _closed_forms(t, episodes)[name]
  found = _grad(losses[name], {'t': t}, episodes)['t']
  np.testing.assert_allclose(found, expected, rtol=1e-12)


@pytest.mark.parametrize(
  'way, name',
  [
    (through.remat, 'maml'),
    (through.mixed, 'maml'),
    (through.in_segments(3), 'maml'),
    (through.first_order, 'fomaml'),
  ],
  ids=['remat', 'mixed', 'in segments', 'first order'],
)
def test_every_way_through_has_its_closed_form(way, name, x64):
  episodes, t = _episodes(4), jnp.asarray([1.0, -2.0, 0.5])
  loss = meta.episode_loss(_inner(), _quadratic, STEPS, through=way)
  found = _grad(loss, {'t': t}, episodes)['t']
  expected = _closed_forms(t, episodes)[name]
  np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_a_reptile_step_moves_towards_the_adapted_weights(x64):
  episodes, params = _episodes(2), {'t': jnp.asarray([1.0, -2.0, 0.5])}
  outer = finetune(meta.reptile_loss(_inner(), STEPS), optim.sgd(0.25))
  after, aux = jax.jit(outer.step)(outer.init(params, KEY), episodes, KEY)
  adapted = []
  for k in range(2):
    support = jax.tree.map(lambda x, k=k: x[k], episodes['support'])
    learner = _inner()
    state, _ = adapt(
      learner,
      learner.init(params, KEY),
      lambda _, support=support: support,
      KEY,
      num_steps=STEPS,
    )
    adapted.append(state.trainable['t'])
  towards = params['t'] + 0.25 * (np.mean(adapted, 0) - params['t'])
  np.testing.assert_allclose(after.trainable['t'], towards, rtol=1e-12)
  assert aux.weight == 2


def test_reptile_takes_the_rows_of_the_support_in_turn(x64):
  # Steps on single rows: each pulls a share of the way to its own centre.
  centres = jnp.asarray([[1.0, 0.0], [0.0, 4.0], [-2.0, 1.0]])

  def loss_fn(params, model_state, batch, rng):
    gaps = params['t'][None] - batch['c']
    return 0.5 * (gaps**2).sum(-1).mean(), Aux(model_state, {}, jnp.ones(()))

  inner = finetune(loss_fn, optim.sgd(0.5))
  loss = meta.reptile_loss(inner, 4, batch_size=1)
  start = np.array([3.0, 3.0])
  found = _grad(
    loss, {'t': jnp.asarray(start)}, {'support': {'c': centres[None]}}
  )
  t = start
  for k in (0, 1, 2, 0):
    t = t + 0.5 * (np.asarray(centres[k]) - t)
  np.testing.assert_allclose(found['t'], start - t, rtol=1e-12)


def test_reptile_of_no_rows_is_refused():
  with pytest.raises(UsageError, match='batch_size 0 has no rows'):
    meta.reptile_loss(_inner(), 4, batch_size=0)


def test_zero_inner_steps_are_plain_training(x64):
  episodes, params = _episodes(3), {'t': jnp.asarray([1.0, -2.0, 0.5])}
  found = _grad(meta.episode_loss(_inner(), _quadratic, 0), params, episodes)
  query = episodes['query']
  plain = [query['A'][k] @ (params['t'] - query['c'][k]) for k in range(3)]
  np.testing.assert_allclose(found['t'], np.mean(plain, 0), rtol=1e-12)


def test_chunks_and_the_order_of_tasks_change_nothing(x64):
  episodes, params = _episodes(5), {'t': jnp.asarray([1.0, -2.0, 0.5])}
  loss = meta.episode_loss(_inner(), _quadratic, STEPS)
  chunked = meta.episode_loss(
    _inner(), _quadratic, STEPS, over=meta.in_chunks(2)
  )
  expected = _grad(loss, params, episodes)
  shuffled = jax.tree.map(lambda x: x[jnp.asarray([3, 1, 4, 0, 2])], episodes)
  assert_close(expected, _grad(chunked, params, episodes), 'chunks', 1e-12)
  assert_close(expected, _grad(loss, params, shuffled), 'order', 1e-12)


def test_maml_of_accumulated_episodes_is_maml(x64):
  episodes, params = _episodes(4), {'t': jnp.asarray([1.0, -2.0, 0.5])}
  loss = meta.episode_loss(_inner(), _quadratic, STEPS)
  outer = finetune(loss, optim.sgd(1.0), value_and_grad=gradients.accumulate(2))
  after, _ = jax.jit(outer.step)(outer.init(params, KEY), episodes, KEY)
  expected = params['t'] - _closed_forms(params['t'], episodes)['maml']
  np.testing.assert_allclose(after.trainable['t'], expected, rtol=1e-12)


def test_a_learned_rate_has_its_closed_form(x64):
  # One step: L(a) = loss(t - a g), so dL/da = -g' B (t_1 - d).
  episodes, t = _episodes(1), jnp.asarray([1.0, -2.0, 0.5])
  loss = meta.episode_loss(
    lambda hyper: _inner(rate=hyper['rate']), _quadratic, 1
  )
  params = {'model': {'t': t}, 'hyper': {'rate': jnp.asarray(RATE)}}
  found = _grad(loss, params, episodes)['hyper']['rate']
  s, q = (
    jax.tree.map(lambda x: x[0], episodes[part])
    for part in ('support', 'query')
  )
  g = s['A'] @ (t - s['c'])
  expected = -g @ (q['A'] @ (t - RATE * g - q['c']))
  np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_a_rate_per_weight_has_its_closed_form(x64):
  # One step: t_1 = t - a g, g = A (t - c). With e = B (t_1 - d) it is
  # dL/da = -g e and dL/dt = (I - A diag(a)) e.
  episodes, t = _episodes(1), jnp.asarray([1.0, -2.0, 0.5])
  loss = meta.episode_loss(
    lambda rates: finetune(
      _quadratic, optim.sgd(1.0, multipliers=(('t', rates['t']),))
    ),
    _quadratic,
    1,
  )
  a = jnp.asarray([0.3, 0.1, 0.7])
  found = _grad(loss, {'model': {'t': t}, 'hyper': {'t': a}}, episodes)
  s, q = (
    jax.tree.map(lambda x: x[0], episodes[part])
    for part in ('support', 'query')
  )
  g = s['A'] @ (t - s['c'])
  e = q['A'] @ (t - a * g - q['c'])
  np.testing.assert_allclose(found['hyper']['t'], -g * e, rtol=1e-12)
  of_start = (np.eye(3) - s['A'] @ np.diag(a)) @ e
  np.testing.assert_allclose(found['model']['t'], of_start, rtol=1e-12)


def _lora_problem(optimizer, dropout=0.0):
  loss_fn, params, _, forward = toys.problem(dropout=dropout, sizes=(4,))
  matrices = 'body/.*/kernel'
  params = adapters.lora_init(params, KEY, (matrices,), 2)
  lora = adapters.lora(matrices, rank=2, also=('head/.*',))
  inner = finetune(loss_fn, optimizer, tuning=lora)
  episode = {
    'support': toys.batch_of(4, seed=1),
    'query': toys.batch_of(5, seed=2),
  }
  episodes = jax.tree.map(lambda x: x[None], episode)
  return inner, loss_fn, params, episodes, forward


def test_clipped_adam_with_eps_root_adapts_fresh_factors():
  # B = 0, so A's inner gradient is exactly zero: the documented trap.
  inner, loss_fn, params, episodes, _ = _lora_problem(
    optim.adamw(0.01, eps_root=1e-8)
  )
  grads = _grad(meta.episode_loss(inner, loss_fn, 2), params, episodes)
  factor = tree.get(grads, 'body/layer_0/kernel.lora_a')
  assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(grads))
  assert np.any(factor != 0)


def test_sgd_survives_a_support_set_of_padding():
  # All gradients exactly zero: the norms that the step logs must not leak
  # their undefined derivative.
  inner, loss_fn, params, episodes, _ = _lora_problem(optim.sgd(0.1))
  episodes['support']['weight'] = jnp.zeros((1, 4))
  grads = _grad(meta.episode_loss(inner, loss_fn, 2), params, episodes)
  assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(grads))


def test_first_order_is_the_query_gradient_at_the_adapted_weights(x64):
  loss_fn, params, _, _ = toys.problem(sizes=(4,))
  params = toys.double(params)
  support, query = toys.double((toys.batch_of(4), toys.batch_of(5, seed=1)))
  learner = finetune(
    loss_fn,
    optim.adam(0.01),
    tuning=tuning.select('head/.*'),
    value_and_grad=gradients.first_order(),
  )

  @jax.jit
  def query_gradient(params):
    state, _ = adapt(
      learner, learner.init(params, KEY), lambda _: support, KEY, num_steps=2
    )
    adapted = learner.params(state)
    return jax.grad(lambda p: loss_fn(p, {}, query, None)[0])(adapted)

  episodes = jax.tree.map(
    lambda x: x[None], {'support': support, 'query': query}
  )
  found = _grad(meta.episode_loss(learner, loss_fn, 2), params, episodes)
  assert_close(query_gradient(params), found, 'FOMAML', 1e-12)


def test_predictions_are_those_of_the_adapted_model():
  inner, loss_fn, params, episodes, forward = _lora_problem(
    optim.sgd(0.1), dropout=0.4
  )
  loss = meta.episode_loss(inner, loss_fn, 2)

  @jax.jit
  def all_of_them(params, episodes):
    predict = meta.predict_episodes(inner, forward, 2)
    start = meta.predict_episodes(inner, forward, 0)
    _, aux = loss(params, {}, episodes, None)
    return (
      aux.outputs,
      predict(params, episodes, None),
      predict(params, episodes, KEY),
      start(params, episodes, KEY),
    )

  # Without a key all is fixed, in the loss and in the prediction; with one,
  # dropout in the adaptation is drawn from it.
  of_loss, fixed, drawn, start = all_of_them(params, episodes)
  assert fixed.shape == (1, 5, 3)
  np.testing.assert_allclose(of_loss, fixed, rtol=1e-5, atol=1e-6)
  assert np.any(fixed != drawn) and np.any(drawn != start)
  support_free = forward(
    inner.params(inner.init(params, KEY)),
    {},
    jax.tree.map(lambda x: x[0], episodes['query']),
    None,
  )[0]
  np.testing.assert_allclose(start[0], support_free, rtol=1e-5, atol=1e-6)


def test_reptile_refuses_factors_that_it_cannot_move():
  loss_fn, params, batch, _ = toys.problem()
  lora = adapters.lora('body/.*/kernel', rank=2)
  inner = finetune(loss_fn, optim.sgd(0.1), tuning=lora)
  episodes = jax.tree.map(lambda x: x[None], {'support': batch})
  with pytest.raises(UsageError, match='lora_a.* is no outer parameter'):
    meta.reptile_loss(inner, 1)(params, {}, episodes, KEY)
