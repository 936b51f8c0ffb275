"""Bars with intervals and curves with bands."""

import dataclasses
import itertools
import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
import scipy.optimize
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fmeta.errors import UsageError
from fmeta.report import style
from fmeta.report.style import Picture


@dataclasses.dataclass(frozen=True)
class Line:
  """One curve: y [n] over x [n], with `ci` = n pairs (low, high) or None."""

  name: str
  x: Sequence[float]
  y: Sequence[float]
  ci: Sequence[tuple[float, float]] | None = None
  baseline: bool = False


def bars(
  rows: Sequence[Any], *, metric: str = 'accuracy', total: int | None = None
) -> Picture:
  """Horizontal bars of `Row.value` with their intervals, from zero.

  Args:
    rows: `Row`s, drawn from top to bottom; baselines in grey.
    metric: the axis label.
    total: parameters of the model, to add shares to the counts at the right.
  """
  with style.house():
    figure = Figure((style.WIDTH, 1.0 + 0.42 * len(rows)), layout='constrained')
    axes = figure.add_subplot()
    values = [row.value for row in rows]
    draw_bars(axes, rows, values, f'{metric} (%), 95% CI')
    _draw_counts(axes, rows, total)
    return style.picture(figure, bars_alt(rows, metric))


def bars_alt(rows: Sequence[Any], metric: str) -> str:
  """The numbers of a bar chart in words."""
  values = ', '.join(f'{row.name} {100 * row.value:.1f}' for row in rows)
  return f'Bar chart of {metric} in percent: {values}.'


def draw_bars(
  axes: Axes,
  rows: Sequence[Any],
  values: Sequence[float | None],
  label: str,
  *,
  colour: str = style.COLOURS[0],
  ends: bool = True,
  room: float = 0.14,
) -> None:
  """Bars of `values`, a row each, from the top; None reads n/a.

  `ends`: draw `Row.ci95`; `room`: share of the axis kept for the number.
  """
  for place, (row, value) in enumerate(zip(rows, values, strict=True)):
    if value is not None:
      _draw_bar(axes, place, 100 * value, row, colour)
    tip = value or 0.0
    if ends and row.ci95 is not None:
      low, tip = row.ci95
      axes.plot([100 * low, 100 * tip], [place] * 2, color=style.INK, lw=1.4)
      axes.plot([100 * low, 100 * tip], [place] * 2, '|', color=style.INK, ms=7)
    axes.annotate(
      'n/a' if value is None else f'{100 * value:.1f}',
      (max(100 * tip, 0), place),
      xytext=(6, 0),
      textcoords='offset points',
      va='center',
      fontweight='normal' if row.baseline or value is None else 'bold',
    )
  axes.set_yticks(range(len(rows)), [_wrapped(row.name) for row in rows])
  axes.set_ylim(len(rows) - 0.4, -0.6)
  tips = [row.ci95[1] for row in rows if ends and row.ci95 is not None]
  _limits(axes, [v for v in (*values, *tips) if v is not None], room)
  axes.set_xlabel(label)
  axes.grid(axis='x', color=style.FAINT)
  axes.tick_params(axis='y', length=0)


def _wrapped(name: str) -> str:
  return '\n'.join(textwrap.wrap(name, 26))


def _draw_bar(axes, place, value, row, colour) -> None:
  look: dict[str, Any] = {'color': style.GREY if row.baseline else colour}
  if row.ceiling:
    look = {'facecolor': 'white', 'edgecolor': colour, 'hatch': '///'}
  axes.barh(place, value, height=0.66, **look)


def _limits(axes: Axes, values: Sequence[float], room: float) -> None:
  """From zero, since lengths are compared, with room for the numbers."""
  low, high = 100 * min([0.0, *values]), 100 * max([0.01, *values])
  axes.set_xlim(low * 1.15, high + room * (high - low))
  axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
  if low < 0:
    axes.axvline(0, color=style.MUTED, lw=0.8)


def _draw_counts(axes: Axes, rows: Sequence[Any], total: int | None) -> None:
  """Two columns to the right of the bars: trained parameters, their share."""
  if all(row.trainable is None or row.baseline for row in rows):
    return
  place = axes.get_yaxis_transform()
  look = {
    'transform': place,
    'ha': 'right',
    'fontsize': 9,
    'color': style.MUTED,
  }
  right = 1.2 if total else 1.12
  axes.text(right, -0.62, 'trained parameters', va='bottom', **look)
  for index, row in enumerate(rows):
    if row.trainable is None or row.baseline:
      continue
    axes.text(1.1, index, count(row.trainable), va='center', **look)
    if total:
      share = f'{100 * row.trainable / total:.3g}%'
      axes.text(right, index, share, va='center', **look)


def count(number: int | None) -> str:
  """22713216 -> '22.7M'; empty for None."""
  if number is None:
    return ''
  for unit, size in (('M', 1_000_000), ('K', 1_000)):
    if number >= size:
      scaled = number / size
      return f'{scaled:.0f}{unit}' if scaled >= 100 else f'{scaled:.1f}{unit}'
  return str(number)


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
  with style.house():
    figure = Figure((style.WIDTH, 4.4), layout='constrained')
    axes = figure.add_subplot()
    looks = map(style.look, itertools.count())
    ends = []
    for line in lines:
      colour, marker = (style.MUTED, '') if line.baseline else next(looks)
      _draw_line(axes, line, colour, marker)
      ends.append((line.x[-1], 100 * line.y[-1], line.name, colour))
    axes.set_xlabel(xlabel)
    band = ', 95% CI' if any(line.ci for line in lines) else ''
    axes.set_ylabel(f'{ylabel} (%){band}')
    axes.set_title(title)
    axes.grid(color=style.FAINT)
    _integer_ticks(axes, sorted({x for line in lines for x in line.x}))
    label_ends(axes, ends)
    return style.picture(figure, _curves_alt(lines, xlabel, ylabel))


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


def label_ends(axes: Axes, ends: Sequence[tuple]) -> None:
  """Names to the right of the axes, pushed apart where they would touch."""
  low, high = axes.get_ylim()
  step = 0.055 * (high - low)
  places = _spread([y for _, y, _, _ in ends], step, low, high)
  for place, (x, y, name, colour) in zip(places, ends, strict=True):
    axes.annotate(
      textwrap.shorten(name, 30, placeholder='..'),
      (x, y),
      xytext=(1.03, place),
      # Across a share of the axes, so that a log scale will do as well.
      textcoords=axes.get_yaxis_transform(),
      color=style.darker(colour),
      va='center',
      fontweight='bold',
      annotation_clip=False,
      arrowprops={
        'arrowstyle': '-',
        'color': colour,
        'lw': 0.7,
        'alpha': 0.7,
        'relpos': (0, 0.5),
      },
    )


def _spread(
  wanted: Sequence[float], step: float, low: float, high: float
) -> np.ndarray:
  """Positions nearest to `wanted` (least squares), `step` apart or more."""
  order = np.argsort(wanted)
  ladder = step * np.arange(len(order))
  near = scipy.optimize.isotonic_regression(np.array(wanted)[order] - ladder).x
  near = np.clip(near, low, max(high - ladder[-1], low))
  places = np.empty(len(order))
  places[order] = near + ladder
  return places
