"""Tunings that train a few kinds of small leaves."""

from fmeta.tuning import select
from fmeta.types import Tuning

BIASES = '(.*/)?bias'
# Our models call every normalisation `norm`.
NORMS = '(.*/)?norm/(scale|bias)'


def bitfit(*, also: tuple[str, ...] = ()) -> Tuning:
  """Only biases move, those of norms included.

  Ben Zaken et al. 2022, https://arxiv.org/abs/2106.10199, section 3; there
  the new head moves too: `also=('head/.*',)`.

  Args:
    also: patterns of other parameters that move.
  """
  return select(BIASES, *also)


def norm_tuning(*, also: tuple[str, ...] = ()) -> Tuning:
  """Only scales and biases of normalisation layers move.

  Qi et al. 2022, https://arxiv.org/abs/2211.08682 (LayerNorm-tuning); for
  batch norm, whose statistics then move as well, Frankle et al. 2021,
  https://arxiv.org/abs/2003.00152.

  Args:
    also: patterns of other parameters that move, such as a new head.
  """
  return select(NORMS, *also)
