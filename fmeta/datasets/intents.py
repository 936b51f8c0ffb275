"""Published few-shot choices among the examples of intent data sets.

BANKING77 and CLINC150 come with the same two sets of files, read from a local
copy: the 5- and 10-shot training files of Few-Shot-Intent-Detection
(https://github.com/jianguoz/Few-Shot-Intent-Detection), and the five folds of
disjoint train, validation and test intents of ProtAugment (Dopierre et al.
2021, https://arxiv.org/abs/2105.12995).
"""

import os
import pathlib

import numpy as np

from fmeta.datasets import base
from fmeta.errors import UsageError

FOLDS = (1, 2, 3, 4, 5)
SHOTS = (5, 10)
SPLITS = ('train', 'validation', 'test')


def few_shot(
  dataset: str,
  splits: dict[str, base.Columns],
  shots: int,
  data_dir: base.PathLike | None = None,
) -> base.Columns:
  """The published training set of 5 or 10 examples per intent.

  Args:
    dataset: 'banking77' or 'clinc150'.
    splits: what its `load` gave; it says which label an intent has.
    shots: 5 or 10.
    data_dir: folder with `few_shot/train_<shots>`, or with a `<dataset>/` that
      holds it. Default: `$FMETA_DATA_DIR`.

  Returns:
    The columns of `load`, intents * shots rows.

  Raises:
    UsageError: if there is no such file, or it does not fit the data set.
  """
  if shots not in SHOTS:
    raise UsageError(f'{dataset}: {shots} shots; there are files for 5 and 10')
  folder = _local(dataset, f'few_shot/train_{shots}', data_dir)
  texts, intents = (_lines(folder / name) for name in ('seq.in', 'label'))
  if len(texts) != len(intents):
    raise UsageError(
      f'{folder} has {len(texts)} texts and {len(intents)} labels; replace it '
      'with the original files'
    )
  train = splits['train']
  first = dict(zip(train['intent'], range(len(train['intent'])), strict=True))
  _check_known(folder, intents, first)
  rows = np.array([first[intent] for intent in intents])
  columns = {key: column[rows] for key, column in train.items()}
  return {**columns, 'text': np.array(texts, dtype=object)}


def episodic_folds(
  dataset: str,
  splits: dict[str, base.Columns],
  fold: int,
  data_dir: base.PathLike | None = None,
) -> dict[str, base.Columns]:
  """All examples in scope, split by the disjoint intents of one fold.

  Args:
    dataset: 'banking77' or 'clinc150'.
    splits: what its `load` gave; train, validation and test are pooled.
    fold: 1 to 5.
    data_dir: folder with `episodic/<fold>`, or with a `<dataset>/` that holds
      it. Default: `$FMETA_DATA_DIR`.

  Returns:
    'train', 'validation', 'test' -> the columns of `load`. BANKING77: 25, 25
    and 27 intents; CLINC150: 50 each.

  Raises:
    UsageError: if there is no such fold, or it does not fit the data set.
  """
  if fold not in FOLDS:
    raise UsageError(f'{dataset}: no fold {fold!r}; the folds are 1 to 5')
  folder = _local(dataset, f'episodic/{fold:02d}', data_dir)
  columns = pooled(splits)
  names = columns['intent'].astype(str)
  out, seen = {}, set()
  for split in SPLITS:
    path = folder / f'labels.{split.replace("validation", "valid")}.txt'
    intents = _lines(path)
    _check_known(path, intents, set(names.tolist()))
    if seen & set(intents):
      raise UsageError(
        f'{path} repeats {min(seen & set(intents))!r} of another split; '
        'replace the fold with the original files'
      )
    seen |= set(intents)
    chosen = np.isin(names, intents)
    out[split] = {key: column[chosen] for key, column in columns.items()}
  return out


def pooled(splits: dict[str, base.Columns]) -> base.Columns:
  """All examples in scope: train, validation (if any) and test in a row."""
  return {
    key: np.concatenate([splits[s][key] for s in SPLITS if s in splits])
    for key in splits['train']
  }


def _lines(path: pathlib.Path) -> list[str]:
  if not path.is_file():
    raise UsageError(f'{path} is missing; copy the original file there')
  return path.read_text('utf-8').splitlines()


def _check_known(path, intents, known) -> None:
  strange = [intent for intent in intents if intent not in known]
  if strange:
    raise UsageError(
      f'{path} names {strange[0]!r}, which no example has; replace it with '
      'the original file'
    )


def _local(
  dataset: str, name: str, data_dir: base.PathLike | None
) -> pathlib.Path:
  data_dir = data_dir or os.environ.get('FMETA_DATA_DIR')
  path = base.find(
    pathlib.Path(data_dir).expanduser() if data_dir else None, dataset, name
  )
  if path is None:
    raise UsageError(
      f'{dataset}: {name} is not in {data_dir or "any local copy"}; give the '
      'folder that holds it as --data_dir=FOLDER'
    )
  return path
