"""Made-up characters in place of Omniglot's."""

import numpy as np

from fmeta import data
from fmeta.datasets import omniglot


def drawn_characters(num_classes=60, seed=0):
  """Omniglot's columns with noise around a picture per character."""
  rng = np.random.default_rng(seed)
  pictures = rng.random((num_classes, omniglot.SIDE, omniglot.SIDE, 1))
  label = np.repeat(np.arange(num_classes), 20)
  noise = 0.1 * rng.random((len(label), *pictures.shape[1:]))
  image = (0.9 * pictures[label] + noise).astype(np.float32)
  half = len(label) // 2
  label = label.astype(np.int32)
  columns = {'image': image, 'label': label, 'alphabet': label // 7}
  return {
    'background': data.take(columns, slice(0, half)),
    'evaluation': data.take(columns, slice(half, None)),
  }
