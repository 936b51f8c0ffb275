"""The data report as a folder: one HTML page, its pictures, the numbers."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from fmeta.data import pictures
from fmeta.data.findings import across, findings, overview
from fmeta.data.reading import Source
from fmeta.report.sheet import document, image, safe, table
from fmeta.report.style import Picture
from fmeta.workdir import write_json

_SHOWN = 10
_LETTERS = 160  # of a text in a table


class Section(NamedTuple):
  """One question: a name for the picture's file, a title, HTML below it."""

  name: str
  title: str
  question: str
  picture: Picture | None
  body: str
  note: str = ''


def write(
  folder: pathlib.Path, source: Source, numbers: Mapping[str, Any]
) -> list[pathlib.Path]:
  """Writes `report.html`, `report.json` and a PNG per picture.

  Args:
    folder: made if need be; files of an earlier report are replaced.
    source: what `numbers` were measured on, for thumbnails.
    numbers: from `report.measure`.

  Returns:
    The files written, the page first.
  """
  folder.mkdir(parents=True, exist_ok=True)
  sections = _sections(source, numbers)
  page, values = folder / 'report.html', folder / 'report.json'
  said = [finding._asdict() for finding in findings(numbers)]
  write_json(values, {**numbers, 'findings': said})
  written = [page, values]
  for section in sections:
    if section.picture is not None:
      written.append(folder / f'{section.name}.png')
      written[-1].write_bytes(section.picture.png)
  body = _top(numbers) + ''.join(
    _html(chr(ord('A') + k), section) for k, section in enumerate(sections)
  )
  title = f'A look at the data: {numbers["name"]}'
  page.write_text(document(title, body), encoding='utf-8')
  return written


def _top(numbers: Mapping[str, Any]) -> str:
  found = findings(numbers)
  heads, rows = overview(numbers)
  parts = [
    f'<h2>{title}</h2>\n<ul>\n'
    + ''.join(
      f'<li>{safe(f.text)}</li>\n' for f in found if f.serious == serious
    )
    + '</ul>\n'
    for title, serious in (('Look at this first', True), ('Also seen', False))
    if any(f.serious == serious for f in found)
  ]
  return f'<section>\n{"".join(parts)}{table(heads, rows)}</section>\n'


def _html(letter: str, section: Section) -> str:
  drawn = '' if section.picture is None else image(section.picture)
  note = f'<p class="note">{safe(section.note)}</p>\n' if section.note else ''
  return (
    f'<section>\n<h2><span>{letter}</span>{safe(section.title)}</h2>\n'
    f'<p class="question">{safe(section.question)}</p>\n'
    f'{drawn}{section.body}{note}</section>\n'
  )


def _sections(source: Source, numbers: Mapping[str, Any]) -> list[Section]:
  sections = [
    Section(
      'balance',
      'Classes',
      'How many rows does each class have?',
      pictures.balance(numbers),
      '',
    ),
    _sizes(numbers),
    _copies(source, numbers),
    _conflicts(numbers),
    _labels(source, numbers),
  ]
  if numbers['kind'] == 'text':
    sections.append(_unseen(numbers))
  return [section for section in sections if section is not None]


def _sizes(numbers: Mapping[str, Any]) -> Section:
  text = numbers['kind'] == 'text'
  part = numbers['lengths' if text else 'images']
  what = part['unit'] + ' per text' if text else 'mean intensity of an image'
  keys = ('min', 'median', 'mean', 'p95', 'p99', 'max')
  form = '.1f' if text else '.3g'
  rows = [
    [name, *(f'{values[key]:{form}}' for key in keys)]
    for name, values in part['summary'].items()
  ]
  heads = ['split', 'least', 'median', 'mean', '95%', '99%', 'most']
  note = ''
  if not text:
    shapes = {' x '.join(map(str, size)) for size in part['size'].values()}
    note = f'Height x width x channels: {", ".join(sorted(shapes))}.'
  return Section(
    'sizes',
    'Lengths' if text else 'Intensities',
    'How long are the texts?' if text else 'How bright are the images?',
    pictures.sizes(part['histogram'], what, last=text),
    table(heads, rows, what),
    note,
  )


def _copies(source: Source, numbers: Mapping[str, Any]) -> Section:
  found = numbers['copies']
  names = list(numbers['splits'])
  rows = [
    [f'{a} and {b}', f'{equal:,}', f'{near:,}']
    for a, b, equal, near in across(numbers)
    if equal + near
  ]
  rows += [
    [f'within {a}', f'{found["equal"][k][k]:,}', f'{found["near"][k][k]:,}']
    for k, a in enumerate(names)
  ]
  body = table(
    ['splits', 'equal', 'near'],
    rows,
    'Rows of the later split that stand in the earlier one; within a split: '
    'repetitions, and rows with a near-duplicate.',
  )
  rule = found['rule']
  if numbers['kind'] == 'text':
    note = (
      'Near: the Jaccard similarity of the sets of '
      f'{rule["shingle"]} letters in a row is {rule["threshold"]:g} or more, '
      'case and punctuation aside.'
    )
  else:
    note = (
      f'Near: difference hashes that differ in at most {rule["bits"]} of 64 '
      f'bits, and pixels that correlate by {rule["threshold"]:g} or more.'
    )
  title, question = 'Copies', 'What stands in the data more than once?'
  pairs = [[None, *pair] for pair in found['equal_pairs'][:_SHOWN]]
  pairs += found['near_pairs'][:_SHOWN]
  if numbers['kind'] == 'text':
    body += _text_pairs(pairs)
    return Section('copies', title, question, None, body, note)
  shown = _pair_thumbnails(source, pairs[:12]) if pairs else None
  return Section('copies', title, question, shown, body, note)


def _text_pairs(pairs: Sequence[Any]) -> str:
  if not pairs:
    return ''
  rows = [
    [
      'equal' if similarity is None else f'{similarity:.2f}',
      _where(a),
      _cut(a['text']),
      _where(b),
      '' if similarity is None else _cut(b['text']),
    ]
    for similarity, a, b in pairs
  ]
  heads = ['similarity', 'row', 'text', 'row', 'text']
  return table(heads, rows, 'Pairs across splits come first.', range(1, 5))


def _pair_thumbnails(source: Source, pairs) -> Picture:
  rows = [row for _, a, b in pairs for row in (a, b)]
  captions = [f'{r["split"]} {r["row"]}\n{r["label"]}' for r in rows]
  return pictures.thumbnails(_images(source, rows), captions, 8)


def _images(source: Source, rows) -> list[np.ndarray]:
  return [source.splits[row['split']]['image'][row['row']] for row in rows]


def _conflicts(numbers: Mapping[str, Any]) -> Section | None:
  found = numbers['conflicts']
  if not found['values']:
    return None
  rows = [
    [
      '; '.join(f'{_where(row)}: {row["label"]}' for row in some),
      _cut(some[0].get('text', '')),
    ]
    for some in found['examples'][:_SHOWN]
  ]
  return Section(
    'conflicts',
    'Conflicts',
    'Does the same example bear different labels?',
    None,
    table(['rows and labels', 'text'], rows, '', (1,)),
    'The same: equal but for case, spacing and punctuation.'
    if numbers['kind'] == 'text'
    else '',
  )


def _labels(source: Source, numbers: Mapping[str, Any]) -> Section | None:
  found = numbers['label_errors']
  if not found.get('count'):
    return None
  listed = found['found'][:_SHOWN]
  rows = [
    [
      _where(row),
      f'{row["label"]} ({row["confidence"]:.2f})',
      f'{row["suggested"]} ({row["suggested_confidence"]:.2f})',
      _cut(row.get('text', '')),
    ]
    for row in listed
  ]
  heads = ['row', 'label (probability)', 'suggested', 'text']
  if numbers['kind'] == 'image':
    heads, rows = heads[:3], [row[:3] for row in rows]
  body = image(pictures.confusions(found['pairs']))
  body += table(heads, rows, 'Least probable labels first.', (1, 2, 3))
  note = (
    f'Probabilities by logistic regression on {found["features"]}, '
    f'{found["folds"]} folds, copies and groups kept together; accuracy '
    f'{found["accuracy"]:.1%}. A label is in doubt where another class is as '
    'probable as for its own examples on average (confident learning, '
    'Northcutt et al. 2021). It is a list to read, not to delete: report.json '
    'has all of it.'
  )
  shown = None
  if numbers['kind'] == 'image':
    captions = [f'{r["label"]} → {r["suggested"]}\n{_where(r)}' for r in listed]
    shown = pictures.thumbnails(_images(source, listed[:16]), captions, 8)
  question = 'Which labels look wrong?'
  return Section('labels', 'Labels in doubt', question, shown, body, note)


def _unseen(numbers: Mapping[str, Any]) -> Section | None:
  if not numbers['unseen']:
    return None
  rows = [
    [
      name,
      f'{found["running"]:.2%}',
      f'{found["distinct"]:.1%}',
      ', '.join(f'{word} ({n})' for word, n in found['most'][:10]),
    ]
    for name, found in numbers['unseen'].items()
  ]
  heads = ['split', 'running words', 'distinct words', 'most frequent']
  return Section(
    'words',
    'Unseen words',
    f'Which words does {numbers["reference"]} never show?',
    None,
    table(heads, rows, '', (3,)),
  )


def _where(row: Mapping[str, Any]) -> str:
  return f'{row["split"]} {row["row"]}'


def _cut(text: str) -> str:
  return text if len(text) <= _LETTERS else text[: _LETTERS - 1] + '…'
