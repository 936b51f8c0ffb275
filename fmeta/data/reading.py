"""Labelled examples by split, from a data set of ours or a user's files."""

import csv
import json
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from fmeta.errors import UsageError, suggest


class Source(NamedTuple):
  """A data set to look at.

  Attributes:
    name: shown as the title.
    splits: name -> columns: `text` object [N] or `image` [N, H, W, C],
      `label` int32 [N], and perhaps `group` object [N].
    classes: name of each label.
  """

  name: str
  splits: dict[str, dict[str, np.ndarray]]
  classes: tuple[str, ...]

  @property
  def kind(self) -> str:
    """'text' or 'image'."""
    return 'text' if 'text' in next(iter(self.splits.values())) else 'image'

  @property
  def grouped(self) -> bool:
    """Whether examples have groups."""
    return 'group' in next(iter(self.splits.values()))


def _docparams(data_dir: str | None) -> Source:
  from fmeta.datasets import docparams
  from fmeta.datasets.docparams.declared import LABELS

  splits = docparams.load(data_dir)
  return _kept('docparams', splits, 'text', tuple(LABELS), 'file')


def _banking77(data_dir: str | None) -> Source:
  from fmeta.datasets import banking77

  return _intents('banking77', banking77.load(data_dir))


def _clinc150(data_dir: str | None) -> Source:
  from fmeta.datasets import clinc150

  return _intents('clinc150', clinc150.load(data_dir))


def _intents(name: str, splits: Mapping[str, Mapping[str, Any]]) -> Source:
  names = {}
  for columns in splits.values():
    names.update(zip(columns['label'].tolist(), columns['intent'], strict=True))
  return _kept(name, splits, 'text', tuple(names[k] for k in sorted(names)))


def _digits(data_dir: str | None) -> Source:
  from fmeta.datasets import digits

  return _kept('digits', digits.load(data_dir), 'image', tuple('0123456789'))


def _mnist(data_dir: str | None) -> Source:
  from fmeta.datasets import mnist

  return _kept('mnist', mnist.load(data_dir), 'image', tuple('0123456789'))


def _omniglot(data_dir: str | None) -> Source:
  from fmeta.datasets import omniglot

  splits = omniglot.load(data_dir)
  count = sum(omniglot.NUM_CHARACTERS.values())
  classes = tuple(f'character {k}' for k in range(count))
  return _kept('omniglot', splits, 'image', classes, 'alphabet')


def _sst2(data_dir: str | None) -> Source:
  from fmeta.datasets import sst2

  return _kept('sst2', sst2.load(data_dir), 'text', sst2.LABELS)


def _trec(data_dir: str | None) -> Source:
  from fmeta.datasets import trec

  return _kept('trec', trec.load(data_dir), 'text', trec.LABELS)


# Data sets that need no more than their name.
NAMED: Mapping[str, Callable[[str | None], Source]] = {
  'banking77': _banking77,
  'clinc150': _clinc150,
  'digits': _digits,
  'docparams': _docparams,
  'mnist': _mnist,
  'omniglot': _omniglot,
  'sst2': _sst2,
  'trec': _trec,
}


def _kept(name, splits, key, classes, group=None) -> Source:
  """Only the columns that are looked at, under the names of `Source`."""
  kept = {}
  for split, columns in splits.items():
    kept[split] = {key: columns[key], 'label': columns['label']}
    if group is not None:
      kept[split]['group'] = columns[group].astype(str).astype(object)
  return Source(name, kept, classes)


def from_files(
  files: Mapping[str, str | pathlib.Path],
  text: str = 'text',
  label: str = 'label',
  group: str | None = None,
) -> Source:
  """Reads one CSV, TSV or JSONL file per split.

  A TSV file has no quotes; a CSV file may. Columns are named by the first
  line; if `text` and `label` are numbers, columns are counted from 0 and
  there is no such line. Labels are numbered in the order of their names.

  Args:
    files: split -> path; the ending says the format.
    text: the column of texts.
    label: the column of labels.
    group: the column of groups, or None.

  Raises:
    UsageError: for a missing file, column or label, or text that is not UTF-8.
  """
  wanted = {'text': text, 'label': label}
  if group is not None:
    wanted['group'] = group
  splits = {
    split: _columns(pathlib.Path(path), wanted) for split, path in files.items()
  }
  names = np.concatenate([columns['label'] for columns in splits.values()])
  classes = np.unique(names.astype(str))
  for columns in splits.values():
    codes = np.searchsorted(classes, columns['label'].astype(str))
    columns['label'] = codes.astype(np.int32)
  title = ', '.join(pathlib.Path(path).name for path in files.values())
  return Source(title, splits, tuple(map(str, classes)))


def _columns(
  path: pathlib.Path, wanted: Mapping[str, str]
) -> dict[str, np.ndarray]:
  values: dict[str, list[str]] = {key: [] for key in wanted}
  for line, row in _rows(path, all(v.isdigit() for v in wanted.values())):
    for key, name in wanted.items():
      value = row.get(name)
      if value is None:
        raise UsageError(
          f'{path} has no column {name!r} in line {line}{suggest(name, row)}'
        )
      if key != 'text' and value == '':
        raise UsageError(
          f'{path} has no {key} in line {line}; fill it in or drop the line'
        )
      values[key].append(str(value))
  if not values['text']:
    raise UsageError(f'{path} holds no examples; give at least one')
  columns = {}
  for key, found in values.items():
    columns[key] = np.empty(len(found), object)
    columns[key][:] = found
  return columns


def _rows(
  path: pathlib.Path, numbered: bool
) -> Iterator[tuple[int, dict[str, Any]]]:
  """(line number, column -> value) of a file."""
  reader = {'.csv': _separated, '.tsv': _separated, '.jsonl': _json_lines}
  if path.suffix not in reader:
    raise UsageError(
      f'{path} ends in {path.suffix!r}; give a .csv, .tsv or .jsonl file'
    )
  try:
    with path.open(encoding='utf-8', newline='') as file:
      yield from reader[path.suffix](path, file, numbered)
  except OSError as error:
    raise UsageError(f'cannot read {path} ({error.strerror})') from error
  except UnicodeDecodeError as error:
    raise UsageError(f'{path} is not UTF-8; convert it') from error


def _separated(path, file, numbered):
  style: dict[str, Any] = {'delimiter': ','}
  if path.suffix == '.tsv':
    style = {'delimiter': '\t', 'quoting': csv.QUOTE_NONE}
  csv.field_size_limit(2**31 - 1)  # the default ends at 131,072 characters
  lines = csv.reader(file, **style)
  names = None if numbered else next(lines, [])
  for row in lines:
    if not row:
      continue
    keys = names or [str(k) for k in range(len(row))]
    yield lines.line_num, dict(zip(keys, row, strict=False))


def _json_lines(path, file, numbered):
  del numbered
  for number, line in enumerate(file, 1):
    if not line.strip():
      continue
    try:
      row = json.loads(line)
    except json.JSONDecodeError as error:
      raise UsageError(
        f'{path} line {number} is not JSON ({error.msg}); give an object a line'
      ) from error
    if not isinstance(row, dict):
      raise UsageError(
        f'{path} line {number} holds a {type(row).__name__}; give an object'
      )
    yield number, row
