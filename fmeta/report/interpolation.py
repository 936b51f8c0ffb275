"""The curve of a weight-space interpolation (WiSE-FT's figure)."""

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fmeta.errors import UsageError
from fmeta.report import style
from fmeta.report.style import Picture


def interpolation(
  points: Sequence[Mapping[str, float]],
  x: str,
  y: str,
  *,
  start: str = 'pre-trained',
  end: str = 'fine-tuned',
) -> Picture:
  """One metric against another along the line between two models.

  (Wortsman et al. 2022, https://arxiv.org/abs/2109.01903, figure 1.) Both
  axes in percent; a curve that bends up and to the right is better than
  either end.

  Args:
    points: of `soups.interpolation_curve`, in order of alpha.
    x: name of the metric along the horizontal axis, for example the accuracy
      on the training distribution.
    y: of the vertical one, for example on a shifted distribution.
    start: what the first point is called.
    end: what the last is called.

  Raises:
    UsageError: if there are fewer than two points or one lacks a metric.
  """
  _check(points, x, y)
  xs = [100 * point[x] for point in points]
  ys = [100 * point[y] for point in points]
  with style.house():
    figure = Figure((0.6 * style.WIDTH, 4.4), layout='constrained')
    axes = figure.add_subplot()
    axes.plot(xs, ys, 'o-', color=style.COLOURS[0], ms=5, lw=2)
    for k, point in enumerate(points):
      _label(axes, xs, ys, k, point['alpha'], {0: start, len(xs) - 1: end})
    axes.margins(0.14)
    axes.set_xlabel(f'{x} (%)')
    axes.set_ylabel(f'{y} (%)')
    axes.grid(color=style.FAINT)
    return style.picture(figure, _alt(points, x, y))


def _label(axes: Axes, xs, ys, k: int, alpha: float, names: dict) -> None:
  """Alpha beside its point, where the curve is not; the ends with a name."""
  last = len(xs) - 1
  rises = ys[min(k + 1, last)] > ys[max(k - 1, 0)]
  if k in names:
    beside, above = (8 if k == 0 else -8), (-13 if rises == (k == 0) else 6)
  else:
    beside, above = (-6 if rises else 6), 4
  axes.annotate(
    f'{names.get(k, "")} {alpha:.2g}'.strip(),
    (xs[k], ys[k]),
    xytext=(beside, above),
    textcoords='offset points',
    ha='left' if beside > 0 else 'right',
    fontsize=9,
    color=style.INK if k in names else style.MUTED,
    fontweight='bold' if k in names else 'normal',
  )


def _check(points: Sequence[Mapping[str, float]], x: str, y: str) -> None:
  if len(points) < 2:
    raise UsageError(f'{len(points)} points; give at least two')
  for point in points:
    for name in ('alpha', x, y):
      if name not in point:
        raise UsageError(
          f'a point has no {name!r}; it has {sorted(point)}: give metrics '
          'that every evaluation reports'
        )


def _alt(points: Sequence[Mapping[str, float]], x: str, y: str) -> str:
  parts = ', '.join(
    f'{100 * p[x]:.1f} and {100 * p[y]:.1f} at {p["alpha"]:g}' for p in points
  )
  return f'Curve of {x} and {y} in percent by alpha: {parts}.'
