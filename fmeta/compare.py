"""Compares two runs, or two rows of one, on the test list they share.

  python -m fmeta.compare runs/fewshot/omniglot/maml/001 \\
    runs/fewshot/omniglot/anil/001
  python -m fmeta.compare runs/docparams/001 runs/docparams/002 \\
    --rows='finetune/full,finetune/LoRA'

Without `--rows` every name that both runs have; with it the first name in the
first run against the second name in the second run (one name: in both).
Prints means, 95% intervals, the number of test examples and the paired
difference, second minus first.
"""

import argparse
import json
import pathlib
import sys
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fmeta import scores
from fmeta.errors import UsageError, suggest
from fmeta.metrics import Interval
from fmeta.scores import Scores

_USAGE = 'python -m fmeta.compare RUN RUN [--rows=NAME,NAME] [--out=FILE]'


class Compared(NamedTuple):
  """One line.

  Attributes:
    names: of the rows in the first and in the second run.
    first: mean and interval.
    second: likewise.
    difference: second minus first, paired.
    num: test examples, episodes or what else was tested.
    groups: how many are independent.
  """

  names: tuple[str, str]
  first: Interval
  second: Interval
  difference: Interval
  num: int
  groups: int


def compared(names: tuple[str, str], first: Scores, second: Scores) -> Compared:
  """Both means and their paired difference.

  Raises:
    UsageError: if they were not tested on the same list.
  """
  difference = scores.minus(second, first)
  num = np.shape(first.values)[-1]
  groups = num if first.groups is None else len(np.unique(first.groups))
  return Compared(names, first.mean, second.mean, difference, num, groups)


def pairs_of(
  first: Sequence[str], second: Sequence[str], rows: str | None
) -> list[tuple[str, str]]:
  """Which row of the first run stands against which of the second.

  Raises:
    UsageError: if a name is unknown or no name is shared.
  """
  if rows is None:
    shared = [(name, name) for name in first if name in second]
    if not shared:
      raise UsageError(
        f'the runs share no row: {", ".join(first)} and {", ".join(second)}; '
        'give --rows=NAME,NAME'
      )
    return shared
  names = [name.strip() for name in rows.split(',')]
  names = names * 2 if len(names) == 1 else names
  if len(names) != 2:
    raise UsageError(
      f'--rows={rows!r} names {len(names)} rows; give one or two'
    )
  for name, known in zip(names, (first, second), strict=True):
    if name not in known:
      raise UsageError(f'no row {name!r}{suggest(name, known, limit=12)}')
  return [(names[0], names[1])]


def _shown(interval: Interval, sign: str = '') -> str:
  # + 0.0: a mean of -1e-17 is no -0.0000.
  mean, low, high = (round(float(x), 4) + 0.0 for x in interval)
  return f'{mean:{sign}.4f} [{low:{sign}.4f}, {high:{sign}.4f}]'


def table(lines: Sequence[Compared]) -> str:
  """For the terminal; a star where the difference's interval excludes 0."""
  cells = [('row', 'first', 'second', 'second minus first', 'tests')]
  for line in lines:
    one, other = line.names
    mark = '*' if line.difference.low > 0 or line.difference.high < 0 else ''
    tests = f'{line.num:,}'
    if line.groups != line.num:
      tests += f' in {line.groups:,} groups'
    cells.append(
      (
        one if one == other else f'{one} | {other}',
        _shown(line.first),
        _shown(line.second),
        _shown(line.difference, '+') + mark,
        tests,
      )
    )
  widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
  rows = [
    '  '.join(
      f'{cell:<{width}}' for cell, width in zip(row, widths, strict=True)
    )
    for row in cells
  ]
  return '\n'.join(row.rstrip() for row in rows)


class _Parser(argparse.ArgumentParser):
  def error(self, message: str):
    """One line, where argparse would print its usage before it."""
    raise UsageError(f'{message}; usage: {_USAGE}')


def _parser() -> _Parser:
  parser = _Parser('python -m fmeta.compare', description=__doc__)
  parser.formatter_class = argparse.RawDescriptionHelpFormatter
  parser.add_argument('first', help='workdir of a run')
  parser.add_argument('second', help='workdir of a run, perhaps the same')
  parser.add_argument('--rows', help='NAME, or NAME,NAME')
  parser.add_argument('--out', help='JSON file to write the numbers to')
  return parser


def _write(path: str, lines: Sequence[Compared]) -> None:
  found = [line._asdict() for line in lines]
  try:
    pathlib.Path(path).write_text(json.dumps(found, indent=2) + '\n')
  except OSError as error:
    raise UsageError(
      f'cannot write to {path!r} ({error.strerror}); give another --out'
    ) from error


def main(argv: Sequence[str]) -> int:
  """Runs the command; returns the exit status."""
  try:
    options = _parser().parse_args(argv)
    first = scores.load(pathlib.Path(options.first))
    second = scores.load(pathlib.Path(options.second))
    lines = [
      compared(names, first[names[0]], second[names[1]])
      for names in pairs_of(list(first), list(second), options.rows)
    ]
    if options.out:
      _write(options.out, lines)
  except UsageError as error:
    print('error:', ' '.join(str(error).splitlines()), file=sys.stderr)
    return 2
  print(f'first:  {options.first}\nsecond: {options.second}\n')
  print(table(lines))
  print("\n95% intervals resample tests (groups of them) of the seeds' mean;")
  print('* the interval of the paired difference excludes zero')
  return 0


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
