"""Corruptions of images in [0, 1], each at five severities.

Constants are those of CIFAR-10-C (Hendrycks & Dietterich 2019,
https://arxiv.org/abs/1903.12261, released code). Every function takes images
[N, H, W, C], a severity 1..5 and a seed, which only noise reads.
"""

import numpy as np
import scipy.ndimage
import scipy.special
from PIL import Image

from fmeta.draw import NOISE, random_words


def gaussian_noise(image: np.ndarray, severity: int, seed: int) -> np.ndarray:
  """Adds normal noise of standard deviation 0.04 to 0.1, clipped to [0, 1]."""
  deviation = (0.04, 0.06, 0.08, 0.09, 0.10)[severity - 1]
  words = random_words(seed, NOISE, 0, image.size)
  # The middle of 2^53 cells: never 0 or 1, where the quantile is infinite.
  uniform = ((words >> np.uint64(11)).astype(np.float64) + 0.5) / 2**53
  noise = scipy.special.ndtri(uniform).reshape(image.shape)
  return np.clip(image + deviation * noise, 0, 1)


def gaussian_blur(image: np.ndarray, severity: int, seed: int = 0):
  """A Gaussian of 0.4 to 1 pixel over space."""
  width = (0.4, 0.6, 0.7, 0.8, 1.0)[severity - 1]
  return scipy.ndimage.gaussian_filter(image, (0, width, width, 0))


def contrast(image: np.ndarray, severity: int, seed: int = 0) -> np.ndarray:
  """Keeps 0.75 to 0.15 of the distance to each channel's mean."""
  kept = (0.75, 0.5, 0.4, 0.3, 0.15)[severity - 1]
  mean = image.mean((1, 2), keepdims=True)
  return np.clip((image - mean) * kept + mean, 0, 1)


def pixelate(image: np.ndarray, severity: int, seed: int = 0) -> np.ndarray:
  """Through 0.95 to 0.65 of each side and back, in 256 levels."""
  share = (0.95, 0.9, 0.85, 0.75, 0.65)[severity - 1]
  planes = np.round(255 * np.moveaxis(image, 3, 1)).astype(np.uint8)
  changed = [[_coarse(plane, share) for plane in each] for each in planes]
  return np.moveaxis(np.asarray(changed, np.float32) / 255, 1, 3)


def _coarse(plane: np.ndarray, share: float) -> np.ndarray:
  height, width = (max(int(side * share), 1) for side in plane.shape)
  full = Image.fromarray(plane)
  small = full.resize((width, height), Image.Resampling.BOX)
  return np.asarray(small.resize(full.size, Image.Resampling.NEAREST))


CORRUPTIONS = {
  'gaussian_noise': gaussian_noise,
  'gaussian_blur': gaussian_blur,
  'contrast': contrast,
  'pixelate': pixelate,
}
