"""Compares the methods of finished runs over a stream of tasks.

  python -m fmeta.report runs/continual/mnist/001 --out=streams.html
  python -m fmeta.report runs/a/001 runs/a/002 --reference=ewc

writes one self-contained page, and its pictures as PNG beside it: average
accuracy, forgetting and their paired differences over seeds, cost, each task
over time, and accuracy matrices. A run is read from its
`trials/<method>/seed_<k>.json` (see `fmeta.report.runs`). Bad input is one line
on stderr and exit 2.
"""

import argparse
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from fmeta.errors import UsageError
from fmeta.report.runs import read_runs
from fmeta.report.streams import write_streams
from fmeta.result import RESULT
from fmeta.workdir import RUN, read_json

_USAGE = 'python -m fmeta.report RUN... [--reference=METHOD] [--out=FILE]'


class _Parser(argparse.ArgumentParser):
  def error(self, message: str):
    """One line, where argparse would print its usage before it."""
    raise UsageError(f'{message}; usage: {_USAGE}')


def _parser() -> _Parser:
  parser = _Parser('python -m fmeta.report', description=__doc__)
  parser.formatter_class = argparse.RawDescriptionHelpFormatter
  parser.add_argument('runs', nargs='+', help='workdirs of runs')
  parser.add_argument(
    '--reference',
    help='method to take differences from (the one of lowest accuracy)',
  )
  parser.add_argument(
    '--out', default='streams.html', help='HTML file (streams.html)'
  )
  return parser


def facts_of(folder: pathlib.Path) -> dict[str, Any]:
  """What a run's numbers depend on, as far as the run has told."""
  facts = {}
  if (folder / RUN).exists():
    facts['command'] = ' '.join(read_json(folder / RUN)['command'])
  if (folder / RESULT).exists():
    result = read_json(folder / RESULT)
    for key in ('commit', 'devices', 'data_sha256', 'versions'):
      facts[key] = result.get(key)
  return facts


def main(argv: Sequence[str]) -> int:
  """Runs the command; returns the exit status."""
  try:
    options = _parser().parse_args(argv)
    methods, tasks = read_runs(options.runs)
    facts = {
      f'{folder}: {name}': value
      for folder in options.runs
      for name, value in facts_of(pathlib.Path(folder)).items()
    }
    try:
      written = write_streams(
        options.out, methods, tasks, reference=options.reference, facts=facts
      )
    except OSError as error:
      raise UsageError(
        f'cannot write to {options.out!r} ({error.strerror}); give another'
        ' --out'
      ) from error
  except UsageError as error:
    print('error:', ' '.join(str(error).splitlines()), file=sys.stderr)
    return 2
  for path in written:
    print(path)
  return 0


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
