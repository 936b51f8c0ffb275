"""Accuracy along a stream: of each task, and of all seen so far."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike

from fmeta import metrics
from fmeta.errors import UsageError
from fmeta.report import style
from fmeta.report.figures import Line, curves
from fmeta.report.style import Picture

_LONGEST = 40  # letters of a name in the key


def averages(matrices: Mapping[str, Sequence[ArrayLike]]) -> Picture:
  """Mean accuracy on the tasks seen so far, after each task, per method.

  Args:
    matrices: method -> accuracy matrices [T, T] of its seeds; two or more give
      a band, the 95% t-interval as far as it is an accuracy.
  """
  lines = []
  for name, runs in matrices.items():
    values = np.array([metrics.average_over_time(run) for run in runs])
    x = list(range(1, values.shape[1] + 1))
    ends = None
    if len(runs) > 1:
      # Two seeds may give -30 to 190 %, beside which no curve can be seen.
      ends = [
        (max(low, 0.0), min(high, 1.0))
        for low, high in (metrics.mean_t(each).ci95 for each in values.T)
      ]
    mean = values.mean(0).tolist()
    lines.append(Line(name, x, mean, ends))
  return curves(
    lines, xlabel='tasks learned', ylabel='accuracy on the tasks seen so far'
  )


def over_time(
  accuracy: Mapping[str, Sequence[ArrayLike]],
  tasks: Sequence[str],
  *,
  steps: Sequence[float] | None = None,
  ends: Sequence[float] | None = None,
) -> Picture:
  """A small panel per task: its accuracy from when it is learned.

  Args:
    accuracy: method -> [E, T] of each of its seeds, drawn as their mean and,
      where there are two or more, as a band from lowest to highest; NaN is not
      drawn. Accuracy matrices will do.
    tasks: names of the T tasks in order.
    steps: [E], where on the axis; default 1..E, tasks learned.
    ends: [T], where each task has been learned, a dotted line; default 1..T.

  Raises:
    UsageError: if shapes do not fit.
  """
  points = _points(accuracy, tasks)
  axis = np.arange(1, points + 1) if steps is None else np.asarray(steps)
  marks = np.arange(1, len(tasks) + 1) if ends is None else np.asarray(ends)
  if len(axis) != points or len(marks) != len(tasks):
    raise UsageError(
      f'{len(axis)} steps and {len(marks)} ends for {points} evaluations of'
      f' {len(tasks)} tasks; give one step per evaluation, one end per task'
    )
  across = min(len(tasks), 5)
  down = -(-len(tasks) // across)
  key = -(-len(accuracy) // _key_columns(accuracy))
  with style.house():
    size = (style.WIDTH, 1.45 * down + 0.19 * key + 0.7)
    figure = Figure(
      size, layout=ConstrainedLayoutEngine(h_pad=0.04, w_pad=0.04)
    )
    grid = figure.subplots(
      down, across, squeeze=False, sharex=True, sharey=True
    )
    for place, axes in enumerate(grid.ravel()):
      if place >= len(tasks):
        axes.set_visible(False)
        continue
      _draw_task(axes, accuracy, place, axis, float(marks[place]))
      axes.set_title(style.short(tasks[place], 100 // across), fontsize=9)
    _label(
      figure, grid, len(tasks), 'tasks learned' if steps is None else 'steps'
    )
    band = any(len(runs) > 1 for runs in accuracy.values())
    how = '\n(mean, lowest to highest)' if band else ''
    figure.supylabel(f'accuracy on the task (%){how}', fontsize=9)
    _legend(figure, list(accuracy), grid[0, 0].get_lines()[1:])
    return style.picture(figure, _alt(accuracy, tasks))


def _points(accuracy: Mapping[str, Sequence[ArrayLike]], tasks) -> int:
  """The common number of evaluations."""
  if not accuracy or not all(len(runs) for runs in accuracy.values()):
    raise UsageError('no accuracies to draw; give one run per method or more')
  shapes = {np.shape(run) for runs in accuracy.values() for run in runs}
  shape = next(iter(shapes))
  if len(shapes) > 1 or len(shape) != 2 or shape[1] != len(tasks):
    raise UsageError(
      f'accuracies of shapes {sorted(shapes)} for {len(tasks)} tasks; give'
      ' every run the same [E, T]'
    )
  return shape[0]


def _draw_task(axes: Axes, accuracy, place: int, axis, end: float) -> None:
  from_here = axis >= end
  axes.axvline(end, color=style.GREY, lw=0.9, ls=':')
  for index, runs in enumerate(accuracy.values()):
    colour, marker = style.look(index)
    values = 100 * np.array([np.asarray(run, float)[:, place] for run in runs])
    shown = from_here & np.isfinite(values).all(0)
    x, y = axis[shown], values[:, shown]
    # A marker on every point of a long curve would hide the curve.
    look: dict[str, Any] = {'markevery': max(1, len(x) // 8), 'ms': 3.5}
    axes.plot(x, y.mean(0), color=colour, marker=marker, lw=1.4, **look)
    if len(runs) > 1:
      axes.fill_between(x, y.min(0), y.max(0), color=colour, alpha=0.16, lw=0)
  axes.grid(color=style.FAINT)
  axes.tick_params(labelsize=8)


def _label(figure: Figure, grid, count: int, xlabel: str) -> None:
  across = grid.shape[1]
  for place in range(max(count - across, 0), count):
    # The lowest panel of each column, also where the last row is not full.
    grid.ravel()[place].tick_params(labelbottom=True)
  grid[0, 0].xaxis.set_major_locator(
    MaxNLocator(4, integer=True, steps=[1, 2, 5, 10])
  )
  figure.supxlabel(xlabel, fontsize=9)


def _key_columns(names: Iterable[str]) -> int:
  """How many names fit side by side: some 132 letters, 8 for each line."""
  lengths = [min(len(name), _LONGEST) + 8 for name in names]
  return min(len(lengths), max(1, 132 // max(lengths)))


def _legend(figure: Figure, names: Sequence[str], lines) -> None:
  figure.legend(
    lines,
    [style.short(name, _LONGEST) for name in names],
    loc='outside upper center',
    ncols=_key_columns(names),
    frameon=False,
    fontsize=8,
  )


def _alt(accuracy: Mapping[str, Sequence[ArrayLike]], tasks) -> str:
  parts = []
  for name, runs in accuracy.items():
    last = np.mean([np.asarray(run, float)[-1] for run in runs], axis=0)
    shown = ', '.join(
      f'{task} {100 * v:.0f}' for task, v in zip(tasks, last, strict=True)
    )
    parts.append(f'{name}: {shown}')
  return (
    'Line charts of accuracy per task in percent over the stream; at its end '
    + '; '.join(parts)
  )
