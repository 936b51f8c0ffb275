import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from fmeta import adapters, losses, optim, tree
from fmeta.errors import UsageError
from fmeta.learner import finetune

KEY = jax.random.key(3)
MATRICES = r'body/.*/kernel'


def _random_factors(params, rank=2):
  params = adapters.lora_init(params, KEY, (MATRICES,), rank)
  random = np.random.default_rng(0)
  return tree.map_with_name(
    lambda name, x: (
      jnp.asarray(random.normal(size=x.shape), x.dtype)
      if '.lora_' in name
      else x
    ),
    params,
  )


def _explicit(params, batch, scale):
  """The same model by hand: each adapted kernel is W + scale A B."""

  def kernel(layer):
    return (
      layer['kernel'] + scale * layer['kernel.lora_a'] @ layer['kernel.lora_b']
    )

  x = batch['x']
  for name in ('layer_0', 'layer_1'):
    layer = params['body'][name]
    x = jnp.tanh(x @ kernel(layer) + layer['bias'][None])
  return x @ params['head']['kernel'] + params['head']['bias'][None]


def test_the_three_ways_agree_in_values_and_gradients(x64):
  loss_fn, params, batch, _ = toys.problem()
  params, batch = toys.double((params, batch))
  params = _random_factors(params)

  def by_hand(trainable, frozen):
    logits = _explicit(tree.combine(frozen, trainable), batch, 8.0 / 2)
    return losses.softmax_cross_entropy(logits, batch)[0].mean()

  def through(tuning):
    trainable, frozen = tuning.init(params, KEY)

    def loss(trainable):
      with tuning.intercept(trainable, frozen) as entered:
        return loss_fn(entered, {}, batch, None)[0]

    return jax.jit(jax.value_and_grad(loss))(trainable), (trainable, frozen)

  options = {'rank': 2, 'alpha': 8.0, 'also': ('head/.*',)}
  unmerged, split = through(adapters.lora(MATRICES, **options))
  merged, _ = through(adapters.lora_merged(MATRICES, **options))
  reference = jax.jit(jax.value_and_grad(by_hand))(*split)
  for found in (unmerged, merged):
    jax.tree.map(
      lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-10, atol=1e-13),
      found,
      reference,
    )
  exported = adapters.lora(MATRICES, **options).merge(*split)
  assert tree.names(exported) == tree.names(toys.problem()[1])
  np.testing.assert_allclose(
    loss_fn(exported, {}, batch, None)[0], reference[0], rtol=1e-12
  )


def test_the_model_starts_unchanged_and_a_is_bounded():
  _, params, _, _ = toys.problem()
  lora = adapters.lora(MATRICES, rank=3)
  trainable, frozen = lora.init(params, KEY)
  jax.tree.map(
    np.testing.assert_array_equal, lora.merge(trainable, frozen), params
  )
  a = trainable['body']['layer_0']['kernel.lora_a']
  assert a.shape == (6, 3) and 0 < np.abs(a).max() <= 6**-0.5
  assert tree.names(frozen) == tree.names(params)


def test_a_factor_depends_on_its_name_and_the_key_only():
  _, params, _, _ = toys.problem()
  everything = adapters.lora_init(params, KEY, ('.*/kernel',), 2)
  one = adapters.lora_init(params, KEY, ('body/layer_1/kernel',), 2)
  name = 'body/layer_1/kernel.lora_a'
  np.testing.assert_array_equal(tree.get(everything, name), tree.get(one, name))
  other = adapters.lora_init(params, jax.random.key(4), ('.*/kernel',), 2)
  assert np.any(tree.get(everything, name) != tree.get(other, name))


def test_factors_among_the_parameters_are_used_not_born():
  _, params, _, _ = toys.problem()
  params = _random_factors(params)
  trainable, _ = adapters.lora(MATRICES, rank=2).init(params, KEY)
  name = 'body/layer_1/kernel.lora_b'
  np.testing.assert_array_equal(
    tree.get(trainable, name), tree.get(params, name)
  )


def test_alpha_may_be_traced():
  loss_fn, params, batch, _ = toys.problem()
  params = _random_factors(params)

  def loss(alpha):
    lora = adapters.lora(MATRICES, rank=2, alpha=alpha)
    learner = finetune(loss_fn, optim.sgd(0.1), tuning=lora)
    state = learner.init(params, KEY)
    state, _ = learner.step(state, batch, KEY)
    return loss_fn(learner.params(state), {}, batch, None)[0]

  slope = jax.jit(jax.grad(loss))(4.0)
  assert np.isfinite(slope) and slope != 0


@pytest.mark.parametrize(
  ('shape', 'rank', 'message'),
  [
    ((2, 6, 5), 2, 'lora needs .in, out. kernels'),
    ((6, 5), 6, 'rank 6 .* possible: 1..5'),
    ((6, 5), 0, 'rank 0'),
  ],
  ids=['scanned', 'rank too large', 'rank zero'],
)
def test_unfit_kernels_are_refused(shape, rank, message):
  params = {'layers': {'kernel': jnp.zeros(shape)}}
  with pytest.raises(UsageError, match=message):
    adapters.lora('layers/kernel', rank=rank).init(params, KEY)


def test_factors_of_another_rank_are_refused():
  _, params, _, _ = toys.problem()
  params = _random_factors(params, rank=2)
  with pytest.raises(UsageError, match='have rank 2, but .* rank=3'):
    adapters.lora(MATRICES, rank=3).init(params, KEY)


class Scanned(nn.Module):
  """Three layers in one scan: kernels [3, in, out]."""

  @nn.compact
  def __call__(self, x, train=False):
    layer = nn.scan(
      Layer, variable_axes={'params': 0}, split_rngs={'params': True}, length=3
    )
    x, _ = layer(name='layers')(x, None)
    return nn.Dense(3, name='head')(x)


class Layer(nn.Module):
  @nn.compact
  def __call__(self, x, _):
    return nn.tanh(nn.Dense(6, name='dense')(x)), None


def test_scanned_layers_are_refused():
  params, _ = toys.init_of(Scanned())
  assert params['layers']['dense']['kernel'].shape == (3, 6, 6)
  with pytest.raises(UsageError, match='unroll scanned layers'):
    adapters.lora('layers/.*/kernel').init(params, KEY)


class Odd(nn.Module):
  """A layer that is no nn.Dense, and one called by keyword."""

  @nn.compact
  def __call__(self, x, train=False):
    x = nn.DenseGeneral(5, name='general')(x)
    return nn.Dense(3, name='dense')(inputs=x)


def test_a_layer_that_is_no_dense_is_refused_unmerged_and_works_merged():
  module = Odd()
  params, _ = toys.init_of(module)
  loss_fn = losses.supervised(
    toys.forward_of(module), losses.softmax_cross_entropy
  )
  batch = toys.batch_of()

  def step(tuning):
    learner = finetune(loss_fn, optim.sgd(0.1), tuning=tuning)
    return jax.jit(learner.step)(learner.init(params, KEY), batch, KEY)

  with pytest.raises(UsageError, match="'general/kernel'.*lora_merged"):
    step(adapters.lora('general/kernel', rank=2))
  by_keyword, _ = step(adapters.lora('dense/kernel', rank=2))
  merged, aux = step(adapters.lora_merged('dense/kernel', rank=2))
  assert aux.metrics['grad_norm'] > 0
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5),
    by_keyword.trainable,
    merged.trainable,
  )


def test_a_layer_in_bfloat16_stays_in_bfloat16():
  module = nn.Dense(3, dtype=jnp.bfloat16)
  params, _ = toys.init_of(module)
  lora = adapters.lora('kernel', rank=2)
  with lora.intercept(*lora.init(params, KEY)) as entered:
    assert module.apply({'params': entered}, jnp.ones((2, 6))).dtype == (
      jnp.bfloat16
    )


def test_a_mixed_up_error_inside_the_model_is_not_hidden():
  lora = adapters.lora(MATRICES, rank=2)
  split = lora.init(toys.problem()[1], KEY)
  with pytest.raises(ZeroDivisionError), lora.intercept(*split):
    raise ZeroDivisionError


def test_a_factor_moves_its_kernel():
  assert adapters.kernel_name('body/q/kernel.lora_a') == 'body/q/kernel'
  assert adapters.kernel_name('kernel') == 'kernel'
