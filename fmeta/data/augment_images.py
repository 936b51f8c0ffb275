"""Random changes of one image, and `images` to apply them to a batch.

Each factory gives `(image [H, W, C], key) -> image` of the same shape: pure,
under `jit` and `vmap`. Sizes of arrays are static; rates and strengths may be
traced. Random crops and flips are the augmentation of He et al. (2016,
https://arxiv.org/abs/1512.03385, section 4.2).

  augment = images(crop(4), flip(), cutout(8))
  learner = finetune(augmented(loss, augment), optimizer)
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from fmeta.data.augment import Augment
from fmeta.errors import UsageError
from fmeta.types import Array, Scalar

Change = Callable[[Array, Array], Array]


def images(*changes: Change, column: str = 'image') -> Augment:
  """All changes, one after the other, with a key for every example.

  Args:
    *changes: factories' results, in order.
    column: of the batch, [B, H, W, C].
  """

  def change(image, key):
    for index, each in enumerate(changes):
      image = each(image, jax.random.fold_in(key, index))
    return image

  def augment(batch, key):
    if column not in batch:
      raise UsageError(
        f'no column {column!r} to augment; the batch has {sorted(batch)}'
      )
    keys = jax.random.split(key, len(batch[column]))
    return {**batch, column: jax.vmap(change)(batch[column], keys)}

  return augment


def crop(padding: int, mode: str = 'constant') -> Change:
  """A window of the image's own size, from the image padded on all sides.

  Args:
    padding: pixels on each side (4 for CIFAR: He et al. 2016), static.
    mode: of `jnp.pad`: 'constant' pads zeros, 'reflect' mirrors.
  """
  if padding < 0:
    raise UsageError(f'padding {padding} is negative; give 0 or more pixels')

  def change(image, key):
    sides = [(padding, padding), (padding, padding), (0, 0)]
    padded = jnp.pad(image, sides, mode=mode)
    row, col = jax.random.randint(key, (2,), 0, 2 * padding + 1)
    return jax.lax.dynamic_slice(padded, (row, col, 0), image.shape)

  return change


def flip(rate: Scalar = 0.5) -> Change:
  """Left and right exchanged, with probability `rate`."""

  def change(image, key):
    return jnp.where(jax.random.bernoulli(key, rate), image[:, ::-1], image)

  return change


def rotate90(rate: Scalar = 0.75) -> Change:
  """A quarter, half or three-quarter turn, alike, with probability `rate`.

  At 3/4, the default, the four orientations are equally frequent.
  """

  def change(image, key):
    if image.shape[0] != image.shape[1]:
      raise UsageError(
        f'an image of shape {image.shape} turned by 90 degrees has another '
        'one; give square images'
      )
    first, second = jax.random.split(key)
    turns = jax.random.randint(first, (), 1, 4)
    turns = jnp.where(jax.random.bernoulli(second, rate), turns, 0)
    turned = jnp.stack([jnp.rot90(image, k) for k in range(4)])
    return jnp.take(turned, turns, axis=0)

  return change


def cutout(size: Scalar, fill: Scalar = 0.0) -> Change:
  """A square of side `size` around a random pixel, filled.

  Part of it may lie outside, as in the paper (DeVries and Taylor 2017,
  https://arxiv.org/abs/1708.04552, section 3.2; 16 pixels for CIFAR-10).

  Args:
    size: of the side, in pixels; may be traced.
    fill: the value inside.
  """

  def change(image, key):
    height, width, _ = image.shape
    row_key, col_key = jax.random.split(key)
    row = jax.random.randint(row_key, (), 0, height)
    col = jax.random.randint(col_key, (), 0, width)
    rows = _within(jnp.arange(height), row, size)[:, None, None]
    cols = _within(jnp.arange(width), col, size)[None, :, None]
    return jnp.where(rows & cols, jnp.asarray(fill, image.dtype), image)

  return change


def _within(places: Array, centre: Array, size: Scalar) -> Array:
  """The `size` places from centre - size // 2 on."""
  start = centre - jnp.asarray(size) // 2
  return (places >= start) & (places < start + size)


def brightness(strength: Scalar) -> Change:
  """Adds one number, uniform in [-strength, strength], to all pixels."""

  def change(image, key):
    shift = jax.random.uniform(key, (), image.dtype, -1.0, 1.0)
    return image + shift * jnp.asarray(strength, image.dtype)

  return change


def contrast(strength: Scalar) -> Change:
  """Scales the distance to the mean by a factor in [1 - s, 1 + s], uniform."""

  def change(image, key):
    factor = jax.random.uniform(key, (), image.dtype, -1.0, 1.0)
    factor = 1 + factor * jnp.asarray(strength, image.dtype)
    mean = image.mean()
    return mean + factor * (image - mean)

  return change
