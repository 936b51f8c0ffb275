"""Tasks from several data sets: every meta-batch is of one of them."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fmeta.draw import DOMAIN, random_words
from fmeta.errors import UsageError

Source = Callable[[int], Any]


def from_domains(
  sources: Sequence[Source],
  seed: int,
  shares: Sequence[float] | None = None,
) -> Source:
  """Draws the domain of each meta-batch, as Meta-Dataset draws its data set.

  (Triantafillou et al. 2020, https://arxiv.org/abs/1903.03096, section 3.2:
  with equal chance.) To test across domains give `evaluate_episodes` a source
  that is not among them.

  Args:
    sources: `i -> meta-batch` each, for example from `varied_episodes` with
      the same limits: one compiled step serves all that have the same shapes.
    seed: with the index, all that the choice depends on.
    shares: the chance of each source, any positive scale; equal by default.

  Returns:
    `i -> meta-batch`, which is the i-th of its own source's list.

  Raises:
    UsageError: if there is no source, or not one positive share for each.
  """
  chances = np.ones(len(sources)) if shares is None else np.asarray(shares)
  if not len(sources) or len(chances) != len(sources) or chances.min() <= 0:
    raise UsageError(
      f'shares {shares} for {len(sources)} sources; give at least one source '
      'and a positive share for each'
    )
  ends = np.cumsum(chances / chances.sum())

  def source(i):
    place = (random_words(seed, DOMAIN, i, 1)[0] >> np.uint64(11)) * 2.0**-53
    # The last end may fall short of one by a rounding.
    k = min(int(np.searchsorted(ends, place, side='right')), len(ends) - 1)
    return sources[k](i)

  return source
