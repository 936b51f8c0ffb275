"""What every data set here shares: raw files, TFDS records, columns.

A data set is a TFDS builder (`Dataset`) that turns raw files into rows, and a
`load` function that gives columns per split. TensorFlow is not needed: the
records are array_record files, read by random access.

Two folders, kept apart:

- `data_dir` holds raw copies (`DIR/<file>` or `DIR/<dataset>/<file>`) and is
  only read. Default: `$FMETA_DATA_DIR`. Without it files are downloaded.
- `cache_dir` holds what is written: records and downloads. Default:
  `$FMETA_CACHE_DIR`, else `~/.cache/fmeta/tfds`.
"""

import contextlib
import hashlib
import io
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar, NamedTuple

import numpy as np
import requests
import tensorflow_datasets as tfds
from tensorflow_datasets.core.download.checksums import UrlInfo
from tensorflow_datasets.core.utils import Size

from fmeta.errors import UsageError

Columns = dict[str, np.ndarray]
PathLike = str | os.PathLike[str]


class RawFile(NamedTuple):
  """A file as its publisher serves it.

  Attributes:
    url: where it is downloaded from.
    size: its number of bytes.
    sha256: of its bytes.
  """

  url: str
  size: int
  sha256: str


class Dataset(tfds.core.GeneratorBasedBuilder):
  """A TFDS builder that needs no TensorFlow; subclass it in one short file.

  A subclass sets `VERSION`, `FEATURES` and, where there are raw files, `RAW`
  (name -> `RawFile`), and defines `rows`. Columns get the dtypes of
  `FEATURES`; text becomes `str`.

  Args:
    data_dir: folder with raw copies, or None.
    cache_dir: folder for records and downloads, or None for the default.
  """

  VERSION = tfds.core.Version('1.0.0')
  FEATURES: ClassVar[Mapping[str, Any]] = {}
  RAW: ClassVar[Mapping[str, RawFile]] = {}

  def __init_subclass__(cls, **kwargs):
    # Unregistered: TFDS has builders of the same names that need TensorFlow.
    super().__init_subclass__(skip_registration=True, **kwargs)
    cls.url_infos = {
      raw.url: UrlInfo(Size(raw.size), raw.sha256, name)
      for name, raw in cls.RAW.items()
    }

  def __init__(
    self, data_dir: PathLike | None = None, cache_dir: PathLike | None = None
  ):
    data_dir = data_dir or os.environ.get('FMETA_DATA_DIR')
    self._raw_dir = pathlib.Path(data_dir).expanduser() if data_dir else None
    # Also when records of an earlier load would do: it is not what was asked.
    for name in self.RAW:
      find(self._raw_dir, self.name, name)
    super().__init__(data_dir=cache_folder(cache_dir))

  def rows(
    self, files: Mapping[str, pathlib.Path]
  ) -> Mapping[str, Iterable[Mapping[str, Any]]]:
    """Split name -> its examples, in order, given the raw files' paths."""
    raise NotImplementedError('a Dataset defines `rows`')

  def check_local(self, name: str, path: pathlib.Path) -> None:
    """Refuses a local copy that is not the file `RAW` describes."""
    check_sha256(path, self.RAW[name].sha256)

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
      builder=self,
      description=type(self).__doc__,
      features=tfds.features.FeaturesDict(dict(self.FEATURES)),
      disable_shuffling=True,
    )

  def _split_generators(self, dl_manager):
    files = {name: self._raw(name, dl_manager) for name in self.RAW}
    return {name: enumerate(rows) for name, rows in self.rows(files).items()}

  def _generate_examples(self):
    raise NotImplementedError('a Dataset defines `rows`')

  def _raw(self, name: str, dl_manager) -> pathlib.Path:
    """The verified local copy of a raw file, else a download of it."""
    path = find(self._raw_dir, self.name, name)
    if path is not None:
      self.check_local(name, path)
      return path
    try:
      # One try of our own: TFDS asks an unreachable host for 200 s.
      requests.head(self.RAW[name].url, timeout=20)
      return pathlib.Path(dl_manager.download(self.RAW[name].url))
    except (OSError, tfds.download.DownloadError) as error:
      looked = f'not in {self._raw_dir} and ' if self._raw_dir else ''
      raise UsageError(
        f'{self.name}: {name} is {looked}not to be had from '
        f'{self.RAW[name].url} ({type(error).__name__}); put a copy into a '
        'folder and give it as --data_dir=FOLDER'
      ) from error


def cache_folder(cache_dir: PathLike | None = None) -> pathlib.Path:
  """The folder that prepared records and downloads go to."""
  chosen = cache_dir or os.environ.get('FMETA_CACHE_DIR')
  return pathlib.Path(chosen or '~/.cache/fmeta/tfds').expanduser()


def find(
  data_dir: pathlib.Path | None, dataset: str, name: str
) -> pathlib.Path | None:
  """`data_dir/name` or `data_dir/dataset/name`, whichever exists."""
  if data_dir is None:
    return None
  if not data_dir.is_dir():
    raise UsageError(
      f'data_dir {str(data_dir)!r} is no folder; give the folder that holds '
      f'{name} or {dataset}/{name}'
    )
  for path in (data_dir / name, data_dir / dataset / name):
    if path.exists():
      return path
  return None


def check_sha256(path: pathlib.Path, expected: str) -> None:
  """Refuses a file whose bytes are not the recorded ones."""
  with path.open('rb') as file:
    actual = hashlib.file_digest(file, 'sha256').hexdigest()
  if actual != expected:
    raise UsageError(
      f'{path} has sha256 {actual}, expected {expected}; replace it with the '
      'original file'
    )


def prepare(builder: Dataset) -> None:
  """Writes the records, unless they are there already.

  Raises:
    UsageError: if a raw file is missing or altered, or the cache folder
      cannot be written.
  """
  if builder.data_path.exists():
    return
  folder = pathlib.Path(builder.data_path)
  try:
    folder.parent.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise UsageError(
      f'cannot write {folder.parent} ({error.strerror}); set FMETA_CACHE_DIR '
      'to a folder that can be written'
    ) from error
  tfds.disable_progress_bar()
  try:
    with contextlib.redirect_stdout(io.StringIO()):  # TFDS prints banners
      builder.download_and_prepare(file_format='array_record')
  except OSError:
    # Another process may have renamed its finished copy into place first.
    if not folder.exists():
      raise


def read(builder: Dataset) -> dict[str, Columns]:
  """All splits of prepared records, as columns in row order."""
  # A fresh builder reads the split sizes that `prepare`, maybe in another
  # process, has written.
  if not builder.info.splits:
    builder.info.read_from_directory(builder.data_path)
  return {name: _columns(builder, name) for name in builder.info.splits}


def load(builder: Dataset) -> dict[str, Columns]:
  """`prepare`, then `read`: the usual body of a data set's `load`.

  The columns are kept a second time, as one file beside the records: decoding
  70,000 records one by one takes seconds, reading that file a fraction of
  one. Random access to examples (`builder.as_data_source`) uses the records.
  """
  prepare(builder)
  stored = pathlib.Path(builder.data_path) / 'columns.npz'
  if not stored.exists():
    _save_columns(stored, read(builder))
  return _load_columns(stored)


# Marks a text column in the file: its UTF-8 bytes, a NUL after every text.
_TEXT = '.text'


def _save_columns(path: pathlib.Path, splits: Mapping[str, Columns]) -> None:
  flat = {}
  for split, columns in splits.items():
    for key, column in columns.items():
      if column.dtype == object:
        joined = ''.join(f'{text}\0' for text in column).encode()
        flat[f'{split}/{key}{_TEXT}'] = np.frombuffer(joined, np.uint8)
      else:
        flat[f'{split}/{key}'] = column
  # Written aside and renamed: a reader never sees half a file.
  part = path.with_name(f'columns.{os.getpid()}.npz')
  np.savez(part, **flat)
  part.replace(path)


def _load_columns(path: pathlib.Path) -> dict[str, Columns]:
  splits: dict[str, Columns] = {}
  with np.load(path) as flat:
    for name in flat.files:
      split, key = name.split('/')
      column = flat[name]
      if key.endswith(_TEXT):
        key = key.removesuffix(_TEXT)
        column = _objects(column.tobytes().decode().split('\0')[:-1])
      splits.setdefault(split, {})[key] = column
  return splits


def _columns(builder: Dataset, split: str) -> Columns:
  as_data_source: Any = builder.as_data_source
  source = as_data_source(split)
  rows = source.__getitems__(range(len(source)))
  return {
    key: _column(feature, [row[key] for row in rows])
    for key, feature in builder.FEATURES.items()
  }


def _column(feature: Any, values: list[Any]) -> np.ndarray:
  if isinstance(feature, tfds.features.Text):
    return _objects([value.decode('utf-8') for value in values])
  # Records hold 64-bit integers whatever the feature says.
  label = isinstance(feature, tfds.features.ClassLabel)
  return np.asarray(values, dtype=np.int32 if label else feature.np_dtype)


def _objects(values: list[str]) -> np.ndarray:
  column = np.empty(len(values), dtype=object)
  column[:] = values
  return column


def sha256(splits: Mapping[str, Mapping[str, np.ndarray]]) -> str:
  """Digest of splits -> columns: names, dtypes, order and every value."""
  digest = hashlib.sha256()
  for piece in _pieces(splits):
    digest.update(len(piece).to_bytes(8, 'big'))
    digest.update(piece)
  return digest.hexdigest()


def _pieces(splits: Mapping[str, Mapping[str, np.ndarray]]) -> Iterator[bytes]:
  for split in sorted(splits):
    for name in sorted(splits[split]):
      column = splits[split][name]
      yield f'{split}/{name}/{column.dtype.str}/{column.shape}'.encode()
      if column.dtype == object:
        yield from (str(value).encode() for value in column)
      else:
        yield np.ascontiguousarray(column).tobytes()
