"""Fisher information of a classifier, by its name.

`fisher.per_example` has the first three one example at a time: slower, and
the reference that they are tested against.
"""

from fmeta.fisher import labels, per_example
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
  'per_example',
  'sampled_fisher',
]
