"""`explain.html`: one self-contained page about one finished run."""

import base64
import html
import os
import pathlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from fmeta.explain import figures
from fmeta.explain.figures import short
from fmeta.explain.flips import Flip
from fmeta.explain.measure import BlockRow, Measured
from fmeta.explain.recipe import Recipe
from fmeta.report import Picture

_CSS = """
:root { color-scheme: light; }
body { margin: 0; background: #f6f8fa; color: #24292f;
  font: 16px/1.5 system-ui, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif; }
main { max-width: 960px; margin: 0 auto; padding: 32px 20px 64px; }
h1 { font-size: 28px; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 20px; margin: 0 0 6px; }
section { background: #fff; border: 1px solid #d8dee4; border-radius: 8px;
  padding: 24px; margin: 20px 0 0; }
p { margin: 0 0 12px; }
.note { font-size: 14px; color: #57606a; }
.wide { overflow-x: auto; }
img.chart { display: block; max-width: 100%; height: auto; margin: 8px auto; }
img.tile { width: 72px; height: 72px; image-rendering: pixelated;
  vertical-align: middle; margin-right: 8px; }
table { border-collapse: collapse; width: 100%; font-size: 14px;
  font-variant-numeric: tabular-nums; }
th, td { padding: 5px 10px; border-bottom: 1px solid #e4e7eb;
  text-align: right; vertical-align: top; white-space: nowrap; }
th { white-space: normal; border-bottom: 2px solid #8b949e;
  vertical-align: bottom; }
th.left, td.left { text-align: left; }
td.example { text-align: left; white-space: normal; overflow-wrap: anywhere;
  max-width: 420px; }
td.label { text-align: left; }
td.fixed { color: #00664a; font-weight: 600; }
td.broken { color: #a04400; font-weight: 600; }
.tokens { line-height: 2; margin: 0 0 2px; }
.tokens span { padding: 3px 1px; border-radius: 3px; }
.explained { margin: 0 0 16px; }
.explained img.tile { width: 112px; height: 112px; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 4px 16px;
  font-size: 14px; margin: 0; }
dt { color: #57606a; }
dd { margin: 0; overflow-wrap: anywhere; }
@media print { body { background: #fff; } section { border: 0; padding: 0; } }
"""


class Example(NamedTuple):
  """An example on the page: safe HTML of what it is."""

  shown: str


class Explained(NamedTuple):
  """One attribution on the page.

  Attributes:
    shown: safe HTML: coloured tokens or a heat map.
    title: what is explained, plain text.
    error: completeness error, a share of f(x) - f(baseline).
  """

  shown: str
  title: str
  error: float


class Page(NamedTuple):
  """What `write` needs beside the numbers.

  Attributes:
    title: of the page.
    labels: names of the classes.
    examples: one per row of the measured examples.
    explained: attributions, in order.
    facts: shown at the end.
    recipe: how fast it moved; None: the page says that it is not known.
    most_flips: rows of the table of flips.
  """

  title: str
  labels: Sequence[str]
  examples: Sequence[Example]
  explained: Sequence[Explained] = ()
  facts: Mapping[str, Any] = {}
  recipe: Recipe | None = None
  most_flips: int = 20


def write(
  folder: str | os.PathLike, measured: Measured, page: Page
) -> list[pathlib.Path]:
  """Writes `explain.html` and its pictures `explain_*.png` into a folder.

  Returns:
    The files, the page first.
  """
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  pictures = {'blocks': figures.blocks_picture(measured.rows)}
  if page.recipe is not None and page.recipe.rates:
    peak = max(page.recipe.rates)
    scales = {row.name: (row.rate or 0.0) / peak for row in measured.rows}
    pictures['rates'] = figures.rates_picture(page.recipe.rates, scales)
  written = [folder / 'explain.html']
  for name, picture in pictures.items():
    written.append(folder / f'explain_{name}.png')
    written[-1].write_bytes(picture.png)
  written[0].write_text(_html(measured, page, pictures), encoding='utf-8')
  return written


def _html(measured: Measured, page: Page, pictures) -> str:
  return (
    '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
    '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
    f'<title>{_safe(page.title)}</title>\n<style>{_CSS}</style>\n</head>\n'
    f'<body>\n<main>\n<h1>{_safe(page.title)}</h1>\n'
    f'<p>{_safe(_summary(measured))}</p>\n'
    f'{_blocks(measured, pictures["blocks"])}'
    f'{_rates(pictures.get("rates"))}'
    f'{_flips(measured, page)}{_explained(page)}{_facts(page)}'
    '</main>\n</body>\n</html>\n'
  )


def _safe(value: Any) -> str:
  return html.escape(str(value))


def _summary(measured: Measured) -> str:
  kinds = Counter(flip.kind for flip in measured.flips)
  before = 100 * measured.accuracy(measured.before)
  after = 100 * measured.accuracy(measured.after)
  return (
    f'Accuracy on {len(measured.labels):,} examples went from {before:.1f}% '
    f'to {after:.1f}%: {len(measured.flips):,} predictions changed, '
    f'{kinds["fixed"]} to the right class, {kinds["broken"]} from it, '
    f'{kinds["still wrong"]} from one wrong class to another.'
  )


def image_tag(png: bytes, alt: str, kind: str, width: int | None = None) -> str:
  """A picture inside the page."""
  data = base64.b64encode(png).decode('ascii')
  size = f' width="{width}"' if width else ''
  return (
    f'<img class="{kind}" alt="{_safe(alt)}"{size} '
    f'src="data:image/png;base64,{data}">'
  )


def _chart(picture: Picture) -> str:
  return image_tag(picture.png, picture.alt, 'chart', picture.width) + '\n'


_HEADS = (
  'block',
  'parameters',
  'weight change',
  'effective rank',
  'CKA',
  'Fisher',
  'gradient / weight',
  'highest rate',
)


def _blocks(measured: Measured, picture: Picture) -> str:
  head = ''.join(
    f'<th class="left">{h}</th>' if h == 'block' else f'<th>{h}</th>'
    for h in _HEADS
  )
  body = ''.join(_block_row(row) for row in measured.rows)
  return (
    '<section id="blocks">\n<h2>What moved</h2>\n'
    '<p class="note">Blocks from input to output. Weight change: '
    '|after - before| / |before|. Effective rank: exp of the entropy of the '
    'singular values of the change, mean over the matrices of the block, of '
    'the largest possible. CKA: linear, of the outputs before and after; 1 is '
    'unchanged. Fisher: mean diagonal entry after training, labels drawn from '
    f'the model, {measured.fisher_examples} examples. Gradient / weight: ratio '
    'of norms before training; the largest, that of a fresh head aside, says '
    'which block surgical fine-tuning would move.</p>\n'
    f'{_chart(picture)}<div class="wide"><table><thead><tr>{head}</tr></thead>'
    f'\n<tbody>\n{body}</tbody></table></div>\n</section>\n'
  )


def _block_row(row: BlockRow) -> str:
  rank = (
    'n/a' if row.rank is None else f'{row.rank[0]:.1f} of {row.rank[1]:.0f}'
  )
  cells = (
    f'{row.parameters:,}',
    short(row.change),
    rank,
    'n/a' if row.cka is None else f'{row.cka:.3f}',
    short(row.fisher),
    short(row.ratio),
    short(row.rate),
  )
  shown = ''.join(f'<td>{cell}</td>' for cell in cells)
  return f'<tr><td class="left">{_safe(row.name)}</td>{shown}</tr>\n'


def _rates(picture: Picture | None) -> str:
  if picture is None:
    body = (
      '<p class="note">The run left no record of its rates (explain.json).</p>'
    )
  else:
    body = (
      '<p class="note">Schedule times the mean multiplier of the block\'s '
      f'parameters.</p>\n{_chart(picture)}'
    )
  return f'<section id="rates">\n<h2>How fast</h2>\n{body}\n</section>\n'


def _flips(measured: Measured, page: Page) -> str:
  # The harm done is what one looks for: it gets up to half of the rows.
  broken = [flip for flip in measured.flips if flip.kind == 'broken']
  others = [flip for flip in measured.flips if flip.kind != 'broken']
  shown = broken[: max(page.most_flips // 2, page.most_flips - len(others))]
  shown += others[: page.most_flips - len(shown)]
  rows = ''.join(_flip_row(flip, page) for flip in shown)
  more = len(measured.flips) - len(shown)
  note = f'; {more} more are not shown' if more else ''
  heads = ''.join(
    f'<th class="left">{head}</th>'
    for head in ('example', 'label', 'before', 'after', '')
  )
  table = (
    '<p class="note">Broken ones first, each kind from the surest new answer '
    f'on{note}.</p>\n'
    f'<div class="wide"><table><thead><tr>{heads}</tr></thead>\n'
    f'<tbody>\n{rows}</tbody></table></div>\n'
  )
  body = table if shown else '<p>No prediction changed.</p>\n'
  return (
    '<section id="flips">\n<h2>Whose prediction flipped</h2>\n'
    f'{body}</section>\n'
  )


def _flip_row(flip: Flip, page: Page) -> str:
  def answer(pair):
    return f'{_safe(page.labels[pair[0]])} {100 * pair[1]:.0f}%'

  kind = _safe(flip.kind)
  return (
    f'<tr><td class="example">{page.examples[flip.index].shown}</td>'
    f'<td class="label">{_safe(page.labels[flip.label])}</td>'
    f'<td class="label">{answer(flip.before)}</td>'
    f'<td class="label">{answer(flip.after)}</td>'
    f'<td class="label {kind.split()[0]}">{kind}</td></tr>\n'
  )


def _explained(page: Page) -> str:
  if not page.explained:
    return ''
  body = ''.join(
    f'<div class="explained">{one.shown}<div class="note">{_safe(one.title)}; '
    f'completeness error {100 * one.error:.2g}%</div></div>\n'
    for one in page.explained
  )
  return (
    '<section id="attributions">\n<h2>What the answer rests on</h2>\n'
    '<p class="note">Integrated gradients of the logit of the class predicted '
    'after fine-tuning: blue speaks for it, orange against it. Completeness '
    'error: how far the attributions are from adding up to the logit minus '
    f'that of the baseline.</p>\n{body}</section>\n'
  )


def _facts(page: Page) -> str:
  listed = ''.join(
    f'<dt>{_safe(name)}</dt><dd>{_safe(value)}</dd>\n'
    for name, value in page.facts.items()
  )
  return (
    '<section id="facts">\n<h2>What the numbers depend on</h2>\n'
    f'<dl>\n{listed}</dl>\n</section>\n'
  )
