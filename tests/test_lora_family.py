"""Every low-rank tuning against weights formed by hand, in every layer."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from fmeta import adapters, losses, models, optim, tree
from fmeta.adapters.pissa import principal
from fmeta.errors import UsageError
from fmeta.learner import finetune

KEY = jax.random.key(5)
MATRICES = r'body/.*/kernel'
OPTIONS = {'rank': 2, 'also': ('head/.*',)}
TUNINGS = {
  'lora': adapters.lora(MATRICES, alpha=8.0, **OPTIONS),
  'rslora': adapters.rslora(MATRICES, alpha=8.0, **OPTIONS),
  'dora': adapters.dora(MATRICES, alpha=8.0, **OPTIONS),
  'pissa': adapters.pissa(MATRICES, **OPTIONS),
  'vera': adapters.vera(MATRICES, **OPTIONS),
}


@functools.cache
def problem():
  return toys.problem()


def constant_norm(v):
  return jax.lax.stop_gradient((v**2).sum(0, keepdims=True) ** 0.5)


def dora_kernel(w, f):
  v = w + 8 / 2 * f['lora_a'] @ f['lora_b']
  return f['dora_m'][None] / constant_norm(v) * v


def vera_kernel(w, f):
  rows, columns = w.shape
  inner = jnp.diag(f['vera_d']) @ f['vera.b'][:, :columns]
  return w + f['vera.a'][:rows] @ inner @ jnp.diag(f['vera_b'])


# W' written out, of a kernel and the leaves beside it.
BY_HAND = {
  'lora': lambda w, f: w + 8 / 2 * f['lora_a'] @ f['lora_b'],
  'rslora': lambda w, f: w + 8 / 2**0.5 * f['lora_a'] @ f['lora_b'],
  'dora': dora_kernel,
  'pissa': lambda w, f: w + f['lora_a'] @ f['lora_b'],
  'vera': vera_kernel,
}


def shaken(params):
  """Moves every added leaf, so that none is zero."""
  random = np.random.default_rng(0)
  return tree.map_with_name(
    lambda name, x: (
      x + jnp.asarray(random.normal(size=x.shape), x.dtype)
      if '.' in name
      else x
    ),
    params,
  )


def born(tuning, params):
  """Shaken `(trainable, frozen)` of a tuning."""
  trainable, frozen = tuning.init(params, KEY)
  return shaken(trainable), frozen


def loss_through(tuning, loss_fn, batch):
  def loss(trainable, frozen):
    with tuning.intercept(trainable, frozen) as params:
      return loss_fn(params, {}, batch, None)[0]

  return jax.jit(jax.value_and_grad(loss))


def assert_near(found, expected, rtol=1e-10, atol=1e-12):
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol),
    found,
    expected,
  )


def by_hand(name, trainable, frozen):
  """The merged parameters, each kernel from its leaves."""
  params = tree.combine(frozen, trainable)
  shared = {key: x for key, x in params.items() if key.startswith('vera.')}
  body = {}
  for layer, leaves in params['body'].items():
    beside = {key.partition('.')[2]: x for key, x in leaves.items()}
    kernel = BY_HAND[name](leaves['kernel'], {**beside, **shared})
    body[layer] = {'kernel': kernel, 'bias': leaves['bias']}
  return {'body': body, 'head': params['head']}


@pytest.mark.parametrize('name', TUNINGS)
def test_merged_weights_equal_those_formed_by_hand(name, x64):
  params = toys.double(problem()[1])
  split = born(TUNINGS[name], params)
  merged = TUNINGS[name].merge(*split)
  assert tree.names(merged) == tree.names(params)
  assert_near(merged, by_hand(name, *split), rtol=1e-12)


@pytest.mark.parametrize('name', ['lora', 'dora', 'vera'])
def test_values_and_gradients_equal_weights_formed_by_hand(name, x64):
  loss_fn, params, batch, _ = problem()
  params, batch = toys.double((params, batch))
  split = born(TUNINGS[name], params)

  def loss(trainable, frozen):
    x = batch['x']
    params = by_hand(name, trainable, frozen)
    for layer in params['body'].values():
      x = jnp.tanh(x @ layer['kernel'] + layer['bias'][None])
    logits = x @ params['head']['kernel'] + params['head']['bias'][None]
    return losses.softmax_cross_entropy(logits, batch)[0].mean()

  expected = jax.jit(jax.value_and_grad(loss))(*split)
  found = loss_through(TUNINGS[name], loss_fn, batch)(*split)
  assert_near(found, expected)
  assert all(np.any(g) for _, g in _named(found[1]))


def _named(values):
  return zip(tree.names(values), jax.tree.leaves(values), strict=True)


@pytest.mark.parametrize('name', TUNINGS)
def test_the_model_starts_unchanged(name):
  _, params, _, _ = problem()
  start = TUNINGS[name].merge(*TUNINGS[name].init(params, KEY))
  exact = name in ('lora', 'rslora', 'vera')
  rounding = 0.0 if exact else 1e-6  # of a ratio, of a sum of two parts
  assert_near(start, params, rtol=0, atol=rounding)


class Layers(nn.Module):
  """A table, two convolutions, a dense layer, outputs tied to the table."""

  @nn.compact
  def __call__(self, ids, *, deterministic=True):
    table = nn.Embed(97, 4, name='table')
    x = nn.Conv(5, (3, 3), 2, kernel_dilation=2, name='conv')(table(ids))
    x = nn.tanh(models.MatmulConv(6, 3, 2, name='matmul')(nn.tanh(x)))
    x = nn.Dense(4, name='dense')(x.mean((1, 2)))
    return table.attend(nn.tanh(x))


LAYERS = r'(conv|matmul|dense)/kernel|table/embedding'


@pytest.fixture(scope='module')
def layers():
  random = np.random.default_rng(1)
  batch = {
    'x': jnp.asarray(random.integers(0, 97, (3, 5, 6))),
    'label': jnp.asarray([2, 0, 96]),
  }
  module = Layers()
  params, _ = models.init(module, KEY, batch, ('x',))
  forward = models.forward(module, ('x',))
  return losses.supervised(forward, losses.softmax_cross_entropy), params, batch


def test_tables_and_convolutions_equal_their_merged_form(layers, x64):
  loss_fn, params, batch = layers
  params = toys.double(params)
  # DoRA uses all that a `Change` has: a, b and the gain.
  tuning = adapters.dora(LAYERS, rank=2)
  split = born(tuning, params)
  assert split[0]['conv']['kernel.lora_a'].shape == (3, 3, 4, 2)
  found = loss_through(tuning, loss_fn, batch)(*split)
  merged = adapters.run_merged(tuning)
  assert_near(found, loss_through(merged, loss_fn, batch)(*split))
  assert all(np.any(g) for _, g in _named(found[1]))


def _scattered(tuning, layers):
  """Shapes of the sums over looked-up rows in a gradient."""
  loss_fn, params, batch = layers
  run = loss_through(tuning, loss_fn, batch)
  program = str(jax.make_jaxpr(run)(*tuning.init(params, KEY)))
  return set(re.findall(r'f32\[(97,\d)\] = scatter-add', program))


def test_a_table_gets_no_gradient_of_its_own_size(layers):
  table = ('table/embedding',)
  assert _scattered(adapters.lora(*table, rank=2), layers) == {'97,2'}
  assert _scattered(adapters.lora_merged(*table, rank=2), layers) == {'97,4'}


def test_forward_over_reverse_equals_reverse_over_reverse(layers, x64):
  loss_fn, params, batch = layers
  tuning = adapters.lora(LAYERS, rank=2)
  trainable, frozen = born(tuning, toys.double(params))

  def loss(trainable):
    with tuning.intercept(trainable, frozen) as entered:
      return loss_fn(entered, {}, batch, None)[0]

  direction = jax.tree.map(jnp.cos, trainable)
  grad = jax.grad(loss)

  def slope(trainable):
    pairs = jax.tree.map(jnp.vdot, grad(trainable), direction)
    return sum(jax.tree.leaves(pairs))

  def both(trainable):
    return jax.jvp(grad, (trainable,), (direction,))[1], jax.grad(slope)(
      trainable
    )

  assert_near(*jax.jit(both)(trainable), rtol=1e-8, atol=1e-11)


class Refused(nn.Module):
  @nn.compact
  def __call__(self, x, train=False):
    x = nn.Conv(4, (1, 1), feature_group_count=2, name='groups')(x)
    position = nn.Embed(2, 4, name='position').embedding
    return nn.LayerNorm(name='norm')(x + position[None, :1, None])


@pytest.mark.parametrize(
  ('tuning', 'message'),
  [
    (adapters.lora('groups/kernel', rank=1), "'groups' is a convolution in gr"),
    (adapters.lora('position/.*', rank=1), "'position/embedding' .*run_merged"),
    (adapters.lora('norm/scale', rank=1), "'norm/scale' has shape .4,."),
    (adapters.dora('norm/bias', rank=1), "'norm/bias' has shape .4,."),
    (adapters.pissa('norm/.*', rank=1), "pissa needs .* 'norm/bias'"),
    (adapters.vera('groups/kernel', rank=1), "vera needs .* 'groups/kernel'"),
    (adapters.dora('groups/kernel', rank=9), 'rank 9 .* possible: 1..2'),
    (adapters.pissa(rank=1), 'no pattern'),
  ],
  ids=[
    'grouped convolution',
    'table not looked up',
    'scale',
    'bias',
    'several',
    'vera of a convolution',
    'rank too large',
    'no pattern',
  ],
)
def test_a_wrong_place_is_refused_by_name(tuning, message):
  x = jnp.ones((2, 1, 1, 4))
  params = Refused().init(KEY, x)['params']
  with pytest.raises(UsageError, match=message):
    with tuning.intercept(*tuning.init(params, KEY)) as entered:
      Refused().apply({'params': entered}, x)


@pytest.mark.parametrize(
  'make', [adapters.lora, adapters.rslora, adapters.dora, adapters.vera]
)
def test_a_rank_below_one_is_refused(make):
  with pytest.raises(UsageError, match='rank 0; give at least 1'):
    make('.*/kernel', rank=0)


def test_factors_born_in_part_are_refused():
  _, params, _, _ = problem()
  of_lora = adapters.lora_init(params, KEY, (MATRICES,), 2)
  with pytest.raises(UsageError, match="no '.dora_m'"):
    TUNINGS['dora'].init(of_lora, KEY)
  of_vera = adapters.vera_init(params, KEY, (MATRICES,), 2)
  del of_vera['vera.b']
  with pytest.raises(UsageError, match="without 'vera.b'"):
    TUNINGS['vera'].init(of_vera, KEY)


@pytest.mark.parametrize('shape', [(6, 5), (3, 2, 2, 9)])
def test_the_principal_part_is_the_best_of_its_rank(shape):
  kernel = jax.random.normal(KEY, shape)
  a, b = principal(kernel, 3)
  matrix = np.asarray(kernel).reshape(-1, shape[-1])
  values = np.linalg.svd(matrix, compute_uv=False)
  rest = np.asarray(kernel - a @ b).reshape(matrix.shape)
  # Eckart-Young: what remains has the remaining singular values.
  np.testing.assert_allclose(
    np.linalg.svd(rest, compute_uv=False)[: len(values) - 3],
    values[3:],
    rtol=1e-5,
  )
  # Balanced: A'A = BB' = the singular values.
  np.testing.assert_allclose(b @ b.T, np.diag(values[:3]), atol=1e-5)


def test_a_trained_pissa_is_a_lora_of_the_original_weights():
  _, params, _, _ = problem()
  pissa = adapters.pissa(MATRICES, rank=2)
  start, frozen = pissa.init(params, KEY)
  trained = shaken(start)
  exported = adapters.pissa_to_lora(params, start, trained)
  lora = adapters.lora(rank=4, alpha=4.0)
  assert_near(
    lora.merge(*lora.init(exported, KEY)),
    pissa.merge(trained, frozen),
    rtol=1e-5,
    atol=1e-6,
  )
  with pytest.raises(UsageError, match='one PiSSA run'):
    adapters.pissa_to_lora(params, {}, trained)


def test_vera_trains_two_vectors_and_shares_the_matrices():
  _, params, _, _ = problem()
  vera = adapters.vera(MATRICES, rank=7)
  trainable, frozen = vera.init(params, KEY)
  assert tree.size(trainable) == (7 + 5) + (7 + 4)
  assert frozen['vera.a'].shape == (6, 7) and frozen['vera.b'].shape == (7, 5)
  assert 0.9 < np.abs(frozen['vera.a']).max() <= 1  # sqrt(6 / 6)


class Lookup(nn.Module):
  @nn.compact
  def __call__(self, ids, *, deterministic):
    return nn.Embed(97, 4, name='table')(ids)


def test_a_table_starts_from_zero_rows_and_keeps_those_unseen():
  lora = adapters.lora('table/embedding', rank=2)
  forward = models.forward(Lookup(), ('ids',))
  loss_fn = losses.supervised(forward, losses.squared_error)
  learner = finetune(loss_fn, optim.sgd(0.1), tuning=lora)
  state = learner.init({'table': {'embedding': jnp.ones((97, 4))}}, KEY)
  a = state.trainable['table']['embedding.lora_a']
  assert not np.any(a) and np.any(state.trainable['table']['embedding.lora_b'])
  batch = {'ids': jnp.asarray([3, 8]), 'target': jnp.zeros((2, 4))}
  after, _ = learner.step(state, batch, KEY)
  moved = np.any(after.trainable['table']['embedding.lora_a'] != a, -1)
  assert np.flatnonzero(moved).tolist() == [3, 8]


def test_lora_plus_moves_b_sixteen_times_as_fast():
  params = problem()[1]
  trainable, _ = TUNINGS['lora'].init(params, KEY)
  rates = adapters.lora_plus(rates=(('head/.*', 0.5), ('.*', 1.0)))
  sgd = optim.sgd(0.1, multipliers=rates)
  ones = jax.tree.map(jnp.ones_like, trainable)
  updates, _ = sgd.update(ones, sgd.init(trainable), trainable)
  for name, update in _named(updates):
    ratio = 16.0 if name.endswith('lora_b') else 0.5 if 'head' in name else 1.0
    np.testing.assert_allclose(update, -0.1 * ratio, rtol=1e-6)
