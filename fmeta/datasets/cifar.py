"""cifar10: colour images of 32x32 pixels in ten classes.

Krizhevsky 2009, "Learning multiple layers of features from tiny images". Two
forms are read:

- the publisher's `cifar-10-binary.tar.gz`, all 50,000 + 10,000 images, a local
  copy or a download; its sha256 is the one that TFDS records;
- a local folder of mosaics: `train.webp` and `test.webp`, lossless, tiles of
  32x32 pixels, row-major, 100 columns, and beside each a JSON file
  `{"labels": [...]}`. It may hold a subset.
"""

import json
import os
import pathlib
import tarfile
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image, UnidentifiedImageError

from fmeta.datasets import base
from fmeta.errors import UsageError

CLASSES = (
  'airplane',
  'automobile',
  'bird',
  'cat',
  'deer',
  'dog',
  'frog',
  'horse',
  'ship',
  'truck',
)
SIDE = 32
_TAR = 'cifar-10-binary.tar.gz'
PLANES = 3 * SIDE * SIDE  # red, green and blue, after the labels of a row
_COLUMNS = 100


class Cifar10(base.Dataset):
  """CIFAR-10, from the publisher's binary form (no pickle)."""

  VERSION = tfds.core.Version('1.0.0')
  FEATURES = {
    'image': tfds.features.Tensor(
      shape=(SIDE, SIDE, 3),
      dtype=np.uint8,
      encoding=tfds.features.Encoding.BYTES,
    ),
    'label': tfds.features.ClassLabel(num_classes=10),
  }
  RAW = {
    _TAR: base.RawFile(
      f'https://www.cs.toronto.edu/~kriz/{_TAR}',
      170052171,
      'c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd',
    )
  }

  def rows(self, files):
    """Five files of training images, one of test images."""
    folder = 'cifar-10-batches-bin'
    train = [f'{folder}/data_batch_{k}.bin' for k in range(1, 6)]
    return {
      'train': binary_rows(files[_TAR], train),
      'test': binary_rows(files[_TAR], [f'{folder}/test_batch.bin']),
    }


def binary_rows(
  path: pathlib.Path, names: list[str], labels: int = 1
) -> Iterator[dict[str, Any]]:
  """The images of some members of a tar file, see `read_binary`."""
  with tarfile.open(path) as archive:
    for name in names:
      member = archive.extractfile(name)
      assert member is not None  # The checksum has been compared.
      images, found = read_binary(member.read(), labels)
      for image, label in zip(images, found, strict=True):
        yield {'image': image, 'label': int(label)}


def read_binary(raw: bytes, labels: int = 1) -> tuple[np.ndarray, np.ndarray]:
  """Decodes rows of label bytes and three planes of 32x32 bytes.

  Args:
    raw: the rows.
    labels: label bytes of a row; the last is the finest and is taken.

  Returns:
    Images uint8 [N, 32, 32, 3] and labels uint8 [N].

  Raises:
    UsageError: if the bytes are not a whole number of rows.
  """
  size = labels + PLANES
  if not raw or len(raw) % size:
    raise UsageError(
      f'{len(raw)} bytes are no rows of {size}; fetch the tar file again'
    )
  rows = np.frombuffer(raw, np.uint8).reshape(-1, size)
  planes = rows[:, labels:].reshape(-1, 3, SIDE, SIDE)
  return planes.transpose(0, 2, 3, 1), rows[:, labels - 1]


def read_mosaic(path: pathlib.Path) -> base.Columns:
  """Images uint8 and labels int32 of `<name>.webp` and `<name>.json`.

  Raises:
    UsageError: if one of the two is missing or broken, or they do not fit.
  """
  try:
    labels = json.loads(path.with_suffix('.json').read_text())['labels']
    with Image.open(path) as opened:
      pixels = np.asarray(opened.convert('RGB'))
  except (OSError, ValueError, KeyError, UnidentifiedImageError) as error:
    raise UsageError(
      f'{path} and its labels {path.stem}.json cannot be read ({error}); copy '
      'both again'
    ) from error
  height, width = pixels.shape[:2]
  columns = min(_COLUMNS, len(labels))
  if width != columns * SIDE or height != -(-len(labels) // columns) * SIDE:
    raise UsageError(
      f'{path} has {width}x{height} pixels, but {len(labels)} labels need '
      f'{columns} tiles of {SIDE} pixels in a row; the two do not belong '
      'together'
    )
  tiles = pixels.reshape(-1, SIDE, columns, SIDE, 3).transpose(0, 2, 1, 3, 4)
  tiles = tiles.reshape(-1, SIDE, SIDE, 3)[: len(labels)]
  return {'image': tiles, 'label': np.asarray(labels, np.int32)}


def load(
  data_dir: base.PathLike | None = None,
  *,
  cache_dir: base.PathLike | None = None,
) -> dict[str, base.Columns]:
  """Loads CIFAR-10, or the part of it that a folder of mosaics holds.

  Args:
    data_dir: folder with the mosaics or the tar file, or with a `cifar10/`
      that holds them; without either the tar file is downloaded.
    cache_dir: where records are kept, see `fmeta.datasets.base`.

  Returns:
    'train', 'test' -> `image` float32 [N, 32, 32, 3] in [0, 1], `label`
    int32 [N].

  Raises:
    UsageError: if a file is altered, or neither there nor to be downloaded.
  """
  return load_either(Cifar10, data_dir, cache_dir)


def load_either(
  builder_of: type[base.Dataset],
  data_dir: base.PathLike | None,
  cache_dir: base.PathLike | None,
) -> dict[str, base.Columns]:
  """A folder of mosaics if there is one, else what a builder makes.

  Args:
    builder_of: `(data_dir, cache_dir) -> builder`; the mosaics' folder has
      its name.
    data_dir: as for `load`.
    cache_dir: as for `load`.
  """
  given = data_dir or os.environ.get('FMETA_DATA_DIR')
  folder = pathlib.Path(given).expanduser() if given else None
  mosaic = base.find(folder, builder_of.name, 'train.webp')
  if mosaic is not None:
    splits = {
      name: read_mosaic(mosaic.with_name(f'{name}.webp'))
      for name in ('train', 'test')
    }
  else:
    splits = base.load(builder_of(data_dir, cache_dir))
  for columns in splits.values():
    columns['image'] = columns['image'].astype(np.float32) / 255
  return splits
