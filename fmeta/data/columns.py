"""Columns: a mapping from names to numpy arrays of one leading length N."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fmeta.errors import UsageError, suggest

Columns = Mapping[str, np.ndarray]
# The key of a batch that names rows instead of holding them.
ROW = 'row'
Texts = Sequence[str] | np.ndarray  # of strings


def check_columns(columns: Columns) -> int:
  """The common length N of the columns.

  Raises:
    UsageError: if there are no columns, no rows, or lengths differ.
  """
  lengths = {name: len(column) for name, column in columns.items()}
  if not lengths:
    raise UsageError('no columns; give at least one array of examples')
  if len(set(lengths.values())) > 1:
    raise UsageError(f'columns differ in length: {lengths}; give equal ones')
  size = next(iter(lengths.values()))
  if not size:
    raise UsageError(
      f'the split is empty (columns {sorted(lengths)} have 0 rows); give at'
      ' least one example'
    )
  return size


def check_labels(labels: np.ndarray, num_classes: int) -> None:
  """Refuses labels outside [0, num_classes).

  Raises:
    UsageError: naming the first offending row.
  """
  labels = np.asarray(labels)
  wrong = np.flatnonzero((labels < 0) | (labels >= num_classes))
  if wrong.size:
    row = int(wrong[0])
    raise UsageError(
      f'label {labels[row]} of row {row} is out of range; {num_classes}'
      f' classes allow 0..{num_classes - 1}: relabel or set num_classes'
    )


def column(columns: Columns, key: str) -> np.ndarray:
  """The column of that name.

  Raises:
    UsageError: if there is none, with what there is.
  """
  if key not in columns:
    raise UsageError(f'no column {key!r}{suggest(key, columns)}')
  return np.asarray(columns[key])


def take(columns: Columns, rows: Any) -> dict[str, np.ndarray]:
  """These rows of every column; a slice gives views."""
  return {name: np.asarray(array)[rows] for name, array in columns.items()}


def numeric(columns: Columns) -> dict[str, np.ndarray]:
  """The columns that a device can hold: numbers and booleans, no strings."""
  arrays = {name: np.asarray(array) for name, array in columns.items()}
  return {k: a for k, a in arrays.items() if a.dtype.kind in 'biuf'}


def fingerprint(columns: Columns) -> str:
  """sha256 (hex) of the example stream, the same on every platform.

  Covers names, dtypes, shapes and values: columns in name order, numbers as
  little-endian C-order bytes, each string as its UTF-8 length and bytes.

  Raises:
    UsageError: for a column of neither numbers nor strings.
  """
  digest = hashlib.sha256()
  for name in sorted(columns):
    array = np.asarray(columns[name])
    text = array.dtype.kind in 'OUS'
    kind = 'str' if text else array.dtype.newbyteorder('<').str
    digest.update(f'{name}\n{kind}\n{array.shape}\n'.encode())
    if text:
      for value in array.ravel():
        digest.update(_string_bytes(name, value))
    else:
      little = array.astype(array.dtype.newbyteorder('<'), copy=False)
      digest.update(np.ascontiguousarray(little).tobytes())
  return digest.hexdigest()


def _string_bytes(name: str, value: Any) -> bytes:
  if not isinstance(value, str | bytes):
    raise UsageError(
      f'column {name!r} holds a {type(value).__name__}; give arrays of'
      ' numbers or of strings'
    )
  data = value.encode() if isinstance(value, str) else value
  return len(data).to_bytes(8, 'little') + data
