"""K-FAC's quadratic against the whole Fisher, where the two are one."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from fmeta import fisher, tree
from fmeta.errors import UsageError
from fmeta.fisher.kronecker import kronecker_fisher
from fmeta.penalty import max_importance
from fmeta.penalty.kfac import ewc_kfac

KEY = jax.random.key(3)
CLASSES = 3


class Linear(nn.Module):
  @nn.compact
  def __call__(self, x, train=False):
    return nn.Dense(CLASSES, name='head')(x)


def _random_like(params, seed):
  random = np.random.default_rng(seed)
  return jax.tree.map(
    lambda x: jnp.asarray(random.normal(size=x.shape), x.dtype), params
  )


def _problem(module, rows=4, features=4):
  params, state = toys.init_of(module, features)
  batch = toys.batch_of(rows, features)
  return toys.double((_random_like(params, 5), state, batch))


def _whole_fisher(forward, params, batch):
  """E_x sum_y p g g^T of all parameters, flat, and how to make them flat."""
  flat, unflatten = jax.flatten_util.ravel_pytree(params)

  def log_probs(flat):
    outputs, _ = forward(unflatten(flat), {}, batch, None)
    return jax.nn.log_softmax(outputs)

  p, slopes = jnp.exp(log_probs(flat)), jax.jacobian(log_probs)(flat)
  return jnp.einsum('ny,nyi,nyj->ij', p, slopes, slopes) / len(p)


def _flat(params):
  return jax.flatten_util.ravel_pytree(params)[0]


def _moved(penalty, state, params, batches, forward, model_state=None):
  return penalty.consolidate(
    state, params, params, model_state or {}, forward, batches, KEY
  )


def test_where_all_inputs_are_alike_it_is_the_whole_fisher(x64):
  # E[a a^T (x) g g^T] factorises: a and g are the same for every example.
  _, _, batch = _problem(Linear())
  forward = toys.forward_of(Linear())
  batches = [
    {**batch, 'x': jnp.repeat(batch['x'][k : k + 1], 4, 0)} for k in (0, 1)
  ]
  penalty = ewc_kfac(3.0, 3)
  params = _problem(Linear())[0]
  state = penalty.init(params, params)
  optima, fishers = [_random_like(params, k) for k in (7, 8)], []
  for optimum, task in zip(optima, batches, strict=True):
    state = _moved(penalty, state, optimum, [task], forward)
    fishers.append(_whole_fisher(forward, optimum, task))

  def by_hand(p):
    steps = [_flat(p) - _flat(o) for o in optima]
    pairs = zip(steps, fishers, strict=True)
    return 1.5 * sum(d @ f @ d for d, f in pairs)

  point = _random_like(params, 9)
  found = jax.jit(jax.value_and_grad(penalty.value))(
    point, point, state, {}, None
  )
  # The value is a function of both; only moving leaves are in it.
  np.testing.assert_allclose(found[0], by_hand(point), rtol=1e-12)
  slope = jax.grad(lambda p: penalty.value(p, p, state, {}, None))(point)
  np.testing.assert_allclose(
    _flat(slope), _flat(jax.grad(by_hand)(point)), rtol=1e-10
  )


def test_factors_of_two_layers_are_those_of_backpropagation_by_hand(x64):
  module = toys.Net(sizes=(5,))
  params, _, batch = _problem(module, rows=6)
  forward = toys.forward_of(module)
  names = ['body/layer_0/kernel', 'head/kernel']
  parts = [{k: v[i : i + 4] for k, v in batch.items()} for i in (0, 2)]
  parts[1]['weight'] = jnp.asarray([0.0, 0, 1, 1])
  found = kronecker_fisher(
    forward,
    params,
    params,
    {},
    parts,
    KEY,
    kernels=names,
    labels=fisher.labels.summed_over,
  )
  x = np.asarray(batch['x'])
  by_hand = jax.tree.map(np.asarray, params)
  first, last = by_hand['body']['layer_0'], by_hand['head']
  hidden = np.tanh(x @ first['kernel'] + first['bias'])
  p = np.asarray(jax.nn.softmax(hidden @ last['kernel'] + last['bias']))
  g_last = np.eye(CLASSES)[None] - p[:, None]  # [n, y, out]
  g_first = (g_last @ last['kernel'].T) * (1 - hidden**2)[:, None]
  for name, a, g in zip(names, (x, hidden), (g_first, g_last), strict=True):
    a = np.concatenate([a, np.ones((6, 1))], 1)
    np.testing.assert_allclose(found[name].a, a.T @ a / 6, rtol=1e-12)
    outer = np.einsum('ny,nyi,nyj->ij', p, g, g) / 6
    np.testing.assert_allclose(found[name].g, outer, rtol=1e-11, atol=1e-15)


def test_positions_are_a_mean_of_inputs_and_a_sum_of_outputs(x64):
  params, _, _ = _problem(Linear())
  random = np.random.default_rng(2)
  x = random.normal(size=(3, 5, 4))

  def forward(params, state, batch, rng):
    return Linear().apply({'params': params}, batch['x']).mean(1), state

  found = kronecker_fisher(
    forward,
    params,
    params,
    {},
    [{'x': jnp.asarray(x)}],
    KEY,
    kernels=['head/kernel'],
    labels=fisher.labels.summed_over,
  )['head/kernel']
  a = np.concatenate([x, np.ones((3, 5, 1))], -1).reshape(15, 5)
  np.testing.assert_allclose(found.a, a.T @ a / 15, rtol=1e-12)
  p = np.asarray(
    jax.nn.softmax(forward(params, {}, {'x': jnp.asarray(x)}, None)[0])
  )
  spread = [np.diag(q) - np.outer(q, q) for q in p]  # sum_y p g g^T at T = 1
  np.testing.assert_allclose(found.g, np.mean(spread, 0) / 5, rtol=1e-12)


def test_leaves_outside_of_dense_layers_get_a_diagonal(x64):
  module = toys.NormNet()
  params, model_state, batch = _problem(module)
  forward = toys.forward_of(module)
  penalty = ewc_kfac(2.0, 1)
  state = _moved(
    penalty,
    penalty.init(params, params),
    params,
    iter([batch]),
    forward,
    model_state,
  )
  assert tree.names(state['diagonal']) == ['body/norm/bias', 'body/norm/scale']
  exact = fisher.exact_fisher(
    forward, params, params, model_state, [batch], KEY
  )['body']['norm']['scale']
  point = jax.tree.map(jnp.array, params)
  point['body']['norm']['scale'] += 0.5
  value = penalty.value(point, point, state, {}, None)
  np.testing.assert_allclose(value, 0.25 * exact.sum(), rtol=1e-12)
  assert value > 0


def test_the_state_has_a_fixed_size_and_is_refused_when_full():
  params, _, batch = jax.tree.map(
    lambda x: jnp.asarray(x), toys.init_of(Linear(), 4) + (toys.batch_of(4, 4),)
  )
  forward = toys.forward_of(Linear())
  penalty = ewc_kfac(1.0, 1)
  empty = penalty.init(params, params)
  assert penalty.value(params, params, empty, {}, None) == 0
  one = _moved(penalty, empty, params, [batch], forward)
  shapes = [jax.tree.map(jnp.shape, s) for s in (empty, one)]
  assert shapes[0] == shapes[1]
  with pytest.raises(UsageError, match='room for num_tasks=1'):
    _moved(penalty, one, params, [batch], forward)
  # Nothing can be raised under jit, but nothing goes on unnoticed either.
  end = jax.jit(lambda s: _moved(penalty, s, params, [batch], forward))
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-9),
    end(empty),
    one,
  )
  assert np.isnan(penalty.value(params, params, end(one), {}, None))


def test_two_seeds_are_an_axis_of_vmap(x64):
  params, _, batch = _problem(Linear())
  forward = toys.forward_of(Linear())
  penalty = ewc_kfac(1.0, 2)
  seeds = [_random_like(params, k) for k in (1, 2)]

  def remembered(params):
    state = penalty.init(params, params)
    state = _moved(penalty, state, params, [batch], forward)
    moved = jax.tree.map(lambda x: x + 1, params)
    return penalty.value(moved, moved, state, {}, None)

  both = jax.vmap(remembered)(jax.tree.map(lambda *x: jnp.stack(x), *seeds))
  alone = [remembered(seed) for seed in seeds]
  assert alone[0] != alone[1]
  np.testing.assert_allclose(both, alone, rtol=1e-12)


def test_only_dense_layers_have_factors():
  params = {'l': {'kernel': jnp.ones((3, 3)), 'bias': jnp.ones(3)}}
  batch = {'x': jnp.ones((2, 3))}

  def twice(params, state, batch, rng):
    kernel = params['l']['kernel']
    return batch['x'] @ kernel @ kernel + params['l']['bias'][None], state

  def turned(params, state, batch, rng):
    kernel = params['l']['kernel'].T
    return batch['x'] @ kernel + params['l']['bias'][None], state

  def scaled(params, state, batch, rng):
    return batch['x'] @ params['l']['kernel'] * params['l']['bias'][None], state

  def apart(params, state, batch, rng):
    shifted = jnp.tanh(batch['x'] + params['l']['bias'][None])
    return batch['x'] @ params['l']['kernel'] + shifted, state

  penalty = ewc_kfac(1.0, 1)
  state = penalty.init(params, params)
  for forward, said in (
    (twice, 'multiplies once'),
    (turned, 'multiplies once'),
    (scaled, 'is not added to'),
    (apart, 'is not added to'),
  ):
    with pytest.raises(UsageError, match=said):
      _moved(penalty, state, params, [batch], forward)
  # Left out of `kernels`, it is remembered by its diagonal.
  penalty = ewc_kfac(1.0, 1, kernels='none')
  state = penalty.init(params, params)
  state = _moved(penalty, state, params, [batch], twice)
  assert state['diagonal']['l']['kernel'].max() > 0 and not state['a']


@pytest.mark.parametrize('kernels', ['(.*/)?kernel', 'none'])
def test_the_largest_importance_is_the_largest_curvature(kernels, x64):
  params, _, batch = _problem(toys.Net(sizes=(3,)))
  forward = toys.forward_of(toys.Net(sizes=(3,)))
  penalty = ewc_kfac(1.0, 3, kernels=kernels)
  state = penalty.init(params, params)
  assert max_importance(state) == 0
  one = _moved(penalty, state, params, [batch], forward)
  two = _moved(penalty, one, _random_like(params, 9), [batch], forward)
  flat, unflatten = jax.flatten_util.ravel_pytree(params)

  def curvature(state):
    def value(flat):
      moved = unflatten(flat)
      return penalty.value(moved, moved, state, {}, None)

    return np.linalg.eigvalsh(jax.hessian(value)(flat))[-1]

  np.testing.assert_allclose(max_importance(one), curvature(one), rtol=1e-9)
  assert max_importance((one, {})) == max_importance(one) > 0
  assert max_importance(two) >= curvature(two) * (1 - 1e-9)
  # No bound is as low that leaves a task out.
  assert curvature(two) > 1.01 * max(curvature(one), curvature(_second(two)))


def _second(state):
  """The state as if it had seen the second of its tasks alone."""
  kept = {key: value for key, value in state.items() if key != 'tasks'}
  return jax.tree.map(lambda x: x.at[0].set(0), kept)
