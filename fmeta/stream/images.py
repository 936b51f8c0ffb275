"""Domains made of one set of images: permuted, rotated, corrupted.

All of them work on the host, once: what a task holds is plain columns.
"""

import math
from collections.abc import Mapping

import numpy as np
import scipy.ndimage

from fmeta.data import Columns, column
from fmeta.draw import PIXELS, permutation
from fmeta.errors import UsageError, suggest
from fmeta.stream import corruptions


def permuted(
  columns: Columns, seed: int, key: str = 'image'
) -> dict[str, np.ndarray]:
  """The same images with their pixels in one fixed random order.

  Channels of a pixel stay together. Give every split the same seed, every
  task another one (permuted MNIST, Goodfellow et al. 2013).

  Args:
    columns: `image` [N, H, W, C].
    seed: names the permutation.
    key: the column of images.

  Raises:
    UsageError: if the images are not [N, H, W, C].
  """
  image = _images(columns, key)
  num, height, width, channels = image.shape
  order = permutation(seed, PIXELS, 0, height * width)
  pixels = image.reshape(num, height * width, channels)[:, order]
  return {**columns, key: pixels.reshape(image.shape)}


def rotated(
  columns: Columns, degrees: float, key: str = 'image'
) -> dict[str, np.ndarray]:
  """The same images turned counter-clockwise about their centre.

  Bilinear interpolation with zeros outside (rotated MNIST, Lopez-Paz & Ranzato
  2017, https://arxiv.org/abs/1706.08840, where tasks have angles in [0, 180]);
  multiples of 90 degrees move pixels and are exact. Integers are rounded.

  Args:
    columns: `image` [N, H, W, C].
    degrees: the angle; 0 gives the images themselves.
    key: the column of images.

  Raises:
    UsageError: if the images are not [N, H, W, C], not square under a quarter
      turn, or the angle is not finite.
  """
  image = _images(columns, key)
  if not math.isfinite(degrees):
    raise UsageError(f'an angle of {degrees} degrees; give a finite one')
  turns, rest = divmod(degrees, 90)
  if rest:
    return {**columns, key: _turned(image, degrees)}
  if turns % 2 and image.shape[1] != image.shape[2]:
    raise UsageError(
      f'images of shape {image.shape} change it when turned by {degrees:g}'
      ' degrees; give square ones'
    )
  return {**columns, key: np.rot90(image, int(turns % 4), axes=(1, 2))}


def _turned(image: np.ndarray, degrees: float) -> np.ndarray:
  whole = image.dtype.kind in 'biu'
  values = image.astype(np.float32) if whole else image
  turned = scipy.ndimage.rotate(
    values, degrees, axes=(1, 2), reshape=False, order=1, prefilter=False
  )
  return (np.rint(turned) if whole else turned).astype(image.dtype)


def corrupted(
  columns: Columns,
  name: str,
  severity: int,
  *,
  seed: int = 0,
  key: str = 'image',
) -> dict[str, np.ndarray]:
  """The same images, each worse: a domain per corruption and severity.

  Corruptions and constants are those of CIFAR-10-C (Hendrycks & Dietterich
  2019, https://arxiv.org/abs/1903.12261, released code); `seed` draws the
  noise, another one for every image.

  Args:
    columns: `image` [N, H, W, C], floats in [0, 1] or uint8.
    name: one of `fmeta.stream.CORRUPTIONS`.
    severity: 1..5.
    seed: of the noise; give each split another one.
    key: the column of images.

  Raises:
    UsageError: an unknown corruption or severity, or other images.
  """
  image = _images(columns, key)
  known: Mapping = corruptions.CORRUPTIONS
  if name not in known:
    raise UsageError(f'no corruption {name!r}{suggest(name, known)}')
  if severity not in range(1, 6):
    raise UsageError(f'severity {severity} of {name!r}; give one of 1..5')
  byte = image.dtype == np.uint8
  values = image.astype(np.float32) / 255 if byte else image
  if values.dtype.kind != 'f' or not (0 <= values.min() <= values.max() <= 1):
    raise UsageError(
      f'column {key!r} holds {image.dtype} from {image.min()} to'
      f' {image.max()}; give floats in [0, 1] or uint8'
    )
  worse = known[name](values, severity, seed)
  worse = np.rint(255 * worse) if byte else worse
  return {**columns, key: worse.astype(image.dtype)}


def _images(columns: Columns, key: str) -> np.ndarray:
  image = column(columns, key)
  if image.ndim != 4:
    raise UsageError(f'images of shape {image.shape}; give [N, H, W, C]')
  return image
