"""Pictures in one house style: bars, curves and accuracy matrices.

Colours are Okabe and Ito's (distinguishable under the common colour
deficiencies) and never the only difference: bars are named, lines differ in
marker and are named at their end, cells carry their number. Every picture
brings a text alternative made from its numbers.
"""

import dataclasses
import io
import itertools
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike

from fmeta.errors import UsageError

_DPI = 200  # two device pixels per CSS pixel: sharp on screen and on paper
_WIDTH = 8.8  # inches; 880 CSS pixels
_COLOURS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9')
_MARKERS = ('o', 's', '^', 'D', 'v', 'P')
_GREY, _INK, _FAINT = '#A7ADB3', '#24292F', '#E4E7EB'
_STYLE: dict[str, Any] = {
  'font.family': 'DejaVu Sans',
  'font.size': 10,
  'axes.titlesize': 11,
  'axes.titleweight': 'bold',
  'axes.titlelocation': 'left',
  'axes.labelcolor': _INK,
  'axes.edgecolor': '#8B949E',
  'axes.spines.top': False,
  'axes.spines.right': False,
  'axes.axisbelow': True,
  'text.color': _INK,
  'xtick.color': _INK,
  'ytick.color': _INK,
  'figure.facecolor': 'white',
}


@dataclasses.dataclass(frozen=True)
class Picture:
  """A PNG, its text alternative, and its width in CSS pixels."""

  png: bytes
  alt: str
  width: int


@dataclasses.dataclass(frozen=True)
class Line:
  """One curve: y [n] over x [n], with `ci` = n pairs (low, high) or None."""

  name: str
  x: Sequence[float]
  y: Sequence[float]
  ci: Sequence[tuple[float, float]] | None = None
  baseline: bool = False


def _picture(figure: Figure, alt: str) -> Picture:
  buffer = io.BytesIO()
  # Without the version stamp the same numbers give the same bytes.
  figure.savefig(buffer, format='png', dpi=_DPI, metadata={'Software': None})
  return Picture(buffer.getvalue(), alt, round(figure.get_figwidth() * 96))


def bars(
  rows: Sequence[Any], *, metric: str = 'accuracy', total: int | None = None
) -> Picture:
  """Horizontal bars of `Row.value` with their intervals, from zero.

  Args:
    rows: `Row`s, drawn from top to bottom; baselines in grey.
    metric: the axis label.
    total: parameters of the model, to add shares to the counts at the right.
  """
  with matplotlib.rc_context(_STYLE):
    figure = Figure((_WIDTH, 1.0 + 0.42 * len(rows)), layout='constrained')
    axes = figure.add_subplot()
    _draw_bars(axes, rows, [row.value for row in rows], metric)
    _draw_counts(axes, rows, total)
    return _picture(figure, _bars_alt(rows, metric))


def _bars_alt(rows: Sequence[Any], metric: str) -> str:
  values = ', '.join(f'{row.name} {100 * row.value:.1f}' for row in rows)
  return f'Bar chart of {metric} in percent: {values}.'


def _draw_bars(
  axes: Axes,
  rows: Sequence[Any],
  values: Sequence[float | None],
  label: str,
  ends: bool = True,
) -> None:
  places = np.arange(len(rows))
  shown = np.array([np.nan if v is None else 100 * v for v in values])
  colours = [_GREY if r.baseline else _COLOURS[0] for r in rows]
  drawn = axes.barh(places, np.nan_to_num(shown), height=0.66, color=colours)
  for row, bar in zip(rows, drawn, strict=True):
    if row.ceiling:
      bar.set(facecolor='white', edgecolor=_COLOURS[0], hatch='///')
  for place, (row, value) in enumerate(zip(rows, shown, strict=True)):
    edge = value
    if ends and row.ci95 is not None:
      low, high = (100 * end for end in row.ci95)
      axes.plot([low, high], [place, place], color=_INK, lw=1.4)
      axes.plot([low, high], [place, place], '|', color=_INK, ms=7)
      edge = high
    text = 'n/a' if np.isnan(value) else f'{value:.1f}'
    axes.annotate(
      text,
      (max(np.nan_to_num(edge), 0), place),
      xytext=(6, 0),
      textcoords='offset points',
      va='center',
      fontsize=10,
      fontweight='normal' if row.baseline else 'bold',
    )
  axes.set_yticks(places, [row.name for row in rows])
  axes.set_ylim(len(rows) - 0.4, -0.6)
  _limits(axes, rows if ends else [], shown)
  axes.set_xlabel(f'{label} (%)')
  axes.grid(axis='x', color=_FAINT)
  axes.tick_params(axis='y', length=0)


def _limits(axes: Axes, rows: Sequence[Any], shown: np.ndarray) -> None:
  """From zero (lengths are compared) with room for the number at the end."""
  tips = [100 * row.ci95[1] for row in rows if row.ci95 is not None]
  finite = [*shown[np.isfinite(shown)], *tips, 1.0]
  low, high = min(0.0, *finite), max(finite)
  axes.set_xlim(low * 1.15, high + 0.14 * (high - low))
  if low < 0:
    axes.axvline(0, color='#8B949E', lw=0.8)


def _draw_counts(axes: Axes, rows: Sequence[Any], total: int | None) -> None:
  """A column of trainable parameters to the right of the bars."""
  if all(row.trainable is None for row in rows):
    return
  axes.text(
    1.16,
    1.01,
    'trained parameters',
    transform=axes.transAxes,
    ha='right',
    va='bottom',
    fontsize=9,
    color='#57606A',
  )
  for place, row in enumerate(rows):
    if row.trainable is None or row.baseline:
      continue
    share = f'  ({row.trainable / total:.2%})' if total else ''
    axes.text(
      1.16,
      place,
      f'{row.trainable:,}{share}',
      transform=axes.get_yaxis_transform(),
      ha='right',
      va='center',
      fontsize=9,
      color='#57606A',
    )


def curves(
  lines: Sequence[Line],
  *,
  xlabel: str,
  ylabel: str = 'accuracy',
  title: str = '',
) -> Picture:
  """Curves in percent with interval bands, named at their right ends.

  Args:
    lines: one or more; baselines are dashed grey.
    xlabel: for example 'inner steps' or 'shots'.
    ylabel: what y is.
    title: above the axes.

  Raises:
    UsageError: if there is no line or x, y, ci differ in length.
  """
  _check_lines(lines)
  with matplotlib.rc_context(_STYLE):
    figure = Figure((_WIDTH, 4.4), layout='constrained')
    axes = figure.add_subplot()
    looks = itertools.cycle(zip(_COLOURS, _MARKERS, strict=True))
    ends = []
    for line in lines:
      colour, marker = (_GREY, '') if line.baseline else next(looks)
      _draw_line(axes, line, colour, marker)
      text = '#6E7781' if line.baseline else colour
      ends.append((line.x[-1], 100 * line.y[-1], line.name, text))
    axes.set_xlabel(xlabel)
    axes.set_ylabel(f'{ylabel} (%)')
    axes.set_title(title)
    axes.grid(color=_FAINT)
    _integer_ticks(axes, sorted({x for line in lines for x in line.x}))
    _label_ends(axes, ends)
    return _picture(figure, _curves_alt(lines, xlabel, ylabel))


def _check_lines(lines: Sequence[Line]) -> None:
  if not lines:
    raise UsageError('no lines to draw; give at least one')
  for line in lines:
    sizes = {
      len(line.x),
      len(line.y),
      len(line.x if line.ci is None else line.ci),
    }
    if len(sizes) != 1 or not len(line.x):
      raise UsageError(
        f'line {line.name!r}: x, y and ci have {sorted(sizes)} points; '
        'give the same number, at least one, in each'
      )


def _curves_alt(lines: Sequence[Line], xlabel: str, ylabel: str) -> str:
  parts = [
    f'{line.name} from {100 * line.y[0]:.1f} at {line.x[0]:g} '
    f'to {100 * line.y[-1]:.1f} at {line.x[-1]:g}'
    for line in lines
  ]
  return f'Line chart of {ylabel} in percent over {xlabel}: ' + '; '.join(parts)


def _draw_line(axes: Axes, line: Line, colour: str, marker: str) -> None:
  y = 100 * np.asarray(line.y, float)
  axes.plot(
    line.x,
    y,
    color=colour,
    marker=marker,
    ms=5,
    lw=1.6 if line.baseline else 2,
    ls='--' if line.baseline else '-',
  )
  if line.ci is not None:
    low, high = 100 * np.asarray(line.ci, float).T
    axes.fill_between(line.x, low, high, color=colour, alpha=0.16, lw=0)


def _integer_ticks(axes: Axes, xs: list[float]) -> None:
  """A tick at each measured x where they do not crowd."""
  gaps = np.diff(xs)
  if len(xs) > 1 and gaps.min() >= 0.035 * (xs[-1] - xs[0]):
    axes.set_xticks(xs, [f'{x:g}' for x in xs])
  else:
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _label_ends(axes: Axes, ends: Sequence[tuple]) -> None:
  """Names to the right of the axes, pushed apart where they would touch."""
  low, high = axes.get_ylim()
  step = 0.055 * (high - low)
  right = axes.get_xlim()[1]
  places = _spread([y for _, y, _, _ in ends], step, low, high)
  for place, (x, y, name, colour) in zip(places, ends, strict=True):
    axes.annotate(
      textwrap.shorten(name, 30, placeholder='..'),
      (x, y),
      xytext=(right + 0.03 * (right - axes.get_xlim()[0]), place),
      textcoords='data',
      color=colour,
      va='center',
      fontweight='bold',
      annotation_clip=False,
      arrowprops={'arrowstyle': '-', 'color': colour, 'lw': 0.7, 'alpha': 0.7},
    )


def _spread(
  wanted: Sequence[float], step: float, low: float, high: float
) -> np.ndarray:
  """Positions near `wanted`, at least `step` apart, inside [low, high]."""
  order = np.argsort(wanted)
  places = np.array(wanted, float)[order]
  for i in range(1, len(places)):
    places[i] = max(places[i], places[i - 1] + step)
  places -= max(places[-1] - high, 0)
  places[0] = max(places[0], low)
  for i in range(1, len(places)):
    places[i] = max(places[i], places[i - 1] + step)
  out = np.empty_like(places)
  out[order] = places
  return out


def heatmap(
  matrix: ArrayLike, tasks: Sequence[str], *, title: str = ''
) -> Picture:
  """One accuracy matrix [T, T] in percent; NaN cells stay empty."""
  with matplotlib.rc_context(_STYLE):
    side = 1.6 + 0.55 * len(tasks)
    figure = Figure((side + 0.4, side), layout='constrained')
    _draw_matrix(figure.add_subplot(), matrix, tasks, title, rows=True)
    return _picture(figure, _matrix_alt({title or 'stream': matrix}))


def _matrix_alt(matrices: Mapping[str, ArrayLike]) -> str:
  parts = []
  for name, matrix in matrices.items():
    last = np.asarray(matrix, float)[-1]
    parts.append(f'{name} ' + ', '.join(f'{100 * v:.0f}' for v in last))
  return 'Accuracy per task in percent after the last task: ' + '; '.join(parts)


def _draw_matrix(axes: Axes, matrix, tasks, title, rows: bool) -> None:
  shown = 100 * np.asarray(matrix, float)
  if shown.shape != (len(tasks), len(tasks)):
    raise UsageError(
      f'matrix {title!r} has shape {shown.shape} for {len(tasks)} tasks; '
      'give [T, T]'
    )
  axes.imshow(shown, cmap='cividis', vmin=0, vmax=100, aspect='equal')
  axes.set_xticks(range(len(tasks)), tasks, rotation=45, ha='right', fontsize=8)
  labels = [f'after {task}' for task in tasks] if rows else [''] * len(tasks)
  axes.set_yticks(range(len(tasks)), labels, fontsize=8)
  axes.tick_params(length=0)
  axes.spines[:].set_visible(False)
  axes.set_title(title, fontsize=10)
  if len(tasks) > 8:
    return  # the numbers would touch
  for (i, j), value in np.ndenumerate(shown):
    if np.isfinite(value):
      colour = 'black' if value > 55 else 'white'
      axes.text(
        j, i, f'{value:.0f}', ha='center', va='center', fontsize=8, color=colour
      )


def stream(
  rows: Sequence[Any],
  matrices: Mapping[str, ArrayLike],
  tasks: Sequence[str],
  *,
  metric: str = 'average accuracy',
) -> Picture:
  """Average accuracy and forgetting per method above accuracy matrices.

  Args:
    rows: `Row`s; `more['forgetting']` is drawn where it is a number.
    matrices: title -> [T, T], at most four are readable.
    tasks: names of the T tasks in order.
    metric: label of `Row.value`.
  """
  with matplotlib.rc_context(_STYLE):
    top = 0.9 + 0.42 * len(rows)
    bottom = 3.0 if matrices else 0.0
    figure = Figure((_WIDTH, top + bottom), layout='constrained')
    parts = figure.subfigures(
      2 if matrices else 1,
      1,
      squeeze=False,
      height_ratios=[top, bottom] if matrices else [1],
    )[:, 0]
    left, right = parts[0].subplots(1, 2, sharey=True)
    _draw_bars(left, rows, [row.value for row in rows], metric)
    lost = [row.more.get('forgetting') for row in rows]
    _draw_bars(right, rows, lost, 'forgetting', ends=False)
    if matrices:
      grid = parts[1].subplots(1, len(matrices), squeeze=False)[0]
      for i, (name, matrix) in enumerate(matrices.items()):
        _draw_matrix(grid[i], matrix, tasks, name, rows=i == 0)
    alt = f'{_bars_alt(rows, metric)} {_matrix_alt(matrices)}'
    return _picture(figure, alt)
