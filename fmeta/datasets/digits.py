"""digits: 1,797 handwritten digits of 8x8 pixels, bundled with scikit-learn.

The file to copy for a data set of your own: say what a row holds
(`FEATURES`), where the raw files come from (`RAW`, see `mnist.py`; this one
has none), and turn them into rows. Raise `VERSION` when the rows change.
"""

import numpy as np
import tensorflow_datasets as tfds
from sklearn.datasets import load_digits

from fmeta.datasets import base

# Four fifths, by rank and not at random: neighbours in the file tend to be by
# one writer, and a random split would put each writer on both sides.
_NUM_TRAIN = 1437


class Digits(base.Dataset):
  """Handwritten digits, 8x8, 17 grey levels (Alpaydin and Kaynak, 1998)."""

  VERSION = tfds.core.Version('1.0.0')
  FEATURES = {
    'image': tfds.features.Tensor(shape=(8, 8, 1), dtype=np.float32),
    'label': tfds.features.ClassLabel(num_classes=10),
  }

  def rows(self, files):
    """The first 1,437 rows of the bundled file train, the other 360 test."""
    del files
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).reshape(-1, 8, 8, 1).astype(np.float32)
    rows = [
      {'image': image, 'label': int(label)}
      for image, label in zip(images, labels, strict=True)
    ]
    return {'train': rows[:_NUM_TRAIN], 'test': rows[_NUM_TRAIN:]}


def load(
  data_dir: base.PathLike | None = None,
  *,
  cache_dir: base.PathLike | None = None,
) -> dict[str, base.Columns]:
  """Loads digits: no network, no raw files.

  Args:
    data_dir: unused; every `load` takes it.
    cache_dir: where records are kept, see `fmeta.datasets.base`.

  Returns:
    'train' (1,437), 'test' (360) -> `image` float32 [N, 8, 8, 1] in [0, 1],
    `label` int32 [N].
  """
  return base.load(Digits(data_dir, cache_dir))
