"""Fisher information of a classifier, by its name."""

from fmeta.fisher import labels
from fmeta.fisher.batched import batched_fisher
from fmeta.fisher.diagonal import (
  empirical_fisher,
  exact_fisher,
  sampled_fisher,
)

__all__ = [
  'batched_fisher',
  'empirical_fisher',
  'exact_fisher',
  'labels',
  'sampled_fisher',
]
