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
  return heatmaps({title: matrix}, tasks)


def heatmaps(
  matrices: Mapping[str, ArrayLike], tasks: Sequence[str]
) -> Picture:
  """Accuracy matrices of several methods on one colour scale.

  Args:
    matrices: title -> [T, T] in [0, 1]; NaN cells, tasks that were not learned
      yet, stay empty.
    tasks: names of the T tasks in order.

  Raises:
    UsageError: if there is none, or one has another shape.
  """
  if not matrices:
    raise UsageError('no matrices to draw; give at least one')
  across = min(len(matrices), 3 if len(tasks) <= 6 else 2)
  across = across if len(tasks) <= 12 else 1
  down = -(-len(matrices) // across)
  # Room for 'after <name>', 8 points high and half as wide a letter.
  names = 0.1 + 0.066 * (6 + max(len(style.short(t)) for t in tasks))
  room = style.WIDTH - names - 0.35 * across
  cell = min(0.55, room / across / len(tasks))
  side = len(tasks) * cell
  with style.house():
    size = (names + across * (side + 0.35), down * (side + 0.75 * names + 0.5))
    figure = Figure(size, layout='compressed')
    grid = figure.subplots(down, across, squeeze=False)
    scale = _scale(matrices.values())
    for place, (name, matrix) in enumerate(matrices.items()):
      axes = grid[place // across, place % across]
      _draw_matrix(axes, matrix, tasks, name, scale, place % across == 0, cell)
    for axes in grid.ravel()[len(matrices) :]:
      axes.set_visible(False)
    alt = _matrix_alt({name or 'stream': m for name, m in matrices.items()})
    return style.picture(figure, alt)


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


def _draw_matrix(
  axes: Axes, matrix, tasks, title, scale, rows=True, cell=0.55
) -> None:
  """Draws into axes whose cells are to be `cell` inches wide."""
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
  names = [style.short(task) for task in tasks]
  below = [f'on {name}' for name in names]
  axes.set_xticks(range(len(tasks)), below, rotation=45, ha='right', fontsize=8)
  beside = [f'after {name}' for name in names] if rows else [''] * len(tasks)
  axes.set_yticks(range(len(tasks)), beside, fontsize=8)
  axes.tick_params(which='both', length=0)
  axes.spines[:].set_visible(False)
  axes.set_title(style.short(title, max(12, int(13 * cell * len(tasks)))))
  font = min(8.0, 30 * cell)  # '100' fills at most three quarters of a cell
  if font >= 4.5:
    _draw_numbers(axes, shown, low + 0.6 * (high - low), font)


def _draw_numbers(
  axes: Axes, shown: np.ndarray, dark: float, font: float
) -> None:
  for (i, j), value in np.ndenumerate(shown):
    if np.isfinite(value):
      look = {'color': 'white' if value > dark else style.INK, 'fontsize': font}
      axes.text(j, i, f'{value:.0f}', ha='center', va='center', **look)


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
    matrices: title -> [T, T], four in a line.
    tasks: names of the T tasks in order.
    metric: label of `Row.value`.
  """
  with style.house():
    top = 0.9 + 0.42 * len(rows)
    across = max(1, min(4, len(matrices)))
    lines = -(-len(matrices) // across)
    bottom = 3.0 * lines
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
      grid = parts[1].subplots(lines, across, squeeze=False).ravel()
      cell = (style.WIDTH - 1.0) / across / (len(tasks) + 0.5)
      for i, (name, matrix) in enumerate(matrices.items()):
        first = i % across == 0
        _draw_matrix(grid[i], matrix, tasks, name, scale, first, cell)
      for axes in grid[len(matrices) :]:
        axes.set_axis_off()
    alt = [bars_alt(rows, metric), _forgetting_alt(rows)]
    alt += [_matrix_alt(matrices)] if matrices else []
    return style.picture(figure, ' '.join(alt))


def _forgetting_alt(rows: Sequence[Any]) -> str:
  lost = [(row.name, row.more.get('forgetting')) for row in rows]
  shown = ', '.join(
    f'{name} {100 * value:.1f}' for name, value in lost if value is not None
  )
  return f'Forgetting in points: {shown or "not measured"}.'
