"""Fishers from layers' inputs equal those of a loop over examples."""

import dataclasses

import fisher_by_example
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from fmeta import fisher, losses, models, tree
from fmeta.fisher import diagonal, passes

KEY = jax.random.key(4)
KINDS = ('exact', 'sampled', 'empirical')
IMAGE, IDS = 'image', 'input_ids'
BERT = models.BertConfig(
  vocab_size=30,
  hidden_size=16,
  num_layers=1,
  num_heads=2,
  intermediate_size=32,
  max_positions=12,
)


class Parts(nn.Module):
  """Layers in every way that a program can use a leaf."""

  @nn.compact
  def __call__(self, ids, *, deterministic=True):
    table = nn.Embed(9, 6, name='table')
    x = table(ids)
    clipped = self.param('clipped', nn.initializers.normal(1.0), (4, 6), 'f')
    x = x + jnp.take(clipped, ids, axis=0, mode='clip')
    x = nn.DenseGeneral((2, 3), name='split')(x)
    x = nn.DenseGeneral(6, axis=(-2, -1), name='join')(x)
    same = nn.Dense(6, name='same')
    x = same(jnp.tanh(same(x)))
    x = nn.Conv(4, (3,), 2, padding=((2, 1),), name='strided')(x)
    options = {'kernel_dilation': (2,), 'input_dilation': (2,)}
    x = nn.Conv(8, (2,), padding=((1, 0),), name='dilated', **options)(x)
    x = nn.Conv(8, (2,), feature_group_count=4, name='grouped')(x)
    left = self.param('left', nn.initializers.normal(1.0), (8, 8), 'f')
    x = jnp.einsum('oi,bti->obt', left, x).transpose(1, 2, 0)
    loop = self.param('loop', nn.initializers.normal(1.0), (8, 8), 'f')

    def step(hidden, x):
      return jnp.tanh(hidden @ loop + x), None

    x, _ = jax.lax.scan(step, jnp.zeros_like(x[:, 0]), x.swapaxes(0, 1))
    shift = self.param('shift', nn.initializers.normal(1.0), (1, 8, 3), 'f')
    return (
      jnp.tanh(x) @ shift.reshape(8, 3) + table.attend(jnp.ones((1, 6)))[:, :3]
    )


class Convolutional(nn.Module):
  """Convolutions and norms of linen."""

  @nn.compact
  def __call__(self, x, *, deterministic=True):
    x = nn.Conv(4, (3, 2), (2, 1), padding=((2, 0), (0, 1)), name='first')(x)
    x = nn.BatchNorm(use_running_average=deterministic, name='batch')(x)
    x = nn.Conv(6, (2, 2), use_bias=False, name='second')(jnp.tanh(x))
    x = nn.GroupNorm(2, name='group')(x)
    x = nn.LayerNorm(name='layer')(jnp.tanh(x))
    return nn.Dense(3, name='head')(x.mean((1, 2)))


# name -> (module, inputs, shape of one input, leaves given to each example)
MODELS = {
  'mlp': (models.Mlp((7, 6), 3), IMAGE, (4, 1), set()),
  'conv4_group': (models.Conv4(3, 8, 'group'), IMAGE, (17, 17, 2), set()),
  'conv4_running': (models.Conv4(3, 4, 'running'), IMAGE, (9, 9, 1), set()),
  'linen': (Convolutional(), IMAGE, (6, 5, 2), set()),
  'bert': (
    models.BertClassifier(BERT, 3),
    IDS,
    (6,),
    {'body/embeddings/position/embedding', 'body/embeddings/type/embedding'},
  ),
  'parts': (
    Parts(),
    IDS,
    (7,),
    {
      'table/embedding',
      'same/kernel',
      'split/bias',
      'grouped/kernel',
      'loop',
    },
  ),
}


def _case(name, rows=4):
  module, key, shape, alone = MODELS[name]
  random = np.random.default_rng(0)
  batch = {'label': jnp.asarray(random.integers(0, 3, rows))}
  if key == IMAGE:
    batch[IMAGE] = jnp.asarray(random.normal(size=(rows, *shape)), jnp.float32)
  else:
    # Few different tokens: most come more than once in a row.
    batch[IDS] = jnp.asarray(random.integers(0, 8, (rows, *shape)))
    mask = np.ones((rows, *shape), int)
    mask[0, 4:] = 0
    batch['attention_mask'] = jnp.asarray(mask)
  inputs = models.TEXT if name == 'bert' else (key,)
  shapes = jax.eval_shape(
    lambda: models.init(module, KEY, batch, inputs),
  )

  def fill(path, x):
    # Variances are positive; elsewhere any number will do.
    values = random.normal(0, 0.5, x.shape)
    values = 1 + values**2 if path.endswith('var') else values
    return jnp.asarray(values, jnp.float32)

  params, state = (tree.map_with_name(fill, part) for part in shapes)
  return models.forward(module, inputs), params, state, batch, alone


def _fishers(module, case, weight):
  forward, params, state, batch, _ = case
  batch = {**batch, 'weight': jnp.asarray(weight)}
  return {
    kind: getattr(module, f'{kind}_fisher')(
      forward, params, params, state, [batch], KEY
    )
    for kind in KINDS
  }


def _assert_close(found, expected, rtol):
  for kind in KINDS:
    largest = max(x.max() for x in jax.tree.leaves(expected[kind]))
    for name, x, y in zip(
      tree.names(expected[kind]),
      jax.tree.leaves(found[kind]),
      jax.tree.leaves(expected[kind]),
      strict=True,
    ):
      # Relative to the leaf's largest: an entry may cancel to rounding noise,
      # and all of an attention's key bias does (it moves no probability).
      close = rtol * max(y.max(), rtol * largest)
      np.testing.assert_allclose(
        x, y, rtol=0, atol=close, err_msg=f'{kind} {name}'
      )


@pytest.mark.parametrize('name', MODELS)
def test_in_float64_it_equals_the_loop_over_examples(name, x64):
  case = _double(_case(name))
  weight = [1.0, 1.0, 0.0, 1.0]
  found = _fishers(diagonal, case, weight)
  _assert_close(found, _fishers(fisher_by_example, case, weight), 1e-12)


def _double(case):
  forward, *values, alone = case
  return (forward, *toys.double(values), alone)


@pytest.mark.parametrize('name', ['mlp', 'conv4_running', 'bert'])
def test_in_float32_it_equals_the_loop_over_examples(name):
  case = _case(name)
  found = _fishers(diagonal, case, [1.0] * 4)
  _assert_close(found, _fishers(fisher_by_example, case, [1.0] * 4), 1e-6)


@pytest.mark.parametrize('name', MODELS)
def test_kernels_and_tables_are_known_unless_used_twice(name):
  forward, params, state, batch, alone = _case(name)
  program = passes.program_of(forward, params, params, state, batch)
  heavy = {
    n
    for n, x in zip(tree.names(params), jax.tree.leaves(params), strict=True)
    if x.ndim > 1
  }
  assert heavy - set(program.uses) == alone
  assert set(program.uses) <= heavy


def test_recomputed_blocks_change_nothing(x64):
  forward, params, state, batch, _ = _double(_case('bert'))
  config = dataclasses.replace(BERT, remat=True)
  again = models.forward(models.BertClassifier(config, 3))
  found = [
    fisher.empirical_fisher(f, params, params, state, [batch], KEY)
    for f in (forward, again)
  ]
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-12), *found
  )
  program = passes.program_of(again, params, params, state, batch)
  assert 'body/layer_0/mlp/up/kernel' in program.uses


def test_model_state_moves_nothing_and_is_not_moved():
  forward, params, state, batch, _ = _case('conv4_running')
  before = jax.tree.map(np.array, state)
  one = fisher.exact_fisher(forward, params, params, state, [batch], KEY)
  jax.tree.map(np.testing.assert_array_equal, before, state)
  other = jax.tree.map(lambda x: x + 1, state)
  two = fisher.exact_fisher(forward, params, params, other, [batch], KEY)
  assert not np.allclose(one['head']['kernel'], two['head']['kernel'])


def _flops(fun, *args):
  return jax.jit(fun).lower(*args).compile().cost_analysis()['flops']


def _shapes(*values):
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), values)


# The sizes of split MNIST's and Omniglot's networks, and a small BERT.
SIZES = {
  'mlp': (models.Mlp((400, 400), 10), (28, 28, 1)),
  'cnn': (models.Conv4(5, 64, 'frozen'), (28, 28, 1)),
  'bert': (
    models.BertClassifier(
      dataclasses.replace(
        BERT,
        vocab_size=1000,
        hidden_size=64,
        intermediate_size=256,
        max_positions=64,
      ),
      10,
    ),
    (32,),
  ),
}


@pytest.mark.parametrize('labels', ['drawn', 'of_the_data'])
@pytest.mark.parametrize('name', SIZES)
def test_a_pass_costs_at_most_half_more_than_a_gradient(name, labels):
  module, shape = SIZES[name]
  inputs = models.TEXT if name == 'bert' else (IMAGE,)
  dtype = int if name == 'bert' else np.float32
  batch = {key: jnp.zeros((32, *shape), dtype) for key in inputs}
  batch['label'] = jnp.zeros(32, int)
  params, state = jax.eval_shape(
    lambda: models.init(module, KEY, batch, inputs)
  )
  forward = models.forward(module, inputs)
  loss_fn = losses.supervised(forward, losses.softmax_cross_entropy)

  # Without dropout or batch statistics, which would make a step dearer.
  def gradient(params, state, batch):
    return jax.grad(lambda p: loss_fn(p, state, batch, None)[0])(params)

  def added(params, state, batch):
    zeros = jax.tree.map(jnp.zeros_like, params)
    return diagonal.add_batch(
      getattr(fisher.labels, labels),
      forward,
      zeros,
      jnp.zeros((), jnp.int32),
      params,
      params,
      state,
      batch,
      KEY,
    )

  given = _shapes(params, state, batch)
  ratio = _flops(added, *given) / _flops(gradient, *given)
  print(f'{name}, {labels}: {ratio:.3f}')
  # At least as much: the same forward and backward pass, and the squares.
  assert 1 <= ratio <= 1.5
