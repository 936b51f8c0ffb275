"""The house style of the pictures.

Colours are Okabe and Ito's (distinguishable under the common colour
deficiencies) and never the only difference: bars are named, lines differ in
marker and are named at their end, cells carry their number. Every picture
brings a text alternative made from its numbers.
"""

import contextlib
import dataclasses
import io
from typing import Any

import matplotlib
import matplotlib.colors
from matplotlib.figure import Figure

_DPI = 200  # two device pixels per CSS pixel: sharp on screen and on paper
WIDTH = 8.8  # inches; 845 CSS pixels, the page's column
COLOURS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9')
MARKERS = ('o', 's', '^', 'D', 'v', 'P')
INK, MUTED, GREY, FAINT = '#24292F', '#57606A', '#A7ADB3', '#E4E7EB'
_RULES: Any = {
  'font.family': 'DejaVu Sans',
  'font.size': 10,
  'axes.titlesize': 11,
  'axes.titleweight': 'bold',
  'axes.titlelocation': 'left',
  'axes.labelcolor': INK,
  'axes.edgecolor': '#8B949E',
  'axes.spines.top': False,
  'axes.spines.right': False,
  'axes.axisbelow': True,
  'text.color': INK,
  'xtick.color': INK,
  'ytick.color': INK,
  'figure.facecolor': 'white',
  'figure.constrained_layout.w_pad': 0.1,
  'figure.constrained_layout.h_pad': 0.1,
}


@dataclasses.dataclass(frozen=True)
class Picture:
  """A PNG, its text alternative, and its width in CSS pixels."""

  png: bytes
  alt: str
  width: int


def house() -> contextlib.AbstractContextManager:
  """Draws in the house style; the caller's own rules return afterwards."""
  return matplotlib.rc_context(_RULES)


def look(index: int) -> tuple[str, str]:
  """Colour and marker of the index-th line; no two of 36 share both."""
  turn = index // len(COLOURS)
  return COLOURS[index % len(COLOURS)], MARKERS[(index + turn) % len(MARKERS)]


def short(name: str, width: int = 16) -> str:
  """The name, or its beginning and two dots."""
  return name if len(name) <= width else name[: width - 2] + '..'


def darker(colour: str) -> tuple[float, ...]:
  """A colour for text: the palette's light ones are faint on white."""
  return tuple(0.72 * part for part in matplotlib.colors.to_rgb(colour))


def picture(figure: Figure, alt: str) -> Picture:
  """Renders a figure; the same numbers give the same bytes."""
  buffer = io.BytesIO()
  # Software=None leaves out the stamp of matplotlib's version.
  figure.savefig(buffer, format='png', dpi=_DPI, metadata={'Software': None})
  return Picture(buffer.getvalue(), alt, round(figure.get_figwidth() * 96))
