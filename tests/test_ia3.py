"""(IA)^3 against formulas written out."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from fmeta import adapters, tree
from fmeta.errors import UsageError

KEY = jax.random.key(3)
_, PARAMS, BATCH, FORWARD = toys.problem()
# Fresh biases are zero, and zero scaled is zero.
PARAMS = jax.tree.map(lambda x: x if x.ndim > 1 else x + 0.3, PARAMS)
OUT, INTO = 'body/layer_0/kernel', 'body/layer_1/kernel'
IA3 = adapters.ia3(OUT, inputs=(INTO,))


def drawn(seed=0):
  """Trainable leaves away from 1, and the frozen ones."""
  trainable, frozen = IA3.init(PARAMS, KEY)
  random = np.random.default_rng(seed)
  away = lambda x: jnp.asarray(random.uniform(0.5, 1.5, x.shape), x.dtype)
  return jax.tree.map(away, trainable), frozen


def through_activations(trainable, frozen, tuning=IA3, forward=FORWARD):
  with tuning.intercept(trainable, frozen) as params:
    return forward(params, {}, BATCH, None)[0]


def by_hand(trainable, frozen):
  body, head = frozen['body'], frozen['head']
  scale_out = trainable['body']['layer_0']['kernel.ia3_scale'][None]
  scale_in = trainable['body']['layer_1']['kernel.ia3_input_scale'][None]
  row = lambda layer: layer['bias'][None]
  first, second = body['layer_0'], body['layer_1']
  hidden = scale_out * (BATCH['x'] @ first['kernel'] + row(first))
  hidden = jnp.tanh(hidden) * scale_in
  hidden = jnp.tanh(hidden @ second['kernel'] + row(second))
  return hidden @ head['kernel'] + row(head)


def test_only_vectors_of_ones_are_added_and_they_change_nothing():
  trainable, frozen = IA3.init(PARAMS, KEY)
  assert tree.names(trainable) == [
    f'{OUT}.ia3_scale',
    f'{INTO}.ia3_input_scale',
  ]
  assert tree.size(trainable) == 5 + 5
  jax.tree.map(np.testing.assert_array_equal, frozen, PARAMS)
  np.testing.assert_array_equal(
    through_activations(trainable, frozen), FORWARD(PARAMS, {}, BATCH, None)[0]
  )
  jax.tree.map(
    np.testing.assert_array_equal, IA3.merge(trainable, frozen), PARAMS
  )


def test_values_and_gradients_equal_the_formula():
  split = drawn()

  def square(run):
    return jax.value_and_grad(lambda *args: jnp.sum(run(*args) ** 2))(*split)

  for ours, expected in zip(
    jax.tree.leaves(square(through_activations)),
    jax.tree.leaves(square(by_hand)),
    strict=True,
  ):
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)


def test_the_merged_model_is_the_same_function():
  split = drawn()
  merged = IA3.merge(*split)
  assert tree.names(merged) == tree.names(PARAMS)
  np.testing.assert_allclose(
    FORWARD(merged, {}, BATCH, None)[0],
    through_activations(*split),
    rtol=1e-5,
    atol=1e-6,
  )


def test_a_scaled_convolution_merges_with_its_bias():
  module = nn.Conv(4, (3, 3))
  image = jax.random.normal(KEY, (2, 5, 5, 3))
  params = module.init(KEY, image)['params']
  params['bias'] = jnp.arange(4.0)
  tuning = adapters.ia3('kernel', inputs=('kernel',), also=('bias',))
  trainable, frozen = tuning.init(params, KEY)
  assert sorted(trainable) == [
    'bias',
    'kernel.ia3_input_scale',
    'kernel.ia3_scale',
  ]
  trainable['kernel.ia3_scale'] = jnp.array([0.5, 2.0, 1.0, 3.0])
  trainable['kernel.ia3_input_scale'] = jnp.array([2.0, 0.0, 1.0])
  with tuning.intercept(trainable, frozen) as base:
    entered = module.apply({'params': base}, inputs=image)
  scale = jnp.array([2.0, 0.0, 1.0]).reshape(1, 1, 1, 3)
  plain = module.apply({'params': params}, image * scale)
  expected = plain * jnp.array([0.5, 2.0, 1.0, 3.0]).reshape(1, 1, 1, 4)
  np.testing.assert_allclose(entered, expected, rtol=1e-5, atol=1e-5)
  merged = tuning.merge(trainable, frozen)
  exported = module.apply({'params': merged}, image)
  np.testing.assert_allclose(exported, expected, rtol=1e-5, atol=1e-5)


class Stacked(nn.Module):
  """Two scanned dense layers: one kernel [2, 4, 4]."""

  @nn.compact
  def __call__(self, x):
    layers = nn.scan(
      Block, variable_axes={'params': 0}, split_rngs={'params': True}, length=2
    )
    return layers(name='layers')(x, None)[0]


class Block(nn.Module):
  @nn.compact
  def __call__(self, x, _):
    return nn.Dense(4, name='dense')(x), None


class Odd(nn.Module):
  """A kernel that is not used linearly."""

  @nn.compact
  def __call__(self, x):
    return jnp.tanh(x @ self.param('kernel', nn.initializers.ones, (6, 3)))


def test_a_place_where_a_scaling_cannot_enter_is_refused():
  with pytest.raises(UsageError, match="'head/bias' has shape"):
    adapters.ia3('head/.*').init(PARAMS, KEY)
  with pytest.raises(UsageError, match='without a pattern'):
    adapters.ia3()
  odd = Odd()
  params = odd.init(KEY, BATCH['x'])['params']
  tuning = adapters.ia3('kernel')
  with pytest.raises(UsageError, match="'kernel'.*never entered"):
    through_activations(*tuning.init(params, KEY), tuning, toys.forward_of(odd))


@pytest.mark.parametrize('make', [adapters.ia3, adapters.bottleneck])
def test_scanned_layers_are_refused(make):
  module, x = Stacked(), jnp.ones((2, 4))
  params = module.init(KEY, x)['params']
  tuning = make('layers/dense/kernel')
  forward = adapters.entering(
    lambda params, *_: (module.apply({'params': params}, x), {})
  )
  with pytest.raises(UsageError, match='unroll the layers'):
    through_activations(*tuning.init(params, KEY), tuning, forward)


def test_scalings_of_an_outer_loop_are_used_and_must_fit():
  grown = adapters.ia3_init(PARAMS, (OUT,), (INTO,))
  grown['body']['layer_0']['kernel.ia3_scale'] = jnp.full(5, 2.0)
  trainable, _ = IA3.init(grown, KEY)
  np.testing.assert_array_equal(
    trainable['body']['layer_0']['kernel.ia3_scale'], 2.0
  )
  with pytest.raises(UsageError, match='same patterns and sizes'):
    adapters.ia3(OUT).init(grown, KEY)
