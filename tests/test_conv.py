"""The matrix-product convolution, batch norm and Conv4."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmeta import models, tree
from fmeta.errors import UsageError
from fmeta.models import BatchNorm, Conv4, MatmulConv, conv


@functools.cache
def compiled(module):
  return jax.jit(models.forward(module, models.IMAGE))


def images(rows=6, side=28, channels=1, seed=0):
  rng = np.random.default_rng(seed)
  shape = (rows, side, side, channels)
  return rng.normal(size=shape).astype(np.float32)


def reference(params, x, stride):
  out = jax.lax.conv_general_dilated(
    x,
    params['kernel'],
    (stride, stride),
    'SAME',
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
  )
  return out + params['bias'].reshape(1, 1, 1, -1)


@pytest.mark.parametrize(
  'size, stride, side', [(3, 2, 7), (3, 2, 4), (3, 1, 5), (4, 3, 7), (1, 2, 4)]
)
def test_matmul_conv_equals_lax_conv(size, stride, side, x64):
  module = MatmulConv(5, size, stride)
  x = images(2, side, 3).astype(np.float64)
  params = module.init(jax.random.key(0), x)['params']
  params = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), params)
  params['bias'] += 0.3

  def ours(params, x):
    return module.apply({'params': params}, x)

  def theirs(params, x):
    return reference(params, x, stride)

  expected = theirs(params, x)
  assert ours(params, x).shape == expected.shape
  np.testing.assert_allclose(ours(params, x), expected, atol=1e-12)
  weights = np.random.default_rng(1).normal(size=expected.shape)

  def grads(fun):
    def total(*args):
      return (jnp.sin(fun(*args)) * weights).sum()

    return jax.jit(jax.grad(total, (0, 1)))(params, x)

  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-11),
    grads(ours),
    grads(theirs),
  )


def test_no_convolution_is_left_in_a_second_order_program():
  module = Conv4(5, 8)
  batch = {'image': images()}
  params, _ = random_variables(module, batch)

  def loss(params):
    out, _ = compiled(module)(params, {}, batch, None)
    return jnp.square(out).sum()

  def after_a_step(params):
    grads = jax.grad(loss)(params)
    return loss(jax.tree.map(lambda p, g: p - 0.1 * g, params, grads))

  text = jax.jit(jax.grad(after_a_step)).lower(params).as_text()
  assert 'dot_general' in text
  assert 'convolution' not in text


def norm_by_hand(x, mean, var, params, epsilon=1e-3):
  return (x - mean) / np.sqrt(var + epsilon) * params['scale'] + params['bias']


def test_batch_norm_uses_the_batch_in_training_and_the_kept_in_evaluation():
  module = BatchNorm(momentum=0.75)
  x = images(4, 3, 2) * 3 + 1
  params = {'scale': jnp.array([2.0, 0.5]), 'bias': jnp.array([1.0, -1.0])}
  kept = {'mean': jnp.array([0.5, 1.5]), 'var': jnp.array([4.0, 9.0])}
  variables = {'params': params, 'batch_stats': kept}
  numbers = jax.tree.map(np.asarray, (params, kept))
  mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))

  out, changed = module.apply(variables, x, False, mutable=['batch_stats'])
  expected = norm_by_hand(x, mean, var, numbers[0])
  np.testing.assert_allclose(out, expected, atol=1e-5)
  new = changed['batch_stats']
  np.testing.assert_allclose(
    new['mean'], 0.75 * kept['mean'] + 0.25 * mean, rtol=1e-5
  )
  np.testing.assert_allclose(
    new['var'], 0.75 * kept['var'] + 0.25 * var, rtol=1e-5
  )

  out = module.apply(variables, x, True)
  expected = norm_by_hand(x, *numbers[1].values(), numbers[0])
  np.testing.assert_allclose(out, expected, atol=1e-5)


def test_transductive_norm_has_no_state_and_one_behaviour():
  module = BatchNorm(transductive=True)
  x = images(4, 3, 2)
  variables = module.init(jax.random.key(0), x, True)
  assert set(variables) == {'params'}
  train, evaluation = (module.apply(variables, x, flag) for flag in (0, 1))
  np.testing.assert_array_equal(train, evaluation)
  expected = (x - x.mean((0, 1, 2))) / np.sqrt(x.var((0, 1, 2)) + 1e-3)
  np.testing.assert_allclose(train, expected, atol=1e-5)


def random_variables(module, batch):
  """By numpy: compiling jax's generators for every shape takes seconds."""
  shapes = jax.eval_shape(module.init, jax.random.key(0), **batch)
  rng = np.random.default_rng(0)
  variables = jax.tree.map(
    lambda leaf: jnp.array(rng.normal(0.0, 0.2, leaf.shape), leaf.dtype),
    shapes,
  )
  return variables.pop('params'), variables


@pytest.fixture(scope='module')
def conv4():
  batch = {'image': images()}
  module = Conv4(5, 8, norm='running')
  return module, *random_variables(module, batch), batch


def conv4_reference(params, x):
  """Conv4 from lax convolutions and numpy statistics."""
  for k in range(4):
    block = params['body'][f'block_{k}']
    x = reference(block['conv'], x, 2)
    mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
    mean, var, scale, bias = (
      leaf.reshape(1, 1, 1, -1)
      for leaf in (mean, var, block['norm']['scale'], block['norm']['bias'])
    )
    x = (x - mean) / jnp.sqrt(var + 1e-3) * scale + bias
    x = jnp.maximum(x, 0)
  assert x.shape[1:3] == (2, 2)
  head = params['head']
  return x.mean((1, 2)) @ head['kernel'] + head['bias'].reshape(1, -1)


def test_conv4_names_are_the_agreed_ones(conv4):
  _, params, state, _ = conv4
  blocks = {
    f'body/block_{k}/{leaf}'
    for k in range(4)
    for leaf in ('conv/kernel', 'conv/bias', 'norm/scale', 'norm/bias')
  }
  assert set(tree.names(params)) == blocks | {'head/kernel', 'head/bias'}
  assert params['body']['block_1']['conv']['kernel'].shape == (3, 3, 8, 8)
  assert set(state) == {'batch_stats'}


def test_the_published_conv4_has_112_thousand_body_parameters():
  shapes = jax.eval_shape(
    functools.partial(Conv4(5).init, jax.random.key(0)), images()
  )
  # 3*3*64 + 3 * 3*3*64*64 kernels, 3 * 4*64 others; the head 64*5 + 5.
  assert tree.size(shapes['params']) == 576 + 110_592 + 768 + 325


def test_conv4_equals_lax_values_and_gradients(conv4, x64):
  _, params, _, batch = conv4
  module = Conv4(5, 8)
  # Float64: relu's kinks make f32 gradients differ by more than rounding.
  params = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), params)
  batch = {'image': batch['image'].astype(np.float64)}

  def ours(params):
    return compiled(module)(params, {}, batch, None)[0]

  def theirs(params):
    return conv4_reference(params, batch['image'])

  np.testing.assert_allclose(ours(params), jax.jit(theirs)(params), atol=1e-12)
  first, second = (
    jax.jit(jax.grad(lambda p, fun=fun: jnp.sin(fun(p)).sum()))(params)
    for fun in (ours, theirs)
  )
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-10), first, second
  )


def test_evaluation_leaves_the_model_state_alone():
  module, batch = BatchNorm(), {'image': images(4, 3)}
  params, state = models.init(module, jax.random.key(0), batch, models.IMAGE)
  run = models.forward(module, models.IMAGE)
  _, after = run(params, state, batch, None)
  assert after is state
  _, trained = run(params, state, batch, jax.random.key(0))
  moved = jax.tree.map(lambda a, b: bool((a != b).any()), state, trained)
  assert jax.tree.structure(state) == jax.tree.structure(trained)
  assert all(jax.tree.leaves(moved))


def test_support_statistics_make_queries_independent(conv4):
  module, params, state, support = conv4
  run = compiled(module)
  _, state = run(params, state, support, jax.random.key(0))
  query = images(5, seed=1)
  together, _ = run(params, state, {'image': query}, None)
  alone, _ = run(params, state, {'image': query[:1]}, None)
  np.testing.assert_allclose(together[:1], alone, atol=1e-5)

  transductive = compiled(Conv4(5, 8))
  together, _ = transductive(params, {}, {'image': query}, None)
  alone, _ = transductive(params, {}, {'image': query[:1]}, None)
  assert np.abs(together[:1] - alone).max() > 1e-3


def test_support_statistics_on_the_support_are_the_transductive_outputs(conv4):
  module, params, state, support = conv4
  run = compiled(module)
  trained, state = run(params, state, support, jax.random.key(0))
  kept, _ = run(params, state, support, None)
  transductive, _ = compiled(Conv4(5, 8))(params, {}, support, None)
  np.testing.assert_allclose(trained, kept, atol=1e-5)
  np.testing.assert_allclose(trained, transductive, atol=1e-5)


def test_tasks_by_vmap_equal_tasks_one_by_one(conv4):
  module, params, state, batch = conv4
  run = compiled(module)
  key = jax.random.key(0)
  scales = jnp.array([1.0, 0.5])
  many = jax.tree.map(
    lambda leaf: jnp.stack([leaf * scale for scale in scales]), params
  )
  outs, states = jax.vmap(lambda p: run(p, state, batch, key))(many)
  for k in range(2):
    one = jax.tree.map(lambda leaf, k=k: leaf[k], many)
    out, after = run(one, state, batch, key)
    np.testing.assert_allclose(outs[k], out, atol=1e-5)
    jax.tree.map(
      lambda a, b, k=k: np.testing.assert_allclose(
        a[k], b, rtol=1e-4, atol=1e-6
      ),
      states,
      after,
    )


def test_weighted_moments_are_those_of_the_rows_that_count(x64):
  x = jnp.asarray(images(6, 3, 2).astype(np.float64))
  keep = np.array([1.0, 0, 1, 1, 0, 1])
  expected = conv.moments(x[keep > 0])
  for found, moment in zip(conv.moments(x, keep), expected, strict=True):
    np.testing.assert_allclose(found, moment, rtol=1e-12)
  # A weight of two is the row twice.
  twice = conv.moments(jnp.concatenate([x, x[:2]]))
  weighted = conv.moments(x, jnp.asarray([2.0, 2, 1, 1, 1, 1]))
  for found, moment in zip(weighted, twice, strict=True):
    np.testing.assert_allclose(found, moment, rtol=1e-12)


def test_padding_changes_nothing_in_a_masked_conv4():
  module, x = Conv4(None, 4), images(6)
  run = jax.jit(models.forward(module, ('image', 'weight')))
  params, _ = models.init(module, jax.random.key(0), {'image': x}, models.IMAGE)
  assert set(params) == {'body'}
  weight = np.array([1, 1, 0, 1, 0, 1], np.float32)
  found = run(params, {}, {'image': x, 'weight': weight}, None)[0]
  alone = {'image': x[weight > 0]}
  expected = compiled(module)(params, {}, alone, None)[0]
  assert expected.shape == (4, 4)
  np.testing.assert_allclose(found[weight > 0], expected, rtol=1e-5, atol=1e-6)
  with_them = compiled(module)(params, {}, {'image': x}, None)[0]
  assert np.abs(with_them[weight > 0] - expected).max() > 1e-2


def test_group_norm_sees_one_image_at_a_time():
  module, x = Conv4(3, 4, norm='group'), images(6)
  params, state = models.init(
    module, jax.random.key(0), {'image': x}, models.IMAGE
  )
  assert not state
  together, _ = compiled(module)(params, {}, {'image': x}, None)
  alone, _ = compiled(module)(params, {}, {'image': x[2:3]}, None)
  np.testing.assert_allclose(together[2:3], alone, rtol=1e-5, atol=1e-6)
  other = Conv4(3, 4)
  names = tree.names(
    models.init(other, jax.random.key(0), {'image': x}, models.IMAGE)[0]
  )
  assert tree.names(params) == names


def test_frozen_statistics_are_used_and_kept_in_training_too():
  running, frozen = Conv4(3, 4, norm='running'), Conv4(3, 4, norm='frozen')
  x, key = images(6), jax.random.key(1)
  params, empty = models.init(
    running, jax.random.key(0), {'image': x}, models.IMAGE
  )
  _, kept = compiled(running)(params, empty, {'image': x}, key)
  expected, _ = compiled(running)(params, kept, {'image': x[:2]}, None)
  found, after = compiled(frozen)(params, kept, {'image': x[:2]}, key)
  np.testing.assert_array_equal(found, expected)
  jax.tree.map(np.testing.assert_array_equal, kept, after)


def test_an_unknown_norm_is_refused():
  with pytest.raises(UsageError, match="norm='layer'"):
    Conv4(5, norm='layer')
