"""What methods achieve against what they cost."""

from collections.abc import Sequence
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import (
  EngFormatter,
  FixedLocator,
  LogLocator,
  NullLocator,
)

from fmeta.errors import UsageError
from fmeta.report import style
from fmeta.report.figures import label_ends
from fmeta.report.style import Picture


class Point(NamedTuple):
  """A method: its cost, its value in [0, 1] and the value's 95% interval."""

  name: str
  cost: float
  value: float
  ci95: tuple[float, float] | None = None


def against_cost(
  points: Sequence[Point], *, cost: str, metric: str = 'forgetting'
) -> Picture:
  """One point per method, named at the right; the cost on a log scale.

  Args:
    points: with costs above zero.
    cost: the axis label, with its unit.
    metric: what `Point.value` is.

  Raises:
    UsageError: if there is none, or a cost is not above zero.
  """
  if not points:
    raise UsageError('no points to draw; give at least one method')
  for point in points:
    if not point.cost > 0:
      raise UsageError(
        f'{point.name!r} costs {point.cost} {cost}; a log scale needs more'
        ' than zero: leave it out'
      )
  with style.house():
    figure = Figure((style.WIDTH, 4.2), layout='constrained')
    axes = figure.add_subplot()
    ends = []
    for index, point in enumerate(points):
      colour, marker = style.look(index)
      value = 100 * point.value
      axes.plot([point.cost], [value], marker, color=colour, ms=8)
      if point.ci95 is not None:
        low, high = (100 * end for end in point.ci95)
        axes.plot([point.cost] * 2, [low, high], color=colour, lw=1.4)
      ends.append((point.cost, value, point.name, colour))
    axes.set_xscale('log')
    _few_ticks(axes, [point.cost for point in points])
    band = ', 95% CI' if any(p.ci95 is not None for p in points) else ''
    axes.set_xlabel(cost)
    axes.set_ylabel(f'{metric} (%){band}')
    axes.margins(0.12)
    axes.grid(color=style.FAINT)
    label_ends(axes, ends)
    return style.picture(figure, _alt(points, cost, metric))


def _few_ticks(axes: Axes, costs: Sequence[float]) -> None:
  """With unit prefixes (3T), and apart where costs are close together."""
  spread = max(costs) / min(costs)
  if spread > 5:
    subs = (1, 2, 5) if spread < 300 else (1,)
    axes.xaxis.set_major_locator(LogLocator(subs=subs))
  else:
    ticks: list[float] = []
    for cost in sorted(float(f'{cost:.2g}') for cost in costs):
      if not ticks or cost > 1.1 * ticks[-1]:
        ticks.append(cost)
    axes.xaxis.set_major_locator(FixedLocator(ticks))
  axes.xaxis.set_major_formatter(EngFormatter(sep=''))
  axes.xaxis.set_minor_locator(NullLocator())


def _alt(points: Sequence[Point], cost: str, metric: str) -> str:
  parts = ', '.join(
    f'{p.name} {100 * p.value:.1f} at {p.cost:.3g}' for p in points
  )
  return f'Points of {metric} in percent against {cost}: {parts}.'
