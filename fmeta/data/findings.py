"""What the numbers of `report.measure` say, in words and as a table."""

import textwrap
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

# Untuned: what is worth a line under "look at this first".
_UNEVEN = 10  # largest class over smallest
_REPEATED = 0.01  # share of rows
_UNSEEN = 0.1  # share of running words
_UNSURE = 0.5  # accuracy out of fold
_WIDTH = 100


class Finding(NamedTuple):
  """One sentence; `serious` if something may have to be mended."""

  serious: bool
  text: str


def findings(numbers: Mapping[str, Any]) -> list[Finding]:
  """Sentences about `report.measure`'s numbers, the serious ones first."""
  checks = (_across, _within, _conflicts, _labels, _balance, _groups)
  found = [f for check in checks for f in check(numbers)]
  if numbers['kind'] == 'text':
    found += [*_empty(numbers), *_unseen(numbers)]
  else:
    found += _constant(numbers)
  return sorted(found, key=lambda finding: not finding.serious)


def _noun(numbers: Mapping[str, Any]) -> str:
  return 'text' if numbers['kind'] == 'text' else 'image'


def across(numbers: Mapping[str, Any]) -> Iterator[tuple[str, str, int, int]]:
  """(split, later split, equal rows, near rows of the later split)."""
  names, found = list(numbers['splits']), numbers['copies']
  for i, first in enumerate(names):
    for j in range(i + 1, len(names)):
      yield first, names[j], int(found['equal'][i][j]), int(found['near'][i][j])


def _across(numbers):
  noun, some = _noun(numbers), False
  for first, second, equal, near in across(numbers):
    if not equal + near:
      continue
    some, size = True, numbers['splits'][second]
    counted = [f'{equal:,} of {size:,} {noun}s equal'] if equal else []
    if near:
      counted.append(
        f'{near:,} nearly equal'
        if equal
        else f'{near:,} of {size:,} {noun}s nearly equal'
      )
    share = f'{100 * (equal + near) / size:.2g}%'
    yield Finding(
      True,
      f'Leakage from {first} into {second}: {", ".join(counted)} ({share}).',
    )
  if not some and len(numbers['splits']) > 1:
    yield Finding(False, f'No {noun} stands in two splits, nearly or exactly.')


def _within(numbers):
  noun = _noun(numbers)
  for k, (name, size) in enumerate(numbers['splits'].items()):
    equal = int(numbers['copies']['equal'][k][k])
    near = int(numbers['copies']['near'][k][k])
    if equal:
      yield Finding(
        equal > _REPEATED * size,
        f'Repeated {noun}s in {name}: {equal:,} of {size:,}.',
      )
    if near:
      yield Finding(
        False,
        f'With a near-duplicate in {name} itself: {near:,} of {size:,} '
        f'{noun}s.',
      )


def _conflicts(numbers):
  found = numbers['conflicts']
  if found['values']:
    yield Finding(
      True,
      f'{_noun(numbers).capitalize()}s with conflicting labels: '
      f'{found["values"]:,} ({found["rows"]:,} rows).',
    )


def _labels(numbers):
  found = numbers['label_errors']
  if 'left_out' in found:
    yield Finding(
      False, f'Label errors were not looked for: {found["left_out"]}.'
    )
    return
  total = sum(numbers['splits'].values())
  text = (
    f'{found["count"]:,} of {total:,} labels ({found["count"] / total:.1%}) '
    f'look wrong to a model on {found["features"]} that is right in '
    f'{found["accuracy"]:.0%}.'
  )
  if found['accuracy'] < _UNSURE:
    text += ' It is too weak to be trusted.'
  yield Finding(found['count'] > 0 and found['accuracy'] >= _UNSURE, text)


def _balance(numbers):
  reference = numbers['reference']
  for name, counts in numbers['balance'].items():
    known = zip(
      numbers['classes'], counts, numbers['balance'][reference], strict=True
    )
    strange = [label for label, n, seen in known if n and not seen]
    if strange:
      yield Finding(
        True,
        f'Classes of {name} that {reference} lacks: {len(strange):,}, '
        f'{strange[0]!r} among them.',
      )
    present = [n for n in counts if n]
    if present and max(present) >= _UNEVEN * min(present):
      yield Finding(
        False,
        f'Classes of {name} are uneven: {max(present):,} rows against '
        f'{min(present):,}.',
      )


def _groups(numbers):
  if 'groups' not in numbers:
    return
  for first, second, count, some in numbers['groups']['shared']:
    yield Finding(
      True,
      f'Leakage: groups with rows in {first} and {second}: {count:,}, '
      f'{some[0]!r} among them.',
    )
  if not numbers['groups']['shared']:
    yield Finding(False, 'No group is in two splits.')


def _empty(numbers):
  for name, count in numbers['lengths']['empty'].items():
    if count:
      yield Finding(True, f'Empty texts in {name}: {count:,}.')


def _unseen(numbers):
  for name, found in numbers['unseen'].items():
    yield Finding(
      found['running'] > _UNSEEN,
      f'{found["running"]:.1%} of the words of {name} never stand in '
      f'{numbers["reference"]} ({found["distinct"]:.0%} of the distinct ones).',
    )


def _constant(numbers):
  for name, count in numbers['images']['constant'].items():
    if count:
      yield Finding(True, f'Images of one colour in {name}: {count:,}.')


def overview(numbers: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
  """(heads, a row of texts per split) of what can be counted per split."""
  text = numbers['kind'] == 'text'
  reference = numbers['reference']
  unit = numbers['lengths']['unit'] if text else 'mean intensity'
  heads = [
    'split',
    'rows',
    'classes',
    'rows per class',
    f'{unit} (median, 95%)',
  ]
  heads += ['repeats', f'equal in {reference}', f'near in {reference}']
  heads += ['unseen words'] if text else []
  heads += ['unknown tokens'] if text and _unknown(numbers) else []
  heads += ['labels in doubt']
  rows = [_cells(numbers, k, name) for k, name in enumerate(numbers['splits'])]
  # One split has nothing to be compared with: those columns stay empty.
  kept = [k for k in range(len(heads)) if any(row[k] for row in rows)]
  return [heads[k] for k in kept], [[row[k] for k in kept] for row in rows]


def _unknown(numbers):
  return numbers['lengths'].get('unknown_tokens')


def _cells(numbers, k: int, name: str) -> list[str]:
  text = numbers['kind'] == 'text'
  measured = numbers['lengths' if text else 'images']['summary'][name]
  present = [n for n in numbers['balance'][name] if n]
  low, high = min(present), max(present)
  copies = numbers['copies']
  at = list(numbers['splits']).index(numbers['reference'])
  form = '.0f' if text else '.3g'
  cells = [
    name,
    f'{numbers["splits"][name]:,}',
    f'{len(present):,}',
    f'{low:,}' if low == high else f'{low:,} to {high:,}',
    f'{measured["median"]:{form}}, {measured["p95"]:{form}}',
    f'{int(copies["equal"][k][k]):,}',
    '' if at == k else f'{int(copies["equal"][at][k]):,}',
    '' if at == k else f'{int(copies["near"][at][k]):,}',
  ]
  if text:
    unseen = numbers['unseen'].get(name)
    cells.append(f'{unseen["running"]:.1%}' if unseen else '')
    if _unknown(numbers):
      cells.append(f'{_unknown(numbers)[name]:.2%}')
  doubted = numbers['label_errors'].get('by_split', {}).get(name)
  return [*cells, '' if doubted is None else f'{doubted:,}']


def terminal(numbers: Mapping[str, Any]) -> str:
  """The overview as a plain table, then the findings; `!` marks serious."""
  heads, rows = overview(numbers)
  # Splits to the right and counts downwards: it fits 100 columns.
  columns = [list(column) for column in zip(heads, *rows, strict=True)]
  widths = [max(map(len, cells)) for cells in zip(*columns, strict=True)]
  lines = [
    '  '.join(
      cell.ljust(width) if not i else cell.rjust(width)
      for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
    ).rstrip()
    for cells in columns
  ]
  rule = '-' * min(max(map(len, lines)), _WIDTH)
  said = [
    line
    for finding in findings(numbers)
    for line in textwrap.wrap(
      f'{"!" if finding.serious else " "} {finding.text}',
      _WIDTH,
      subsequent_indent='  ',
    )
  ]
  return '\n'.join([lines[0], rule, *lines[1:], rule, *said])
