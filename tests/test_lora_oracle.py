"""The low-rank family against peft on torch: outputs and gradients."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from fmeta import adapters, models, tree

pytestmark = pytest.mark.oracle

KEY = jax.random.key(5)
TOL = 1e-10  # in float64 on both sides
KERNELS = r'body/.*/kernel'


def shaken(params):
  """Every factor moved from its start."""
  random = np.random.default_rng(0)
  return tree.map_with_name(
    lambda name, x: (
      x + jnp.asarray(random.normal(size=x.shape), x.dtype)
      if '.' in name
      else x
    ),
    params,
  )


def numpy_of(tensor):
  return tensor.detach().numpy()


def copy_(tensor, value):
  import torch

  value = torch.tensor(np.asarray(value))
  assert tensor.shape == value.shape
  with torch.no_grad():
    tensor.copy_(value)


def factors_of(layer, method):
  """A peft layer's trained tensors by the suffix of ours."""
  if method == 'vera':
    return {
      'vera_d': layer.vera_lambda_d['default'],
      'vera_b': layer.vera_lambda_b['default'],
    }
  if 'default' in layer.lora_embedding_A:
    a, b = layer.lora_embedding_A, layer.lora_embedding_B
    found = {'lora_a': a['default'], 'lora_b': b['default']}
  else:
    a, b = layer.lora_A['default'], layer.lora_B['default']
    found = {'lora_a': a.weight, 'lora_b': b.weight}
  if method == 'dora':
    found['dora_m'] = layer.lora_magnitude_vector['default'].weight
  return found


def turned(value):
  """A tensor of theirs in our order of axes: [out, in, ...] is ours' end."""
  return value.transpose(2, 3, 1, 0) if value.ndim == 4 else value.T


def copy_factors(model, net, params, places, method):
  """Ours into peft's layers; their tensors under our names."""
  model.double()
  theirs = {}
  for place, leaf in places.items():
    layer = getattr(net, place.rpartition('/')[2])
    for key, tensor in factors_of(layer, method).items():
      name = f'{place}/{leaf}.{key}'
      value = np.asarray(tree.get(params, name))
      value = value.transpose(3, 2, 0, 1) if value.ndim == 4 else value.T
      copy_(tensor, value.reshape(tensor.shape))
      theirs[name] = tensor
  return theirs


def dense_pair(method, params):
  """A torch net with the same weights under peft, and its factors by name."""
  import peft
  import torch

  net = torch.nn.Sequential()
  for name in ('layer_0', 'layer_1', 'head'):
    leaves = params['head'] if name == 'head' else params['body'][name]
    layer = torch.nn.Linear(*leaves['kernel'].shape).double()
    copy_(layer.weight, leaves['kernel'].T)
    copy_(layer.bias, leaves['bias'])
    net.add_module(name, layer)
    if name != 'head':
      net.add_module(name + '_tanh', torch.nn.Tanh())
  targets = ['layer_0', 'layer_1']
  if method == 'vera':
    config = peft.VeraConfig(r=2, target_modules=targets)
  else:
    config = peft.LoraConfig(
      r=2,
      lora_alpha=2 if method == 'pissa' else 8,
      target_modules=targets,
      use_rslora=method == 'rslora',
      use_dora=method == 'dora',
    )
  model = peft.get_peft_model(net, config)
  if method == 'vera':
    copy_(net.layer_0.vera_A['default'], params['vera.a'].T)
    copy_(net.layer_0.vera_B['default'], params['vera.b'].T)
    net.layer_0.vera_A['default'] = net.layer_0.vera_A['default'].double()
    net.layer_0.vera_B['default'] = net.layer_0.vera_B['default'].double()
  places = {f'body/{name}': 'kernel' for name in targets}
  return model, copy_factors(model, net, params, places, method)


def assert_gradients(ours, theirs):
  assert set(tree.names(ours)) == set(theirs)
  for name, tensor in theirs.items():
    found = np.asarray(tree.get(ours, name))
    expected = turned(numpy_of(tensor.grad)).reshape(found.shape)
    np.testing.assert_allclose(found, expected, rtol=TOL, atol=TOL)


TUNINGS = {
  'lora': adapters.lora(KERNELS, rank=2, alpha=8.0),
  'rslora': adapters.rslora(KERNELS, rank=2, alpha=8.0),
  'dora': adapters.dora(KERNELS, rank=2, alpha=8.0),
  'pissa': adapters.pissa(KERNELS, rank=2),
  'vera': adapters.vera(KERNELS, rank=2),
}


@pytest.mark.parametrize('method', TUNINGS)
def test_dense_layers_equal_peft(method, x64):
  import torch

  tuning = TUNINGS[method]
  params, batch = toys.double(toys.problem()[1:3])
  x = batch['x']
  trainable, frozen = tuning.init(params, KEY)
  trainable = shaken(trainable)

  def outputs(trainable):
    with tuning.intercept(trainable, frozen) as entered:
      return toys.Net().apply({'params': entered}, x)

  ours, back = jax.vjp(outputs, trainable)
  model, theirs = dense_pair(method, tree.combine(frozen, trainable))
  expected = model(torch.tensor(np.asarray(x)))
  np.testing.assert_allclose(ours, numpy_of(expected), rtol=TOL, atol=TOL)
  (expected**3).sum().backward()
  assert_gradients(back(3 * ours**2)[0], theirs)


def test_the_start_of_pissa_equals_peft():
  import peft
  import torch

  kernel = jax.random.normal(KEY, (6, 5))
  ours = adapters.pissa_init({'kernel': kernel}, KEY, ('kernel',), 2)
  net = torch.nn.Sequential()
  net.add_module('layer', torch.nn.Linear(6, 5))
  copy_(net.layer.weight, kernel.T)
  peft.get_peft_model(
    net,
    peft.LoraConfig(
      r=2, lora_alpha=2, target_modules=['layer'], init_lora_weights='pissa'
    ),
  )
  residual = numpy_of(net.layer.base_layer.weight).T
  np.testing.assert_allclose(ours['kernel'], residual, rtol=0, atol=1e-5)
  a = numpy_of(net.layer.lora_A['default'].weight).T
  b = numpy_of(net.layer.lora_B['default'].weight).T
  # A singular vector has no sign of its own.
  np.testing.assert_allclose(
    np.abs(ours['kernel.lora_a']), np.abs(a), rtol=0, atol=1e-5
  )
  np.testing.assert_allclose(
    ours['kernel.lora_a'] @ ours['kernel.lora_b'], a @ b, rtol=0, atol=1e-5
  )


class Pixels(nn.Module):
  """A table, then a convolution of both kinds."""

  @nn.compact
  def __call__(self, ids):
    x = nn.Embed(11, 4, name='table')(ids)
    x = nn.tanh(nn.Conv(5, (3, 3), name='conv')(x))
    return models.MatmulConv(6, 3, 1, name='matmul')(x)


def pixels_pair(method, params):
  import peft
  import torch

  class Net(torch.nn.Module):
    def __init__(self):
      super().__init__()
      self.table = torch.nn.Embedding(11, 4)
      self.conv = torch.nn.Conv2d(4, 5, 3, padding=1)
      self.matmul = torch.nn.Conv2d(5, 6, 3, padding=1)

    def forward(self, ids):
      x = torch.tanh(self.conv(self.table(ids).permute(0, 3, 1, 2)))
      return self.matmul(x).permute(0, 2, 3, 1)

  net = Net().double()
  targets = ['table', 'conv', 'matmul']
  copy_(net.table.weight, params['table']['embedding'])
  for name in targets[1:]:
    kernel = params[name]['kernel'].transpose(3, 2, 0, 1)
    copy_(getattr(net, name).weight, kernel)
    copy_(getattr(net, name).bias, params[name]['bias'])
  config = peft.LoraConfig(
    r=2, lora_alpha=6, target_modules=targets, use_dora=method == 'dora'
  )
  model = peft.get_peft_model(net, config)
  places = {name: 'kernel' for name in targets} | {'table': 'embedding'}
  return model, copy_factors(model, net, params, places, method)


@pytest.mark.parametrize('method', ['lora', 'dora'])
def test_tables_and_convolutions_equal_peft(method, x64):
  import torch

  make = {'lora': adapters.lora, 'dora': adapters.dora}[method]
  ids = np.random.default_rng(2).integers(0, 11, (2, 4, 5))
  tuning = make('.*/(kernel|embedding)', rank=2, alpha=6.0)
  params = toys.double(Pixels().init(KEY, jnp.asarray(ids))['params'])
  trainable, frozen = tuning.init(params, KEY)
  trainable = shaken(trainable)

  def outputs(trainable):
    with tuning.intercept(trainable, frozen) as entered:
      return Pixels().apply({'params': entered}, jnp.asarray(ids))

  ours, back = jax.vjp(outputs, trainable)
  model, theirs = pixels_pair(method, tree.combine(frozen, trainable))
  expected = model(torch.tensor(ids))
  np.testing.assert_allclose(ours, numpy_of(expected), rtol=TOL, atol=TOL)
  expected.tanh().mean().backward()
  grads = back((1 - jnp.tanh(ours) ** 2) / ours.size)[0]
  assert_gradients(grads, theirs)
