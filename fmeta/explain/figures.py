"""The pictures of the page: blocks side by side, the rates, pixel maps."""

import io
import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from fmeta.explain.measure import BlockRow
from fmeta.report import Picture, style


def _share(row: BlockRow) -> float | None:
  return None if row.rank is None else row.rank[0] / row.rank[1]


# Title, value of a row, and whether the axis is logarithmic.
_PANELS = (
  ('relative weight change', lambda row: row.change, True),
  ('effective rank of it\n(share of full)', _share, False),
  ('1 - CKA of outputs', lambda r: None if r.cka is None else 1 - r.cka, False),
  ('Fisher, after\n(mean per weight)', lambda row: row.fisher, True),
  ('gradient / weight,\nbefore', lambda row: row.ratio, True),
  ('highest rate', lambda row: row.rate, True),
)


def blocks_picture(rows: Sequence[BlockRow]) -> Picture:
  """Six numbers of every block, input at the top; a panel that is all
  unknown is left out.

  Args:
    rows: from input to output.
  """
  panels = [
    (title, [value(row) for row in rows], log)
    for title, value, log in _PANELS
    if any(value(row) is not None for row in rows)
  ]
  with style.house():
    columns = 3
    lines = -(-len(panels) // columns)
    height = lines * (1.15 + 0.27 * len(rows))
    figure = Figure((style.WIDTH, height), layout='constrained')
    axes = figure.subplots(lines, columns, sharey=True, squeeze=False).ravel()
    for place, (title, values, log) in zip(axes, panels, strict=False):
      _draw(place, values, title, log)
    for place in axes[len(panels) :]:
      place.set_visible(False)
    names = [row.name for row in rows]
    for place in axes[::columns]:
      place.set_yticks(range(len(rows)), names)
      place.set_ylim(len(rows) - 0.4, -0.6)
    return style.picture(figure, _alt(rows, panels))


def _draw(
  axes: Axes, values: Sequence[float | None], title: str, log: bool
) -> None:
  """Bars from zero; on a logarithmic axis, where no zero is, points."""
  known = [v for v in values if v is not None and math.isfinite(v)]
  positive = [v for v in known if v > 0]
  log = log and bool(positive) and max(positive) > 20 * min(positive)
  tips = []
  for place, value in enumerate(values):
    if value is None or not math.isfinite(value) or (log and value <= 0):
      tips.append(min(positive) if log else 0.0)
    elif log:
      axes.plot(value, place, 'o', color=style.COLOURS[0], ms=6)
      tips.append(value)
    else:
      axes.barh(place, value, height=0.66, color=style.COLOURS[0])
      tips.append(max(value, 0.0))
  if log:
    axes.set_xscale('log')
    axes.set_xlim(min(positive) / 1.6, max(positive) * 30)
  else:
    axes.set_xlim(0, 1.4 * max(positive, default=1.0))
  for place, (value, tip) in enumerate(zip(values, tips, strict=True)):
    axes.annotate(
      short(value),
      (tip, place),
      xytext=(6, 0),
      textcoords='offset points',
      va='center',
      fontsize=8,
    )
  axes.set_title(title, fontsize=9.5)
  axes.grid(axis='x', color=style.FAINT)
  axes.tick_params(axis='y', length=0)
  axes.tick_params(axis='x', labelsize=8)
  if not log:
    axes.locator_params(axis='x', nbins=4)


def short(value: float | None) -> str:
  """Two or three digits: '0.012', '3.1e-07', 'inf', and 'n/a' for None."""
  if value is None:
    return 'n/a'
  if not value or not math.isfinite(value):
    return f'{value:.0f}'
  return f'{value:.2g}' if abs(value) < 100 else f'{value:.3g}'


def _alt(rows: Sequence[BlockRow], panels) -> str:
  parts = []
  for title, values, _ in panels:
    listed = ', '.join(
      f'{row.name} {short(value)}'
      for row, value in zip(rows, values, strict=True)
    )
    parts.append(f'{" ".join(title.split())}: {listed}')
  return 'Charts of each block. ' + '; '.join(parts) + '.'


def rates_picture(
  rates: Sequence[float], multipliers: dict[str, float]
) -> Picture:
  """The rate of each group of blocks at every step.

  Args:
    rates: the schedule, one per step.
    multipliers: block -> mean multiplier, from input to output.
  """
  groups: dict[float, list[str]] = {}
  for name, value in multipliers.items():
    groups.setdefault(round(value, 9), []).append(name)
  steps = np.arange(1, len(rates) + 1)
  with style.house():
    figure = Figure((style.WIDTH, 3.2), layout='constrained')
    axes = figure.add_subplot()
    for index, (value, names) in enumerate(groups.items()):
      colour = style.COLOURS[index % len(style.COLOURS)]
      curve = value * np.asarray(rates)
      axes.plot(steps, curve, color=colour, label=_named(names, value))
    axes.set_xlabel('step')
    axes.set_ylabel('rate applied')
    axes.set_ylim(bottom=0)
    axes.grid(color=style.FAINT)
    axes.legend(frameon=False, fontsize=8.5)
    listed = '; '.join(
      f'{_named(names, value)}, at most {short(value * max(rates))}'
      for value, names in groups.items()
    )
    return style.picture(figure, f'Rate over {len(rates)} steps: {listed}.')


def _named(names: Sequence[str], value: float) -> str:
  shown = names[0] if len(names) == 1 else f'{names[0]} to {names[-1]}'
  return f'{shown} ({short(value)} x)'


def thumbnail(image: np.ndarray) -> bytes:
  """A PNG of an image [H, W, 3] in [0, 1]."""
  buffer = io.BytesIO()
  pixels = np.clip(np.round(255 * np.asarray(image)), 0, 255)
  Image.fromarray(pixels.astype(np.uint8)).save(buffer, 'PNG')
  return buffer.getvalue()


def heat(values: np.ndarray) -> np.ndarray:
  """Attributions [H, W, C] as colours [H, W, 3]: blue for, orange against.

  Channels are summed; the scale is the 99th percentile of the absolute sum,
  so that one pixel does not fade the rest.
  """
  total = np.asarray(values).sum(-1)
  scale = np.percentile(np.abs(total), 99) or 1.0
  share = np.clip(total / scale, -1, 1)[..., None]
  blue, orange = np.array([0.0, 0.447, 0.698]), np.array([0.835, 0.369, 0.0])
  ink = np.where(share > 0, blue, orange)
  return 1 - np.abs(share) * (1 - ink)
