"""A fine-tuned classifier of images, explained: tiles and heat maps."""

from collections.abc import Sequence

import numpy as np

from fmeta.explain import attribution, figures, page
from fmeta.explain.measure import Case, Measured


def tile(image: np.ndarray, alt: str) -> str:
  """An image [H, W, 3] in [0, 1] as HTML."""
  return page.image_tag(figures.thumbnail(image), alt, 'tile')


def examples(images: np.ndarray) -> list[page.Example]:
  """Every image as a row of the page."""
  return [
    page.Example(tile(image, f'example {index}'))
    for index, image in enumerate(images)
  ]


def explained(
  case: Case,
  images: np.ndarray,
  measured: Measured,
  labels: Sequence[str],
  count: int,
  steps: int = 200,
) -> list[page.Explained]:
  """Heat maps of the flipped examples, then of the first ones.

  Each beside its image, against a black baseline.

  Args:
    case: the run; its model reads `image`.
    images: [N, H, W, 3] in [0, 1], in the order of the measured examples.
    measured: what `measure` gave for the case.
    labels: names of the classes.
    count: how many.
    steps: see `integrated_gradients`. With 50 the completeness error on
      ResNet-20, whose relus bend the path, was 0.3 to 4.2 % (2026-11-24).
  """
  rows = [flip.index for flip in measured.flips]
  rows += [i for i in range(len(images)) if i not in rows]
  out = []
  for row in rows[:count]:
    target = int(measured.after[row].argmax())
    found = attribution.pixels(
      case.forward,
      case.after,
      case.state_after or {},
      images[row],
      target,
      steps=steps,
    )
    shown = tile(images[row], f'example {row}')
    shown += tile(figures.heat(found.values), 'its heat map')
    title = (
      f'{labels[target]} (label {labels[int(measured.labels[row])]}), logit '
      f'{found.total:+.2f} against black'
    )
    out.append(page.Explained(shown, title, found.error))
  return out
