"""Fisher information of a classifier, by its name."""

from fmeta.fisher.per_example import (
  empirical_fisher,
  exact_fisher,
  sampled_fisher,
)

__all__ = ['empirical_fisher', 'exact_fisher', 'sampled_fisher']
