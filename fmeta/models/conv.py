"""Convolutions as matrix products, for learning through learning.

Second-order MAML differentiates a convolution twice, and per-task weights
under `vmap` turn it into a grouped one; XLA's CPU convolution is 6-8x slower
than need be on the first and far worse on the second. Windows (`windows.py`)
and one matrix product have neither problem: all their derivatives are
products, windows and sums of pads again.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from fmeta.errors import UsageError
from fmeta.models.windows import windows
from fmeta.types import Array

NORMS = ('transductive', 'running', 'frozen', 'group')
GROUPS = 8


class MatmulConv(nn.Module):
  """A SAME convolution as one matrix product; equals `lax.conv`.

  Attributes:
    features: output channels.
    size: side of the square kernel.
    stride: in both directions.
    dot_general: as `nn.Dense` has it; an adapter enters here.
  """

  features: int
  size: int = 3
  stride: int = 1
  dot_general: Any = None

  # Says that `dot_general` gets the kernel as a matrix [-1, features].
  kernel_as_matrix = True

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """[B, H, W, C] -> [B, ceil(H / stride), ceil(W / stride), features]."""
    kernel = self.param(
      'kernel',
      nn.initializers.glorot_uniform(),
      (self.size, self.size, x.shape[-1], self.features),
    )
    bias = self.param('bias', nn.initializers.zeros, (self.features,))
    patches = windows(x, self.size, self.stride)
    # One leading axis: over three of them XLA on CPU copies the gradient of
    # the outputs into transposed order before it makes the kernel's.
    product = (self.dot_general or jax.lax.dot_general)(
      patches.reshape(-1, patches.shape[-1]),
      kernel.reshape(-1, self.features),
      (((1,), (0,)), ((), ())),
    )
    product = product.reshape(*patches.shape[:-1], self.features)
    return product + bias.reshape(1, 1, 1, -1)


class BatchNorm(nn.Module):
  """Batch normalisation over all but the channels (Ioffe & Szegedy 2015).

  y = scale (x - m) / sqrt(v + epsilon) + bias. In training (m, v) are the
  batch's. In evaluation they are the batch's again if `transductive`, which
  then needs no state, and otherwise those kept in `batch_stats`, to which
  training moves as new = momentum old + (1 - momentum) batch.

  With momentum 0 the state is the statistics of the last training batch: run
  the adapted model once on a support set in training mode, and the state that
  comes back lets queries be judged one by one, not from each other.

  Attributes:
    transductive: evaluate with the statistics of the batch itself.
    momentum: of the kept statistics; 0 keeps the last batch's.
    epsilon: added to the variance; 1e-3 as in TF's layer, which cbfinn/maml
      ran with.
  """

  transductive: bool = False
  momentum: float = 0.0
  epsilon: float = 1e-3

  @nn.compact
  def __call__(
    self, x: Array, deterministic: bool, weight: Array | None = None
  ) -> Array:
    """[B, ..., C] -> the same; `weight` [B] as in `moments`."""
    channels = x.shape[-1:]
    scale = self.param('scale', nn.initializers.ones, channels)
    bias = self.param('bias', nn.initializers.zeros, channels)
    mean, var = self._statistics(x, deterministic, weight)
    factor = scale * jax.lax.rsqrt(var + self.epsilon)
    shape = (1,) * (x.ndim - 1) + channels
    y = (x - mean.reshape(shape)) * factor.reshape(shape) + bias.reshape(shape)
    # The statistics may be wider than what they normalise.
    return y.astype(jnp.promote_types(x.dtype, scale.dtype))

  def _statistics(
    self, x: Array, deterministic: bool, weight: Array | None
  ) -> tuple[Array, Array]:
    if self.transductive:
      return moments(x, weight)
    zeros, ones = nn.initializers.zeros, nn.initializers.ones
    args = (None, x.shape[-1:], jnp.promote_types(x.dtype, jnp.float32))
    mean = self.variable('batch_stats', 'mean', zeros, *args)
    var = self.variable('batch_stats', 'var', ones, *args)
    if deterministic:
      return mean.value, var.value
    batch_mean, batch_var = moments(x, weight)
    if self.is_mutable_collection('batch_stats'):
      keep = self.momentum
      mean.value = keep * mean.value + (1 - keep) * batch_mean
      var.value = keep * var.value + (1 - keep) * batch_var
    return batch_mean, batch_var


def moments(x: Array, weight: Array | None = None) -> tuple[Array, Array]:
  """Mean and biased variance over all axes but the last, in >= float32.

  Args:
    x: [B, ..., C].
    weight: [B]; rows count in proportion, padding of weight 0 not at all. All
      the same by default.
  """
  x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  axes = tuple(range(x.ndim - 1))

  def average(x):
    if weight is None:
      return x.mean(axes)
    total = weight.sum()
    share = weight / jnp.where(total > 0, total, 1)
    return jnp.tensordot(share.astype(x.dtype), x.mean(axes[1:]), 1)

  mean = average(x)
  centred = x - mean.reshape((1,) * len(axes) + mean.shape)
  return mean, average(jnp.square(centred))


class Block(nn.Module):
  """Convolution with stride 2, norm, relu."""

  filters: int
  norm: str

  @nn.compact
  def __call__(
    self, x: Array, deterministic: bool, weight: Array | None = None
  ) -> Array:
    """[B, H, W, C] -> [B, ceil(H / 2), ceil(W / 2), filters]."""
    x = MatmulConv(self.filters, stride=2, name='conv')(x)
    if self.norm == 'group':
      groups = math.gcd(self.filters, GROUPS)
      # As BatchNorm here: a second derivative divides by sqrt(var + epsilon).
      norm = nn.GroupNorm(
        groups, epsilon=1e-3, use_fast_variance=False, name='norm'
      )
      return nn.relu(norm(x))
    norm = BatchNorm(self.norm == 'transductive', name='norm')
    return nn.relu(norm(x, deterministic or self.norm == 'frozen', weight))


class Blocks(nn.Module):
  """Four blocks, then the mean over space."""

  filters: int
  norm: str

  @nn.compact
  def __call__(
    self, x: Array, deterministic: bool, weight: Array | None = None
  ) -> Array:
    """[B, H, W, C] -> [B, filters]."""
    for k in range(4):
      block = Block(self.filters, self.norm, name=f'block_{k}')
      x = block(x, deterministic, weight)
    return x.mean((1, 2))


class Conv4(nn.Module):
  """The four-block network of few-shot learning, as MAML ran it on Omniglot.

  Four times (3x3 convolution of stride 2, batch norm, relu), the mean over
  the remaining 2x2 positions, a linear head (Finn et al. 2017, app. A.1 and
  their code). Unlike that code the norm also has a scale, and both its
  parameters are adapted in the inner loop.

  Attributes:
    num_classes: of the head, the ways of an episode; None: no head, calls
      return embeddings.
    filters: of each convolution; 64 for Omniglot, 32 for miniImageNet.
    norm: 'transductive', statistics of the current batch always (the
      published protocol); 'running', evaluation with the last training
      batch's; 'frozen', with those kept in `batch_stats` always, which a
      pre-trained model brings; or 'group', each image by itself in 8 groups of
      channels (Wu & He 2018, https://arxiv.org/abs/1803.08494). The parameters
      are the same.
  """

  num_classes: int | None
  filters: int = 64
  norm: str = 'transductive'

  def __post_init__(self):
    super().__post_init__()
    if self.norm not in NORMS:
      raise UsageError(f'norm={self.norm!r}; choose one of {NORMS}')

  @nn.compact
  def __call__(
    self,
    image: Array,
    weight: Array | None = None,
    *,
    deterministic: bool = True,
  ) -> Array:
    """[B, H, W, C] -> logits [B, num_classes]; embeddings without a head.

    With `forward(model, ('image', 'weight'))` padding rows of weight 0 stay
    out of the norms' statistics.
    """
    features = Blocks(self.filters, self.norm, name='body')
    x = features(image, deterministic, weight)
    if self.num_classes is None:
      return x
    return nn.Dense(self.num_classes, name='head')(x)
