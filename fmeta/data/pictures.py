"""The plots of the data report, in the house style of `fmeta.report`."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from fmeta.report import style
from fmeta.report.style import Picture

_MOST_BARS = 24  # classes that are named one by one
_LOGARITHMIC = 20  # largest over smallest class that ask for a log scale
_LINE = 90  # letters that fit above the axes


def balance(numbers: Mapping[str, Any]) -> Picture:
  """Shares of the classes: bars of each, or a curve when there are many."""
  counts = {k: np.array(v) for k, v in numbers['balance'].items()}
  few = len(numbers['classes']) <= _MOST_BARS
  height = 1.2 + 0.34 * len(numbers['classes']) if few else 3.6
  with style.house():
    figure = Figure((style.WIDTH, height), layout='constrained')
    axes = figure.add_subplot()
    if few:
      _bars(axes, numbers['classes'], counts)
    else:
      _ranked(axes, counts)
    return style.picture(figure, _balance_alt(counts))


def _bars(axes: Axes, classes: Sequence[str], counts) -> None:
  thick = 0.8 / len(counts)
  for k, (name, row) in enumerate(counts.items()):
    places = np.arange(len(row)) + (k - (len(counts) - 1) / 2) * thick
    shares = row / max(row.sum(), 1)
    axes.barh(places, shares, 0.92 * thick, label=name, color=_colour(k))
  axes.set_yticks(range(len(classes)), [_short(c, 28) for c in classes])
  axes.set_ylim(len(classes) - 0.5, -0.5)
  axes.tick_params(axis='y', length=0)
  axes.set_xlabel('share of the rows of a split')
  axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
  axes.grid(axis='x', color=style.FAINT)
  _legend(axes, len(counts))


def _ranked(axes: Axes, counts) -> None:
  for k, (name, row) in enumerate(counts.items()):
    row = np.sort(row[row > 0])[::-1]
    marker = style.MARKERS[k % len(style.MARKERS)]
    axes.plot(
      np.arange(1, len(row) + 1),
      row,
      marker=marker,
      ms=5,
      markevery=max(len(row) // 12, 1),
      lw=1.8,
      color=_colour(k),
      label=name,
    )
  counted = np.concatenate([row[row > 0] for row in counts.values()])
  if counted.max() > _LOGARITHMIC * counted.min():
    axes.set_yscale('log')
  else:
    axes.set_ylim(bottom=0)
  axes.set_xlabel('class, the largest first')
  axes.set_ylabel('rows')
  axes.grid(color=style.FAINT)
  _legend(axes, len(counts))


def _balance_alt(counts) -> str:
  ends = ', '.join(
    f'{name} {row[row > 0].min():,} to {row.max():,}'
    for name, row in counts.items()
  )
  return f'Rows per class by split: {ends}.'


def sizes(histogram: Mapping[str, Any], label: str, last: bool) -> Picture:
  """Shares of the rows of each split over bins.

  Args:
    histogram: `edges` [B + 1] and `shares`: split -> [B].
    label: of the axis.
    last: the last bin holds all that is longer.
  """
  edges = np.asarray(histogram['edges'])
  with style.house():
    figure = Figure((style.WIDTH, 3.4), layout='constrained')
    axes = figure.add_subplot()
    for k, (name, shares) in enumerate(histogram['shares'].items()):
      axes.stairs(shares, edges, color=_colour(k), lw=1.8, label=name)
      middle = (edges[1:] + edges[:-1]) / 2
      marked = slice(k, None, max(len(middle) // 8, 1))
      marker = style.MARKERS[k % len(style.MARKERS)]
      axes.plot(
        middle[marked],
        np.asarray(shares)[marked],
        marker,
        ms=4.5,
        color=_colour(k),
      )
    axes.set_xlabel(label + (' (the last bin: and more)' if last else ''))
    axes.xaxis.set_major_locator(MaxNLocator(10, integer=last))
    axes.set_ylabel('share of rows')
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_xlim(edges[0], edges[-1])
    axes.set_ylim(bottom=0)
    axes.grid(color=style.FAINT)
    _legend(axes, len(histogram['shares']))
    modes = ', '.join(
      f'{name} {edges[int(np.argmax(shares))]:g}'
      for name, shares in histogram['shares'].items()
    )
    return style.picture(
      figure, f'Histogram of {label}; the fullest bin starts at: {modes}.'
    )


def confusions(pairs: Sequence[Sequence[Any]], most: int = 12) -> Picture:
  """How many labels in doubt go from one class to another.

  Args:
    pairs: (label, suggested, count), the most frequent first.
    most: pairs drawn.
  """
  pairs = list(pairs[:most])
  with style.house():
    size = (style.WIDTH, 1.1 + 0.34 * len(pairs))
    figure = Figure(size, layout='constrained')
    axes = figure.add_subplot()
    counts = [count for *_, count in pairs]
    axes.barh(range(len(pairs)), counts, 0.66, color=style.COLOURS[0])
    for place, count in enumerate(counts):
      axes.annotate(
        f'{count:,}',
        (count, place),
        xytext=(6, 0),
        textcoords='offset points',
        va='center',
        fontweight='bold',
      )
    names = [f'{_short(a, 26)} → {_short(b, 26)}' for a, b, _ in pairs]
    axes.set_yticks(range(len(pairs)), names)
    axes.set_ylim(len(pairs) - 0.4, -0.6)
    axes.set_xlim(0, 1.12 * max(counts))
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.tick_params(axis='y', length=0)
    axes.grid(axis='x', color=style.FAINT)
    axes.set_xlabel('labels in doubt: given → suggested')
    words = ', '.join(f'{a} to {b} {count}' for a, b, count in pairs)
    return style.picture(figure, f'Bar chart of labels in doubt: {words}.')


def thumbnails(
  images: Sequence[np.ndarray], captions: Sequence[str], columns: int
) -> Picture:
  """Images in rows of `columns`, each with two short lines above it."""
  rows = -(-len(images) // columns)
  with style.house():
    figure = Figure((style.WIDTH, 1.55 * rows), layout='constrained')
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
      axes.axis('off')
    for axes, image, caption in zip(grid.flat, images, captions, strict=False):
      shown = image[..., 0] if image.shape[-1] == 1 else image
      axes.imshow(shown, cmap='gray_r', interpolation='nearest')
      axes.set_title(
        caption, fontsize=8, fontweight='normal', loc='center', pad=3
      )
    return style.picture(figure, 'Images: ' + '; '.join(captions) + '.')


def _colour(index: int) -> str:
  return style.COLOURS[index % len(style.COLOURS)]


def _short(text: str, width: int) -> str:
  return text if len(text) <= width else text[: width - 1] + '…'


def _legend(axes: Axes, count: int) -> None:
  if count > 1:
    names = axes.get_legend_handles_labels()[1]
    widest = max(map(len, names)) + 8  # and the line before the name
    # Above the axes, where no bar or line can reach it.
    axes.legend(
      frameon=False,
      loc='lower left',
      bbox_to_anchor=(0, 1),
      ncols=max(min(count, _LINE // widest), 1),
      borderaxespad=0.2,
    )
