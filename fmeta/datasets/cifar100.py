"""cifar100: colour images of 32x32 pixels in a hundred classes.

Krizhevsky 2009, "Learning multiple layers of features from tiny images", in
the two forms of `fmeta.datasets.cifar`: the publisher's
`cifar-100-binary.tar.gz` with all 50,000 + 10,000 images (its sha256 is the
one that TFDS records), or a local folder of mosaics, which may hold a subset.
The labels are the fine ones, in the order of their names.
"""

import numpy as np
import tensorflow_datasets as tfds

from fmeta.datasets import base, cifar

NUM_CLASSES = 100
_TAR = 'cifar-100-binary.tar.gz'
_LABELS = 2  # of a row: one of twenty groups, then one of a hundred classes


class Cifar100(base.Dataset):
  """CIFAR-100, from the publisher's binary form (no pickle)."""

  VERSION = tfds.core.Version('1.0.0')
  FEATURES = {
    'image': tfds.features.Tensor(
      shape=(cifar.SIDE, cifar.SIDE, 3),
      dtype=np.uint8,
      encoding=tfds.features.Encoding.BYTES,
    ),
    'label': tfds.features.ClassLabel(num_classes=NUM_CLASSES),
  }
  RAW = {
    _TAR: base.RawFile(
      f'https://www.cs.toronto.edu/~kriz/{_TAR}',
      168513733,
      '58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec',
    )
  }

  def rows(self, files):
    """One file of training images, one of test images."""
    return {
      name: cifar.binary_rows(
        files[_TAR], [f'cifar-100-binary/{name}.bin'], _LABELS
      )
      for name in ('train', 'test')
    }


def load(
  data_dir: base.PathLike | None = None,
  *,
  cache_dir: base.PathLike | None = None,
) -> dict[str, base.Columns]:
  """Loads CIFAR-100, or the part of it that a folder of mosaics holds.

  Args:
    data_dir: folder with the mosaics or the tar file, or with a `cifar100/`
      that holds them; without either the tar file is downloaded.
    cache_dir: where records are kept, see `fmeta.datasets.base`.

  Returns:
    'train', 'test' -> `image` float32 [N, 32, 32, 3] in [0, 1], `label`
    int32 [N].

  Raises:
    UsageError: if a file is altered, or neither there nor to be downloaded.
  """
  return cifar.load_either(Cifar100, data_dir, cache_dir)
