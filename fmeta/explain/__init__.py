"""What fine-tuning changed: weights, activations, answers and their reasons.

The functions take arrays and parameters; `python -m fmeta.explain WORKDIR`
applies them to a finished run and writes `explain.html`.
"""

from fmeta.explain.activations import linear_cka
from fmeta.explain.attribution import integrated_gradients, pixels, tokens
from fmeta.explain.flips import flips
from fmeta.explain.measure import Case, Measured, measure
from fmeta.explain.page import Example, Explained, Page, write
from fmeta.explain.recipe import Recipe
from fmeta.explain.weights import change_ranks, effective_rank, relative_change

__all__ = [
  'Case',
  'Example',
  'Explained',
  'Measured',
  'Page',
  'Recipe',
  'change_ranks',
  'effective_rank',
  'flips',
  'integrated_gradients',
  'linear_cka',
  'measure',
  'pixels',
  'relative_change',
  'tokens',
  'write',
]
