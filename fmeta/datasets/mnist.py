"""mnist: 60,000 + 10,000 handwritten digits of 28x28 pixels.

The four original gz files (LeCun, Cortes and Burges, 1998), read from a local
copy or downloaded from the mirror that TFDS uses; their sha256 are those that
TFDS records for its own `mnist`.
"""

import gzip
import pathlib

import numpy as np
import tensorflow_datasets as tfds

from fmeta.datasets import base
from fmeta.errors import UsageError

_URL = 'https://storage.googleapis.com/cvdf-datasets/mnist/'
_DTYPE_UBYTE = 0x08


def _file(name: str, size: int, sha256: str) -> tuple[str, base.RawFile]:
  return name, base.RawFile(_URL + name, size, sha256)


class Mnist(base.Dataset):
  """The MNIST handwritten digits."""

  VERSION = tfds.core.Version('1.0.0')
  FEATURES = {
    'image': tfds.features.Tensor(
      shape=(28, 28, 1), dtype=np.uint8, encoding=tfds.features.Encoding.BYTES
    ),
    'label': tfds.features.ClassLabel(num_classes=10),
  }
  RAW = dict(
    (
      _file(
        'train-images-idx3-ubyte.gz',
        9912422,
        '440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609',
      ),
      _file(
        'train-labels-idx1-ubyte.gz',
        28881,
        '3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c',
      ),
      _file(
        't10k-images-idx3-ubyte.gz',
        1648877,
        '8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6',
      ),
      _file(
        't10k-labels-idx1-ubyte.gz',
        4542,
        'f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6',
      ),
    )
  )

  def rows(self, files):
    """Images and labels in the order of the files."""
    return {
      split: self._split(
        files[f'{prefix}-images-idx3-ubyte.gz'],
        files[f'{prefix}-labels-idx1-ubyte.gz'],
      )
      for split, prefix in (('train', 'train'), ('test', 't10k'))
    }

  def _split(self, images: pathlib.Path, labels: pathlib.Path):
    pairs = zip(read_idx(images), read_idx(labels), strict=True)
    for image, label in pairs:
      yield {'image': image[..., None], 'label': int(label)}


def read_idx(path: pathlib.Path) -> np.ndarray:
  """Decodes a gzipped IDX file of unsigned bytes.

  The format: two zero bytes, a type code, the rank, the sizes as big-endian
  int32, then the values in row-major order.
  """
  with gzip.open(path) as file:
    raw = file.read()
  rank = raw[3]
  if raw[:3] != bytes((0, 0, _DTYPE_UBYTE)):
    raise UsageError(f'{path} is not an IDX file of unsigned bytes')
  shape = np.frombuffer(raw, '>i4', rank, offset=4)
  values = np.frombuffer(raw, np.uint8, offset=4 + 4 * rank)
  if values.size != np.prod(shape):
    raise UsageError(f'{path} is cut: {values.size} values for shape {shape}')
  return values.reshape(shape)


def load(
  data_dir: base.PathLike | None = None,
  *,
  cache_dir: base.PathLike | None = None,
) -> dict[str, base.Columns]:
  """Loads MNIST.

  Args:
    data_dir: folder with the four gz files, or with a `mnist/` that holds
      them; without them they are downloaded.
    cache_dir: where records are kept, see `fmeta.datasets.base`.

  Returns:
    'train' (60,000), 'test' (10,000) -> `image` float32 [N, 28, 28, 1] in
    [0, 1], `label` int32 [N].

  Raises:
    UsageError: if a file is altered, or neither there nor to be downloaded.
  """
  splits = base.load(Mnist(data_dir, cache_dir))
  for columns in splits.values():
    columns['image'] = columns['image'].astype(np.float32) / 255
  return splits
