"""How sure a mean is: over episodes, seeds, groups of test examples."""

from typing import NamedTuple

import numpy as np
import scipy.special
from numpy.typing import ArrayLike

from fmeta.errors import UsageError
from fmeta.metrics.checks import finite_vector, same_length, vector

_DRAWS_PER_CHUNK = 1_000_000  # 8 MB of drawn group indices at a time.


class Interval(NamedTuple):
  """An estimate and its interval; `low` and `high` are its 95% ends."""

  mean: float
  low: float
  high: float

  @property
  def ci95(self) -> tuple[float, float]:
    """The two ends."""
    return (self.low, self.high)

  @property
  def excludes_zero(self) -> bool:
    """Whether zero lies outside: for a difference, whether it is real."""
    return self.low > 0 or self.high < 0


def mean_ci95(values: ArrayLike) -> tuple[float, float]:
  """Mean and half-width 1.96 std / sqrt(n), std with divisor n.

  The few-shot convention for accuracies over n independent episodes (the
  reference code of Finn et al. 2017, https://arxiv.org/abs/1703.03400).
  """
  values = vector(values, 'values').astype(np.float64)
  return float(values.mean()), float(1.96 * values.std() / len(values) ** 0.5)


def mean_t(values: ArrayLike) -> Interval:
  """Mean and 95% interval by Student's t: for a few seeds.

  mean -+ t_{.975, n-1} s / sqrt(n), s with divisor n - 1: exact for normal
  values, where 1.96 in the place of t (4.30 at n = 3) is far too narrow.

  Raises:
    UsageError: for fewer than two values, or any that is not finite.
  """
  values = finite_vector(values, 'values')
  size = len(values)
  if size < 2:
    raise UsageError('one value has no interval; give two or more seeds')
  half = scipy.special.stdtrit(size - 1, 0.975) * values.std(ddof=1) / size**0.5
  mean = float(values.mean())
  return Interval(mean, mean - float(half), mean + float(half))


def paired_t(a: ArrayLike, b: ArrayLike) -> Interval:
  """95% t-interval of mean(a) - mean(b) over the same seeds, pair by pair.

  What a seed or a task order does to both methods cancels.
  """
  first, second = finite_vector(a, 'a'), finite_vector(b, 'b')
  same_length(first, second, 'a and b')
  return mean_t(first - second)


def bootstrap_ci(
  values: ArrayLike,
  groups: ArrayLike | None = None,
  seed: int = 0,
  num_resamples: int = 10_000,
) -> Interval:
  """95% percentile bootstrap of a mean, resampling whole groups.

  Examples of one group (a file, a speaker) are not independent; drawing
  groups with replacement keeps their correlation. The statistic of a resample
  is the ratio sum over its examples / number of its examples (Efron &
  Tibshirani 1993, ch. 13, for the percentile interval).

  Args:
    values: [N], or [seeds, N], which is averaged over seeds first: the
      interval is over test data, for the mean over training seeds.
    groups: [N] group identifiers of any type; None: each example its own.
    seed: of the resampling.
    num_resamples: 10,000 puts the ends' own error near 2% of the width.
  """
  values = np.asarray(values, np.float64)
  if values.ndim == 2:
    values = values.mean(0)
  values = vector(values, 'values')
  sums, sizes = _group_totals(values, groups)
  means = _resampled_means(sums, sizes, seed, num_resamples)
  low, high = np.percentile(means, [2.5, 97.5])
  return Interval(float(values.mean()), float(low), float(high))


def paired_bootstrap(
  a: ArrayLike,
  b: ArrayLike,
  groups: ArrayLike | None = None,
  seed: int = 0,
  num_resamples: int = 10_000,
) -> Interval:
  """95% bootstrap interval of mean(a) - mean(b) on the same examples.

  Both methods see the same resampled groups, so the difficulty of a file
  cancels. `a` and `b` are [N] or [seeds, N] (their seed counts may differ);
  the other arguments are those of `bootstrap_ci`.
  """
  first, second = (
    array.mean(0) if array.ndim == 2 else array
    for array in (np.asarray(a, np.float64), np.asarray(b, np.float64))
  )
  first, second = vector(first, 'a'), vector(second, 'b')
  same_length(first, second, 'a and b')
  return bootstrap_ci(first - second, groups, seed, num_resamples)


def _group_totals(values, groups) -> tuple[np.ndarray, np.ndarray]:
  """Sum and number of values per group, both [G]."""
  if groups is None:
    return values, np.ones_like(values)
  groups = vector(groups, 'groups')
  same_length(values, groups, 'values and groups')
  _, index = np.unique(groups, return_inverse=True)
  return np.bincount(index, weights=values), np.bincount(index).astype(float)


def _resampled_means(sums, sizes, seed, num_resamples) -> np.ndarray:
  """Ratio estimates [num_resamples] over groups drawn with replacement."""
  # Gathering group totals takes a third (400 groups) to a seventh (4,500) of
  # the CPU time of multinomial counts: those pay a binomial per entry.
  rng = np.random.default_rng(seed)
  num_groups = len(sums)
  chunk = max(1, _DRAWS_PER_CHUNK // num_groups)
  means = []
  for start in range(0, num_resamples, chunk):
    shape = (min(chunk, num_resamples - start), num_groups)
    drawn = rng.integers(num_groups, size=shape)
    means.append(sums[drawn].sum(1) / sizes[drawn].sum(1))
  return np.concatenate(means)
