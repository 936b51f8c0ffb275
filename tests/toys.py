"""Tiny smooth models and batches that the tests of the core share."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from fmeta import losses


class Body(nn.Module):
  sizes: tuple[int, ...]
  dropout: float

  @nn.compact
  def __call__(self, x, train):
    for k, size in enumerate(self.sizes):
      x = nn.tanh(nn.Dense(size, name=f'layer_{k}')(x))
      x = nn.Dropout(self.dropout)(x, not train)
    return x


class Net(nn.Module):
  """body/layer_<k>/{kernel,bias} and head/{kernel,bias}, tanh."""

  sizes: tuple[int, ...] = (5, 4)
  classes: int = 3
  dropout: float = 0.0

  @nn.compact
  def __call__(self, x, train=False):
    x = Body(self.sizes, self.dropout, name='body')(x, train)
    return nn.Dense(self.classes, name='head')(x)


class NormNet(nn.Module):
  """A BatchNorm between two dense layers; `spelling`: how train is told."""

  spelling: str = 'keyword'
  affine: bool = True

  @nn.compact
  def __call__(self, x, train=False):
    return nn.Dense(3, name='head')(
      Normed(self.spelling, self.affine, name='body')(x, train)
    )


class Normed(nn.Module):
  spelling: str
  affine: bool

  @nn.compact
  def __call__(self, x, train):
    x = nn.Dense(4, name='layer_0')(x)
    options = {
      'use_bias': self.affine,
      'use_scale': self.affine,
      'momentum': 0.5,
      'name': 'norm',
    }
    if self.spelling == 'keyword':
      return nn.BatchNorm(**options)(x, use_running_average=not train)
    if self.spelling == 'positional':
      return nn.BatchNorm(**options)(x, not train)
    return nn.BatchNorm(use_running_average=not train, **options)(x)


def forward_of(module):
  def forward(params, model_state, batch, rng):
    variables = {'params': params, **model_state}
    if rng is None:
      return module.apply(variables, batch['x']), model_state
    return module.apply(
      variables,
      batch['x'],
      train=True,
      rngs={'dropout': rng},
      mutable=list(model_state),
    )

  return forward


def init_of(module, features=6, seed=0):
  variables = jax.jit(module.init)(
    jax.random.key(seed), jnp.zeros((2, features), jnp.float32)
  )
  variables = dict(jax.tree.map(jnp.asarray, variables))
  return variables.pop('params'), variables


def batch_of(rows=8, features=6, classes=3, seed=0, weight=None):
  random = np.random.default_rng(seed)
  batch = {
    'x': random.normal(size=(rows, features)).astype(np.float32),
    'label': random.integers(0, classes, rows).astype(np.int32),
  }
  if weight is not None:
    batch['weight'] = np.asarray(weight, np.float32)
  return jax.tree.map(jnp.asarray, batch)


def problem(dropout=0.0, **options):
  """`(loss_fn, params, batch, forward)` of a small classifier."""
  module = Net(dropout=dropout, **options)
  forward = forward_of(module)
  loss_fn = losses.supervised(forward, losses.softmax_cross_entropy)
  return loss_fn, init_of(module)[0], batch_of(), forward


def double(values):
  def one(x):
    x = jnp.asarray(x)
    return x.astype('float64') if jnp.issubdtype(x.dtype, jnp.floating) else x

  return jax.tree.map(one, values)


def three_layers(params, model_state, batch, rng):
  """A `Forward` of three kernels, no linen: cheap to trace and compile."""
  hidden = jnp.tanh(batch['x'] @ params['body']['layer_0']['kernel'])
  hidden = jnp.tanh(hidden @ params['body']['layer_1']['kernel'])
  return hidden @ params['head']['kernel'], model_state


def three_kernels(seed=0):
  random = np.random.default_rng(seed)

  def kernel(*shape):
    return {'kernel': jnp.asarray(random.normal(0, 0.5, shape), jnp.float32)}

  body = {'layer_0': kernel(6, 5), 'layer_1': kernel(5, 4)}
  return {'body': body, 'head': kernel(4, 3)}
