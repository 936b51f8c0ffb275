"""One self-contained HTML page: no script, no link, pictures inside."""

import base64
import html
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from fmeta.report import rows as text
from fmeta.report.rows import Panel, Row

_CSS = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0; background: #f6f8fa; color: #24292f;
  font: 16px/1.5 system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans',
  sans-serif; }
main { max-width: 960px; margin: 0 auto; padding: 32px 20px 64px; }
h1 { font-size: 28px; line-height: 1.25; margin: 0 0 20px; }
h2 { font-size: 21px; margin: 0 0 2px; }
h2 span { color: #0072b2; margin-right: 8px; }
h3 { font-size: 16px; margin: 28px 0 8px; }
section, .answers { background: #fff; border: 1px solid #d8dee4;
  border-radius: 8px; padding: 24px; margin: 0 0 24px; }
.answers { margin: 0 0 24px; }
.answers dt { font-weight: 600; }
.answers dd { margin: 0 0 14px; }
.answers dd:last-child { margin-bottom: 0; }
.question { color: #57606a; margin: 0 0 6px; }
.answer { margin: 0 0 16px; }
img { display: block; max-width: 100%; height: auto; margin: 8px auto 16px; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 14px;
  font-variant-numeric: tabular-nums; }
caption { text-align: left; color: #57606a; font-size: 13px;
  padding-bottom: 6px; }
th, td { padding: 6px 10px; text-align: right; vertical-align: top;
  border-bottom: 1px solid #e4e7eb; white-space: nowrap; }
thead th { border-bottom: 2px solid #8b949e; vertical-align: bottom;
  white-space: normal; }
th:first-child, th.left, td.left { text-align: left; white-space: normal;
  overflow-wrap: anywhere; min-width: 7em; }
tbody th { font-weight: 600; }
tr.baseline th, tr.baseline td { color: #57606a; font-weight: 400; }
tr.best td.value { font-weight: 700; }
td.real { font-weight: 700; }
.note { font-size: 14px; color: #424a53; }
.facts { display: grid; grid-template-columns: max-content 1fr;
  gap: 4px 16px; font-size: 14px; margin: 0; }
.facts dt { color: #57606a; }
.facts dd { margin: 0; overflow-wrap: anywhere; }
@media print {
  body { background: #fff; font-size: 12px; }
  main { max-width: none; padding: 0; }
  section, .answers { border: 0; padding: 0; }
  img, tr { break-inside: avoid; }
  h2, h3 { break-after: avoid; }
}
"""


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
    f'<dt>{_safe(panel.question)}</dt><dd>{_safe(text.answer(panel))}</dd>\n'
    for panel in panels
  )
  body = ''.join(
    _section(letter, panel)
    for letter, panel in zip(_letters(panels), panels, strict=True)
  )
  return (
    '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
    '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
    f'<title>{_safe(title)}</title>\n<style>{_CSS}</style>\n</head>\n'
    f'<body>\n<main>\n<h1>{_safe(title)}</h1>\n'
    f'<dl class="answers">\n{answers}</dl>\n{body}{_closing(facts, notes)}'
    '</main>\n</body>\n</html>\n'
  )


def _safe(value: Any) -> str:
  return html.escape(str(value))


def _section(letter: str, panel: Panel) -> str:
  note = f'<p class="note">{_safe(panel.note)}</p>\n' if panel.note else ''
  return (
    f'<section id="panel-{letter.lower()}">\n'
    f'<h2><span>{letter}</span>{_safe(panel.title)}</h2>\n'
    f'<p class="question">{_safe(panel.question)}</p>\n'
    f'{_image(panel)}{_table(panel)}{note}</section>\n'
  )


def _image(panel: Panel) -> str:
  if panel.figure is None:
    return ''
  data = base64.b64encode(panel.figure.png).decode('ascii')
  return (
    f'<img alt="{_safe(panel.figure.alt)}" width="{panel.figure.width}" '
    f'src="data:image/png;base64,{data}">\n'
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
    f'<th scope="col"{_class("left" if i == 1 else "")}>{_safe(heads[i])}</th>'
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
  shown = [f'<th scope="row">{_safe(cells[0][1])}</th>']
  shown += [f'<td{_class(name)}>{_safe(cell)}</td>' for name, cell in cells[1:]]
  return f'<tr{_class(kind)}>{"".join(shown)}</tr>\n'


def _class(name: str) -> str:
  return f' class="{name}"' if name else ''


def _closing(facts: Mapping[str, Any], notes: Sequence[str]) -> str:
  paragraphs = ''.join(f'<p class="note">{_safe(note)}</p>\n' for note in notes)
  listed = ''.join(
    f'<dt>{_safe(name)}</dt><dd>{_safe(_fact(value))}</dd>\n'
    for name, value in facts.items()
  )
  protocol = f'<h2>Protocol</h2>\n{paragraphs}' if notes else ''
  heading = '<h3>What the numbers depend on</h3>\n' if facts else ''
  return (
    f'<section>\n{protocol}{heading}<dl class="facts">\n{listed}</dl>\n'
    '</section>\n'
  )


def _fact(value: Any) -> str:
  """Mappings and lists as short text, the rest as it prints."""
  if isinstance(value, Mapping):
    return ', '.join(f'{name} {_fact(item)}' for name, item in value.items())
  if isinstance(value, (list, tuple)):
    return ', '.join(map(_fact, value))
  return value if isinstance(value, str) else json.dumps(value, default=str)
