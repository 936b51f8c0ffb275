"""omniglot: 1,623 handwritten characters of 50 alphabets, 20 drawers each.

Lake, Salakhutdinov and Tenenbaum (2015), Science 350. `background` has 964
characters of 30 alphabets, `evaluation` 659 of the other 20.

What is recorded. The publisher's two zip files can be had in repacked copies
with the same images, so a local copy is judged by its content: the sha256 of
all member names and PNG bytes, computed on a repacked copy whose images are
the original ones. A download is in addition compared with the sha256 that
TFDS records for the publisher's zip; that zip was not at hand when the
content digest was taken.
"""

import hashlib
import io
import pathlib
import zipfile
from collections.abc import Mapping

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from fmeta.datasets import base
from fmeta.errors import UsageError

_URL = 'https://github.com/brendenlake/omniglot/raw/master/python/'

# Split -> digest of its content, see `content_sha256` and the module's text.
_CONTENT = {
  'background': (
    '07356096b8076fcf915341f8715e94822249e2a4d5b999fd2d0f6cf9ebffebd5'
  ),
  'evaluation': (
    'f5165eb5f20d18e13c6515650b69a42a2c0507506969d410ba5e4a1c572bd542'
  ),
}


SIDE = 28  # pixels, as in every few-shot protocol since Vinyals et al. 2016
NUM_CHARACTERS = {'background': 964, 'evaluation': 659}
NUM_ALPHABETS = {'background': 30, 'evaluation': 20}


class Omniglot(base.Dataset):
  """Handwritten characters; strokes are 255, paper is 0."""

  VERSION = tfds.core.Version('1.0.0')
  RAW = {
    'images_background.zip': base.RawFile(
      _URL + 'images_background.zip',
      9464212,
      'ad41ab679c8b5d90b271ef46be6987cc81211774a695c29dcc5367b2b26ee640',
    ),
    'images_evaluation.zip': base.RawFile(
      _URL + 'images_evaluation.zip',
      6462886,
      '1f61a8f3366785b057fc117d9228e78a16e3d976c8953b2a10fcc74cf0609cee',
    ),
  }
  FEATURES = {
    'image': tfds.features.Tensor(
      shape=(SIDE, SIDE, 1),
      dtype=np.uint8,
      encoding=tfds.features.Encoding.BYTES,
    ),
    'label': tfds.features.ClassLabel(num_classes=1623),
    'alphabet': tfds.features.ClassLabel(num_classes=50),
    'drawer': tfds.features.ClassLabel(num_classes=20),
  }

  def check_local(self, name, path):
    """Leaves the judgement to the content, which `rows` compares."""

  def rows(self, files):
    """Both splits; evaluation's classes are numbered after background's."""
    background = _members(files['images_background.zip'], 'background')
    evaluation = _members(files['images_evaluation.zip'], 'evaluation')
    return {
      'background': _rows(background, 0, 0),
      'evaluation': _rows(
        evaluation, NUM_CHARACTERS['background'], NUM_ALPHABETS['background']
      ),
    }


def _members(path: pathlib.Path, split: str) -> dict[str, bytes]:
  """Member name -> PNG bytes, in sorted order, if they are the originals."""
  try:
    with zipfile.ZipFile(path) as archive:
      members = {
        name: archive.read(name)
        for name in sorted(archive.namelist())
        if name.startswith(f'images_{split}/') and name.endswith('.png')
      }
  except zipfile.BadZipFile as error:
    raise UsageError(
      f'{path} is not a whole zip file ({error}); replace it'
    ) from error
  if content_sha256(members) != _CONTENT[split]:
    raise UsageError(
      f'{path} does not hold the original images of omniglot '
      f'({len(members)} of {20 * NUM_CHARACTERS[split]} found, or altered '
      f'ones); replace it by {_URL}images_{split}.zip'
    )
  return members


def content_sha256(members: Mapping[str, bytes]) -> str:
  """Digest of names and contents, whatever container they came in."""
  digest = hashlib.sha256()
  for name in sorted(members):
    digest.update(name.encode() + b'\0')
    digest.update(hashlib.sha256(members[name]).digest())
  return digest.hexdigest()


def _rows(members: Mapping[str, bytes], first_label: int, first_alphabet: int):
  """Rows of `<split>/<alphabet>/<character>/<id>_<drawer>.png` members."""
  characters = {name.rsplit('/', 1)[0]: None for name in members}
  alphabets = {name.split('/')[1]: None for name in members}
  label = {name: first_label + i for i, name in enumerate(characters)}
  alphabet = {name: first_alphabet + i for i, name in enumerate(alphabets)}
  for name, png in members.items():
    folder, file = name.rsplit('/', 1)
    yield {
      'image': decode(png),
      'label': label[folder],
      'alphabet': alphabet[name.split('/')[1]],
      'drawer': int(file.removesuffix('.png').split('_')[1]) - 1,
    }


def decode(png: bytes) -> np.ndarray:
  """Ink per pixel, uint8 [28, 28, 1]: 255 where the whole area is stroke.

  A pixel is the mean over the area it covers. The files are bi-level, which
  Pillow resizes by nearest neighbour whatever filter is asked for, so they
  become grey first.
  """
  with Image.open(io.BytesIO(png)) as image:
    grey = image.convert('L').resize((SIDE, SIDE), Image.Resampling.BOX)
  return 255 - np.asarray(grey)[..., None]


def load(
  data_dir: base.PathLike | None = None,
  *,
  cache_dir: base.PathLike | None = None,
) -> dict[str, base.Columns]:
  """Loads Omniglot at 28x28.

  Args:
    data_dir: folder with `images_background.zip` and `images_evaluation.zip`,
      or with an `omniglot/` that holds them; else they are downloaded.
    cache_dir: where records are kept, see `fmeta.datasets.base`.

  Returns:
    'background' (19,280), 'evaluation' (13,180) -> `image` float32
    [N, 28, 28, 1] in [0, 1], strokes 1; `label` int32 [N], the character,
    0-963 and 964-1622; `alphabet` int32 [N], 0-29 and 30-49 in the order of
    their names; `drawer` int32 [N], 0-19.

  Raises:
    UsageError: if a file is altered, or neither there nor to be downloaded.
  """
  splits = base.load(Omniglot(data_dir, cache_dir))
  for columns in splits.values():
    columns['image'] = columns['image'].astype(np.float32) / 255
  return splits
