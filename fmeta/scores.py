"""Scores of single test examples or episodes, kept beside `result.json`.

A mean and its interval cannot be compared with another run's: both runs saw
the same test list, so what one found hard the other did, too. `scores.npz`
keeps what a paired difference needs; `python -m fmeta.compare` reads it.
"""

import pathlib
import zipfile
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from fmeta import metrics
from fmeta.errors import UsageError

SCORES = 'scores.npz'


class Scores(NamedTuple):
  """A method's scores on a test list.

  Attributes:
    values: [N], or [seeds, N]: 1 for a right answer, an episode's accuracy, an
      error; any number whose mean is the result.
    tested_on: names the list of N, such as a fingerprint of its examples; two
      scores are paired only if it is the same.
    groups: [N], examples that are not independent (a file, a speaker) share
      one; None: each its own.
  """

  values: np.ndarray
  tested_on: str
  groups: np.ndarray | None = None

  @property
  def mean(self) -> metrics.Interval:
    """Mean over seeds and N; 95% bootstrap over N or groups."""
    return metrics.bootstrap_ci(self.values, self.groups)


def minus(first: Scores, second: Scores) -> metrics.Interval:
  """Paired difference of the means of the same test list.

  Raises:
    UsageError: if they were not tested on the same list.
  """
  sizes = [np.shape(scores.values)[-1] for scores in (first, second)]
  if first.tested_on != second.tested_on or sizes[0] != sizes[1]:
    one, other = _apart(first.tested_on, second.tested_on)
    raise UsageError(
      f'tested on {one!r} ({sizes[0]} tests) and on {other!r} ({sizes[1]} '
      'tests); a paired difference needs one list: test both on the same data '
      'with the same settings of the test, or choose rows with --rows'
    )
  return metrics.paired_bootstrap(first.values, second.values, first.groups)


def _apart(first: str, second: str) -> tuple[str, str]:
  """Names of two lists without the fingerprint that both begin with."""
  start, _, rest = first.partition(', ')
  other_start, _, other = second.partition(', ')
  shared = start == other_start and rest and other
  return (rest, other) if shared else (first, second)


def save(folder: pathlib.Path, scores: Mapping[str, Scores]) -> None:
  """Writes `scores.npz`: per name its values, list and groups."""
  arrays = {}
  for name, (values, tested_on, groups) in scores.items():
    arrays[f'{name}:values'] = np.asarray(values)
    arrays[f'{name}:tested_on'] = np.array(tested_on)
    if groups is not None:
      # Numbers: an array of strings would pad each to the longest.
      arrays[f'{name}:groups'] = np.unique(groups, return_inverse=True)[1]
  partial = folder / f'{SCORES}.tmp'
  with partial.open('wb') as file:
    np.savez_compressed(file, allow_pickle=False, **arrays)
  partial.replace(folder / SCORES)


def load(folder: pathlib.Path) -> dict[str, Scores]:
  """Reads what `save` wrote.

  Raises:
    UsageError: if the folder is no run, or a run without scores.
  """
  path = folder / SCORES
  if not folder.is_dir():
    raise UsageError(f'no run at {str(folder)!r}; give the workdir of a run')
  if not path.exists():
    raise UsageError(
      f'{str(folder)!r} has no {SCORES}; its experiment keeps no scores of '
      'single examples, or the run has not ended'
    )
  try:
    with np.load(path) as file:
      arrays = {key: file[key] for key in file.files}
  except (OSError, ValueError, zipfile.BadZipFile) as error:
    raise UsageError(f'{path} is no readable {SCORES}: {error}') from error
  names = [key.removesuffix(':values') for key in arrays if ':values' in key]
  return {
    name: Scores(
      arrays[f'{name}:values'],
      str(arrays[f'{name}:tested_on']),
      arrays.get(f'{name}:groups'),
    )
    for name in names
  }
