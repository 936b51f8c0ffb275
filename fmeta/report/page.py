"""The page of panels."""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from fmeta.report import rows as text
from fmeta.report.rows import Panel, Row
from fmeta.report.sheet import document, image, safe


def write_report(
  path: str | pathlib.Path,
  title: str,
  panels: Sequence[Panel],
  facts: Mapping[str, Any],
  notes: Sequence[str] = (),
) -> list[pathlib.Path]:
  """Writes the page, and beside it each panel's picture as PNG.

  Args:
    path: the HTML file; pictures go to `panel_a.png`, `panel_b.png`, ...
    title: the page's title.
    panels: in order; they are lettered A, B, ...
    facts: what the numbers depend on: hardware, versions, commit, seeds,
      date, sha256 of the data; values are shown as text.
    notes: paragraphs about the protocol that concern all panels.

  Returns:
    The files written, the page first.
  """
  path = pathlib.Path(path)
  written = [path]
  for letter, panel in zip(_letters(panels), panels, strict=True):
    if panel.figure is not None:
      picture = path.parent / f'panel_{letter.lower()}.png'
      picture.write_bytes(panel.figure.png)
      written.append(picture)
  path.write_text(_page(title, panels, facts, notes), encoding='utf-8')
  return written


def _letters(panels: Sequence[Panel]) -> list[str]:
  return [chr(ord('A') + index) for index in range(len(panels))]


def _page(title, panels, facts, notes) -> str:
  answers = ''.join(
    f'<dt>{safe(panel.question)}</dt><dd>{safe(text.answer(panel))}</dd>\n'
    for panel in panels
  )
  body = ''.join(
    _section(letter, panel)
    for letter, panel in zip(_letters(panels), panels, strict=True)
  )
  return document(
    title,
    f'<dl class="answers">\n{answers}</dl>\n{body}{_closing(facts, notes)}',
  )


def _section(letter: str, panel: Panel) -> str:
  note = f'<p class="note">{safe(panel.note)}</p>\n' if panel.note else ''
  picture = '' if panel.figure is None else image(panel.figure)
  return (
    f'<section id="panel-{letter.lower()}">\n'
    f'<h2><span>{letter}</span>{safe(panel.title)}</h2>\n'
    f'<p class="question">{safe(panel.question)}</p>\n'
    f'{picture}{_table(panel)}{note}</section>\n'
  )


def _table(panel: Panel) -> str:
  more = text.more_columns(panel)
  heads = [
    'method',
    'chosen setting',
    f'{panel.metric} (%)',
    '95% CI',
    *(f'{name} (%)' for name in more),
    f'minus {panel.reference} (points)' if panel.reference else '',
    'trained parameters',
    'seconds',
  ]
  lines = [_cells(panel, row, more) for row in panel.rows]
  kept = [i for i in range(len(heads)) if any(line[i][1] for line in lines)]
  head = ''.join(
    f'<th scope="col"{_class("left" if i == 1 else "")}>{safe(heads[i])}</th>'
    for i in kept
  )
  best = text.best(panel)
  body = ''.join(
    _table_row(row, [line[i] for i in kept], row is best)
    for row, line in zip(panel.rows, lines, strict=True)
  )
  caption = (
    '<caption>Bold differences: the paired 95% interval excludes zero. '
    'Grey rows are baselines.</caption>'
  )
  return (
    f'<div class="wide"><table>{caption}\n<thead><tr>{head}</tr></thead>\n'
    f'<tbody>\n{body}</tbody></table></div>\n'
  )


def _cells(
  panel: Panel, row: Row, more: Sequence[str]
) -> list[tuple[str, str]]:
  """(class, text) of each cell, in the order of the header."""
  difference, mark = '', ''
  if row.difference is not None:
    mean, *ends = row.difference
    difference = (
      f'{text.percent(mean, sign=True)} ({text.interval(ends, sign=True)})'
    )
    mark = 'real' if text.excludes_zero(row.difference) else ''
  trained = '' if row.trainable is None else f'{row.trainable:,}'
  if trained and panel.total and not row.baseline and row.trainable:
    trained += f' ({100 * row.trainable / panel.total:.3g}%)'
  return [
    ('', row.name + (' (upper bound)' if row.ceiling else '')),
    ('left', row.setting),
    ('value', text.percent(row.value)),
    ('', text.interval(row.ci95)),
    *(('', text.percent(row.more.get(name))) for name in more),
    (mark, difference),
    ('', trained),
    ('', text.duration(row.seconds)),
  ]


def _table_row(row: Row, cells: Sequence[tuple[str, str]], best: bool) -> str:
  kind = 'best' if best else 'baseline' if row.baseline else ''
  shown = [f'<th scope="row">{safe(cells[0][1])}</th>']
  shown += [f'<td{_class(name)}>{safe(cell)}</td>' for name, cell in cells[1:]]
  return f'<tr{_class(kind)}>{"".join(shown)}</tr>\n'


def _class(name: str) -> str:
  return f' class="{name}"' if name else ''


def _closing(facts: Mapping[str, Any], notes: Sequence[str]) -> str:
  paragraphs = ''.join(f'<p class="note">{safe(note)}</p>\n' for note in notes)
  listed = ''.join(
    f'<dt>{safe(name)}</dt><dd>{safe(fact(value))}</dd>\n'
    for name, value in facts.items()
  )
  protocol = f'<h2>Protocol</h2>\n{paragraphs}' if notes else ''
  heading = '<h3>What the numbers depend on</h3>\n' if facts else ''
  return (
    f'<section>\n{protocol}{heading}<dl class="facts">\n{listed}</dl>\n'
    '</section>\n'
  )


def fact(value: Any) -> str:
  """Mappings and lists as short text, the rest as it prints."""
  if isinstance(value, Mapping):
    return ', '.join(f'{name} {fact(item)}' for name, item in value.items())
  if isinstance(value, (list, tuple)):
    return ', '.join(map(fact, value))
  return value if isinstance(value, str) else json.dumps(value, default=str)
