"""What a stream of tasks did: accuracy, forgetting, accuracy matrices."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from fmeta.errors import UsageError
from fmeta.report import style
from fmeta.report.figures import bars_alt, draw_bars
from fmeta.report.style import Picture


def heatmap(
  matrix: ArrayLike, tasks: Sequence[str], *, title: str = ''
) -> Picture:
  """One accuracy matrix [T, T] in percent; NaN cells stay empty."""
  with style.house():
    side = 1.6 + 0.55 * len(tasks)
    figure = Figure((side + 0.4, side), layout='constrained')
    axes = figure.add_subplot()
    _draw_matrix(axes, matrix, tasks, title, _scale([matrix]))
    return style.picture(figure, _matrix_alt({title or 'stream': matrix}))


def _matrix_alt(matrices: Mapping[str, ArrayLike]) -> str:
  parts = []
  for name, matrix in matrices.items():
    last = np.asarray(matrix, float)[-1]
    parts.append(f'{name} ' + ', '.join(f'{100 * v:.0f}' for v in last))
  return 'Accuracy per task in percent after the last task: ' + '; '.join(parts)


def _scale(matrices: Iterable[ArrayLike]) -> tuple[float, float]:
  """One colour scale for all: the range of the numbers, to whole tens."""
  values = 100 * np.concatenate([np.ravel(m) for m in matrices])
  return (
    10 * math.floor(np.nanmin(values) / 10) - 10,
    10 * math.ceil(np.nanmax(values) / 10) + 10,
  )


def _draw_matrix(axes: Axes, matrix, tasks, title, scale, rows=True) -> None:
  shown = 100 * np.asarray(matrix, float)
  if shown.shape != (len(tasks), len(tasks)):
    raise UsageError(
      f'matrix {title!r} has shape {shown.shape} for {len(tasks)} tasks; '
      'give [T, T]'
    )
  low, high = scale
  axes.imshow(shown, cmap='Blues', vmin=low, vmax=high, aspect='equal')
  edges = np.arange(len(tasks) + 1) - 0.5
  axes.set_xticks(edges, minor=True)
  axes.set_yticks(edges, minor=True)
  axes.grid(which='minor', color='white', lw=1.5)
  below = [f'on {task}' for task in tasks]
  axes.set_xticks(range(len(tasks)), below, rotation=45, ha='right', fontsize=8)
  beside = [f'after {task}' for task in tasks] if rows else [''] * len(tasks)
  axes.set_yticks(range(len(tasks)), beside, fontsize=8)
  axes.tick_params(which='both', length=0)
  axes.spines[:].set_visible(False)
  axes.set_title(title, fontsize=10)
  if len(tasks) <= 8:  # with more the numbers would touch
    _draw_numbers(axes, shown, low + 0.6 * (high - low))


def _draw_numbers(axes: Axes, shown: np.ndarray, dark: float) -> None:
  for (i, j), value in np.ndenumerate(shown):
    if np.isfinite(value):
      colour = 'white' if value > dark else style.INK
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
  with style.house():
    top = 0.9 + 0.42 * len(rows)
    bottom = 3.0 if matrices else 0.0
    figure = Figure((style.WIDTH, top + bottom), layout='constrained')
    parts = figure.subfigures(
      2 if matrices else 1,
      1,
      squeeze=False,
      height_ratios=[top, bottom] if matrices else [1],
    )[:, 0]
    left, right = parts[0].subplots(1, 2, sharey=True)
    values = [row.value for row in rows]
    draw_bars(left, rows, values, f'{metric} (%), 95% CI', room=0.22)
    draw_bars(
      right,
      rows,
      [row.more.get('forgetting') for row in rows],
      'forgetting (points, lower is better)',
      colour=style.COLOURS[1],
      ends=False,
      room=0.22,
    )
    if matrices:
      scale = _scale(matrices.values())
      grid = parts[1].subplots(1, len(matrices), squeeze=False)[0]
      for i, (name, matrix) in enumerate(matrices.items()):
        _draw_matrix(grid[i], matrix, tasks, name, scale, rows=i == 0)
    alt = [bars_alt(rows, metric), _forgetting_alt(rows)]
    alt += [_matrix_alt(matrices)] if matrices else []
    return style.picture(figure, ' '.join(alt))


def _forgetting_alt(rows: Sequence[Any]) -> str:
  lost = [(row.name, row.more.get('forgetting')) for row in rows]
  shown = ', '.join(
    f'{name} {100 * value:.1f}' for name, value in lost if value is not None
  )
  return f'Forgetting in points: {shown or "not measured"}.'
