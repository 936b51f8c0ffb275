"""The ResNets of CIFAR-10 (He et al. 2016), with their names in blocks.

https://arxiv.org/abs/1512.03385, section 4.2: a 3x3 convolution, three stages
of n basic blocks with 16, 32 and 64 filters, the mean over space, a linear
head; depth 6 n + 2. Shortcuts have no parameters (option A). The names are
`body/stem/...`, `body/stage_<1..3>/block_<k>/...` and `head/...`.

Convolutions are XLA's own: `MatmulConv` is for second derivatives. With 16
channels, 50 images and a 3x3 kernel, value and both gradients take 19 ms of
CPU against 54 ms, with 64 channels 6 ms against 10 ms. Inside a loop XLA's are
20 times slower on CPU: a step of ResNet-20 on 50 images takes 7.2 s of CPU in
a scan and 0.35 s outside (jax 0.10.2, 2026-11-24). Train them with
`fit(..., program=train.Unrolled(learner))`.
"""

import jax.numpy as jnp
from flax import linen as nn

from fmeta.errors import UsageError
from fmeta.types import Array

STAGES = (1, 2, 3)


def conv(filters: int, stride: int, name: str) -> nn.Conv:
  """A 3x3 convolution without bias, initialised as by He et al. (2015)."""
  # One pixel on each side, as published: SAME would pad a stride of 2 unevenly.
  return nn.Conv(
    filters,
    (3, 3),
    (stride, stride),
    padding=((1, 1), (1, 1)),
    use_bias=False,
    kernel_init=nn.initializers.he_normal(),
    name=name,
  )


def norm(deterministic: bool, name: str) -> nn.BatchNorm:
  """Batch normalisation with the constants of the published weights."""
  return nn.BatchNorm(
    use_running_average=deterministic, momentum=0.9, epsilon=1e-5, name=name
  )


def shortcut(x: Array, filters: int, stride: int) -> Array:
  """Option A: every `stride`-th pixel, new channels zero on both sides."""
  missing = filters - x.shape[-1]
  sides = (missing // 2, missing - missing // 2)
  x = x[:, ::stride, ::stride]
  return jnp.pad(x, ((0, 0), (0, 0), (0, 0), sides))


class Stem(nn.Module):
  """Convolution, norm, relu."""

  filters: int

  @nn.compact
  def __call__(self, x: Array, deterministic: bool) -> Array:
    """[B, H, W, C] -> [B, H, W, filters]."""
    x = conv(self.filters, 1, 'conv')(x)
    return nn.relu(norm(deterministic, 'norm')(x))


class Block(nn.Module):
  """Two convolutions and a shortcut: relu(shortcut(x) + f(x))."""

  filters: int
  stride: int

  @nn.compact
  def __call__(self, x: Array, deterministic: bool) -> Array:
    """[B, H, W, C] -> [B, ceil(H / stride), ceil(W / stride), filters]."""
    y = conv(self.filters, self.stride, 'conv_1')(x)
    y = nn.relu(norm(deterministic, 'norm_1')(y))
    y = conv(self.filters, 1, 'conv_2')(y)
    y = norm(deterministic, 'norm_2')(y)
    return nn.relu(shortcut(x, self.filters, self.stride) + y)


class Stage(nn.Module):
  """Blocks of one width; the first has the stride."""

  filters: int
  stride: int
  blocks: int

  @nn.compact
  def __call__(self, x: Array, deterministic: bool) -> Array:
    """[B, H, W, C] -> [B, ceil(H / stride), ceil(W / stride), filters]."""
    for k in range(self.blocks):
      stride = self.stride if k == 0 else 1
      x = Block(self.filters, stride, name=f'block_{k}')(x, deterministic)
    return x


class Body(nn.Module):
  """The stem and three stages, then the mean over space."""

  blocks: int
  width: int

  @nn.compact
  def __call__(self, x: Array, deterministic: bool) -> Array:
    """[B, H, W, C] -> [B, 4 * width]."""
    x = Stem(self.width, name='stem')(x, deterministic)
    for stage in STAGES:
      filters, stride = self.width * 2 ** (stage - 1), 1 if stage == 1 else 2
      x = Stage(filters, stride, self.blocks, name=f'stage_{stage}')(
        x, deterministic
      )
    return x.mean((1, 2))


class ResNet(nn.Module):
  """A CIFAR ResNet; logits of images in [0, 1].

  Attributes:
    depth: 6 n + 2; 20, 32, 44, 56 and 110 are the paper's.
    num_classes: of the head; None: no head, calls return features.
    width: filters of the first stage; 16 in the paper.
    mean: subtracted from each channel.
    std: each channel is divided by it.
  """

  depth: int = 20
  num_classes: int | None = 10
  width: int = 16
  mean: tuple[float, ...] = (0.0, 0.0, 0.0)
  std: tuple[float, ...] = (1.0, 1.0, 1.0)

  def __post_init__(self):
    super().__post_init__()
    if self.depth < 8 or self.depth % 6 != 2:
      raise UsageError(
        f'depth={self.depth}; a CIFAR ResNet has 6 n + 2 layers: 8, 14, 20, ...'
      )

  @nn.compact
  def __call__(self, image: Array, *, deterministic: bool = True) -> Array:
    """[B, H, W, 3] in [0, 1] -> logits [B, num_classes] or [B, 4 * width]."""
    shape = (1, 1, 1, -1)
    mean = jnp.asarray(self.mean, image.dtype).reshape(shape)
    std = jnp.asarray(self.std, image.dtype).reshape(shape)
    body = Body((self.depth - 2) // 6, self.width, name='body')
    x = body((image - mean) / std, deterministic)
    if self.num_classes is None:
      return x
    return nn.Dense(self.num_classes, name='head')(x)
