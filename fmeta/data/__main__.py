"""Looks at a data set before anything is trained on it.

  python -m fmeta.data report clinc150 --data_dir=DIR --out=look
  python -m fmeta.data report train=a.csv test=b.csv --text=body --label=kind

writes report.html, report.json and PNGs into a folder and prints a table.
The first form takes a data set of ours; the second one CSV, TSV or JSONL file
per split. Columns may be numbers from 0 where a file has no line of names.
"""

import argparse
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from fmeta.data import duplicates, reading
from fmeta.data.reading import Source
from fmeta.errors import UsageError, suggest

_USAGE = 'python -m fmeta.data report NAME|SPLIT=FILE... [--out=DIR] [--help]'


class _Parser(argparse.ArgumentParser):
  def error(self, message: str):
    """One line, where argparse would print its usage before it."""
    raise UsageError(f'{message}; usage: {_USAGE}')


def _parser() -> _Parser:
  parser = _Parser('python -m fmeta.data', description=__doc__)
  parser.formatter_class = argparse.RawDescriptionHelpFormatter
  parser.add_argument('command', choices=['report'])
  parser.add_argument('data', nargs='+', help='a name, or SPLIT=FILE ...')
  add = parser.add_argument
  add('--out', default='data_report', help='folder to write to')
  add('--data_dir', help='raw files of a named data set')
  add('--text', help='column of texts (default: text)')
  add('--label', help='column of labels (default: label)')
  add('--group', help='column of groups that must not be split')
  add('--reference', help='split to compare with (default: train)')
  add(
    '--threshold',
    type=float,
    default=duplicates.TEXT_THRESHOLD,
    help='least Jaccard similarity of near-duplicate texts',
  )
  add('--folds', type=int, default=5, help='0: no search for label errors')
  add('--seed', type=int, default=0, help='of the folds')
  add('--features', help='.npy [rows of all splits, D] to judge labels by')
  add(
    '--model',
    help='folder, wheel:<module> or hub:<name>: its tokenizer '
    'counts lengths, its embeddings judge labels',
  )
  add('--tokenizer', help='folder with a tokenizer.json, to count tokens')
  return parser


def _source(options: argparse.Namespace) -> Source:
  given = options.data
  columns = {
    key: getattr(options, key)
    for key in ('text', 'label', 'group')
    if getattr(options, key) is not None
  }
  if len(given) > 1 or '=' in given[0]:
    if options.data_dir:
      raise UsageError('--data_dir is for a named data set; give paths alone')
    return reading.from_files(_files(given), **columns)
  if given[0] not in reading.NAMED:
    raise UsageError(
      f'no data set {given[0]!r}{suggest(given[0], reading.NAMED)}, or give '
      'SPLIT=FILE'
    )
  if columns:
    raise UsageError(
      f'{given[0]} knows its columns; leave out --{next(iter(columns))}'
    )
  return reading.NAMED[given[0]](options.data_dir)


def _files(given: Sequence[str]) -> dict[str, str]:
  files = {}
  for item in given:
    split, equals, path = item.partition('=')
    if not (split and equals and path) or split in files:
      raise UsageError(f'{item!r} is not a new SPLIT=FILE; usage: {_USAGE}')
    files[split] = path
  return files


def _judged_by(source: Source, options: argparse.Namespace) -> dict[str, Any]:
  """Features instead of TF-IDF or pixels, and what they are."""
  if options.features:
    try:
      features = np.load(options.features)
    except (OSError, ValueError) as error:
      raise UsageError(
        f'{options.features} is no readable .npy file; save an array with '
        'numpy.save'
      ) from error
    what = pathlib.Path(options.features).name
    return {'features': features, 'features_are': f'the features of {what}'}
  if not options.model:
    return {}
  from fmeta.data import checks, embedding

  texts = checks.pooled(source.splits, 'text')
  return {
    'features': embedding.embed(options.model, texts),
    'features_are': f'embeddings by {options.model}',
  }


def _tokenizer(source: Source, options: argparse.Namespace) -> Any:
  given = options.tokenizer or options.model
  if not given:
    return None
  if source.kind != 'text':
    raise UsageError(f'{given} reads texts, and {source.name} holds images')
  from fmeta import pretrained, text

  return text.load_tokenizer(options.tokenizer or pretrained.find(given))


def _folder(name: str) -> pathlib.Path:
  """Made before the work, not after it."""
  folder = pathlib.Path(name)
  try:
    folder.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise UsageError(
      f'cannot write to {name!r} ({error.strerror}); give another --out'
    ) from error
  return folder


def _report(options: argparse.Namespace) -> None:
  from fmeta.data import findings, page, report

  source, folder = _source(options), _folder(options.out)
  settings = report.Options(
    options.reference,
    options.threshold,
    options.folds,
    options.seed,
    _tokenizer(source, options),
    **_judged_by(source, options),
  )
  numbers = report.measure(source, settings)
  written = page.write(folder, source, numbers)
  print(findings.terminal(numbers))
  print(f'\nwritten: {written[0]}')


def main(argv: Sequence[str]) -> int:
  """Runs one command; returns the exit status."""
  try:
    _report(_parser().parse_args(argv))
  except UsageError as error:
    print('error:', ' '.join(str(error).splitlines()), file=sys.stderr)
    return 2
  return 0


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
