"""What every page shares: one self-contained HTML file, no script, no link."""

import base64
import html
from collections.abc import Sequence
from typing import Any

from fmeta.report.style import Picture

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
.wide + .wide, img + .wide { margin-top: 20px; }
table { border-collapse: collapse; width: 100%; font-size: 14px;
  font-variant-numeric: tabular-nums; }
caption { text-align: left; color: #57606a; font-size: 13px;
  padding-bottom: 6px; }
th, td { padding: 6px 10px; text-align: right; vertical-align: top;
  border-bottom: 1px solid #e4e7eb; white-space: nowrap; }
thead th { border-bottom: 2px solid #8b949e; vertical-align: bottom;
  white-space: normal; }
th:first-child, th.left, td.left { text-align: left; white-space: normal;
  overflow-wrap: anywhere; min-width: 9em; }
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


def document(title: str, body: str) -> str:
  """A whole HTML page around `body`, which is HTML already."""
  return (
    '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
    '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
    f'<title>{safe(title)}</title>\n<style>{_CSS}</style>\n</head>\n'
    f'<body>\n<main>\n<h1>{safe(title)}</h1>\n{body}'
    '</main>\n</body>\n</html>\n'
  )


def safe(value: Any) -> str:
  """Text as HTML."""
  return html.escape(str(value))


def image(picture: Picture) -> str:
  """The picture inside the page, with its text alternative."""
  data = base64.b64encode(picture.png).decode('ascii')
  return (
    f'<img alt="{safe(picture.alt)}" width="{picture.width}" '
    f'src="data:image/png;base64,{data}">\n'
  )


def table(
  head: Sequence[str],
  rows: Sequence[Sequence[Any]],
  caption: str = '',
  left: Sequence[int] = (),
) -> str:
  """Rows of cells as text; the first column is a heading.

  Args:
    head: one text per column.
    rows: each of as many cells.
    caption: above the table.
    left: columns of prose, set to the left; the first one always is.
  """
  kind = [' class="left"' if i in left else '' for i in range(len(head))]
  top = ''.join(
    f'<th scope="col"{kind[i]}>{safe(cell)}</th>' for i, cell in enumerate(head)
  )
  body = ''.join(
    f'<tr><th scope="row">{safe(row[0])}</th>'
    + ''.join(
      f'<td{kind[i]}>{safe(cell)}</td>' for i, cell in enumerate(row) if i
    )
    + '</tr>\n'
    for row in rows
  )
  above = f'<caption>{safe(caption)}</caption>\n' if caption else ''
  return (
    f'<div class="wide"><table>{above}<thead><tr>{top}</tr></thead>\n'
    f'<tbody>\n{body}</tbody></table></div>\n'
  )
