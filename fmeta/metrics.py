"""What is measured, one equation per function.

All of it is numpy on the host. Predictions are `[N]` class indices, scores
are `[N, C]`, correctness is `[N]` (or `[seeds, N]`) in [0, 1]. An accuracy
matrix `accuracy[i, j]` is measured on task j after learning task i; entries
above the diagonal may be NaN except where a function says it reads them.

Forgetting has three definitions in the literature that differ on the same
numbers, so each has its own name here: on [[.90], [.95, .80], [.70, .85, .90]]
they give .075, .10 and .125.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from fmeta.errors import UsageError

_COUNTS_PER_CHUNK = 4_000_000  # 32 MB of int64 resampling counts at a time.


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


def _vector(values: ArrayLike, name: str) -> np.ndarray:
  array = np.asarray(values)
  if array.ndim != 1 or array.size == 0:
    raise UsageError(
      f'{name} has shape {array.shape}; give one non-empty axis [N]'
    )
  return array


def _same_length(first: np.ndarray, second: np.ndarray, what: str) -> None:
  if len(first) != len(second):
    raise UsageError(
      f'{what} have lengths {len(first)} and {len(second)}; '
      'give one entry per example in each'
    )


def _pair(predictions, labels) -> tuple[np.ndarray, np.ndarray]:
  predictions = _vector(predictions, 'predictions')
  labels = _vector(labels, 'labels')
  _same_length(predictions, labels, 'predictions and labels')
  return predictions, labels


# Classification.


def correctness(predictions: ArrayLike, labels: ArrayLike) -> np.ndarray:
  """1.0 where prediction [N] equals label [N], else 0.0; float64 [N]."""
  predictions, labels = _pair(predictions, labels)
  return (predictions == labels).astype(np.float64)


def accuracy(predictions: ArrayLike, labels: ArrayLike) -> float:
  """Share of predictions [N] that equal their label [N]."""
  return float(correctness(predictions, labels).mean())


def confusion(
  predictions: ArrayLike, labels: ArrayLike, num_classes: int
) -> np.ndarray:
  """Counts [C, C]: row = true class, column = predicted class.

  Raises:
    UsageError: if a class lies outside [0, num_classes).
  """
  predictions, labels = _pair(predictions, labels)
  for name, array in (('prediction', predictions), ('label', labels)):
    if array.min() < 0 or array.max() >= num_classes:
      wrong = array[(array < 0) | (array >= num_classes)][0]
      raise UsageError(
        f'{name} {wrong} is out of range; classes are 0..{num_classes - 1}'
      )
  cells = labels.astype(np.int64) * num_classes + predictions
  counts = np.bincount(cells, minlength=num_classes**2)
  return counts.reshape(num_classes, num_classes)


def macro_f1(
  predictions: ArrayLike, labels: ArrayLike, num_classes: int
) -> float:
  """Mean over classes of F1 = 2 TP / (2 TP + FP + FN).

  A class that is neither predicted nor true has no F1 and is left out, as in
  scikit-learn's `f1_score(average='macro')`.
  """
  counts = confusion(predictions, labels, num_classes)
  doubled = 2 * np.diag(counts)
  total = counts.sum(0) + counts.sum(1)
  return float(np.mean(doubled[total > 0] / total[total > 0]))


def expected_calibration_error(
  probabilities: ArrayLike, labels: ArrayLike, num_bins: int = 15
) -> float:
  """Mean gap between confidence and accuracy over equal-width bins.

  ECE = sum_b |b|/N |accuracy(b) - confidence(b)|; confidence is the largest
  probability, bins are (lower, upper] (Guo et al. 2017,
  https://arxiv.org/abs/1706.04599, eq. 3; 15 bins as in its Table 1).

  Args:
    probabilities: [N, C], rows sum to one.
    labels: [N].
    num_bins: number of bins on [0, 1].
  """
  probabilities = np.asarray(probabilities, np.float64)
  if probabilities.ndim != 2:
    raise UsageError(
      f'probabilities have shape {probabilities.shape}; give [N, C]'
    )
  if not np.allclose(probabilities.sum(1), 1, atol=1e-3):
    raise UsageError('rows do not sum to one; give probabilities, not logits')
  right = correctness(probabilities.argmax(1), labels)
  confidence = probabilities.max(1)
  bins = np.ceil(confidence * num_bins).astype(int).clip(1, num_bins) - 1
  gaps = np.bincount(bins, weights=right - confidence, minlength=num_bins)
  return float(np.abs(gaps).sum() / len(right))


# Intervals.


def mean_ci95(values: ArrayLike) -> tuple[float, float]:
  """Mean and half-width 1.96 std / sqrt(n), std with divisor n.

  The few-shot convention for accuracies over n independent episodes (the
  reference code of Finn et al. 2017, https://arxiv.org/abs/1703.03400).
  """
  values = _vector(values, 'values').astype(np.float64)
  return float(values.mean()), float(1.96 * values.std() / len(values) ** 0.5)


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
  values = _vector(values, 'values')
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
  first, second = _vector(first, 'a'), _vector(second, 'b')
  _same_length(first, second, 'a and b')
  return bootstrap_ci(first - second, groups, seed, num_resamples)


def _group_totals(values, groups) -> tuple[np.ndarray, np.ndarray]:
  """Sum and number of values per group, both [G]."""
  if groups is None:
    return values, np.ones_like(values)
  groups = _vector(groups, 'groups')
  _same_length(values, groups, 'values and groups')
  _, index = np.unique(groups, return_inverse=True)
  return np.bincount(index, weights=values), np.bincount(index).astype(float)


def _resampled_means(sums, sizes, seed, num_resamples) -> np.ndarray:
  """Ratio estimates [num_resamples] over groups drawn with replacement."""
  # How often each of G groups is drawn in G draws is multinomial: one matrix
  # product per chunk instead of gathering examples.
  rng = np.random.default_rng(seed)
  num_groups = len(sums)
  totals = np.stack([sums, sizes], axis=1)
  shares = np.full(num_groups, 1 / num_groups)
  chunk = max(1, _COUNTS_PER_CHUNK // num_groups)
  means = []
  for start in range(0, num_resamples, chunk):
    rows = min(chunk, num_resamples - start)
    drawn = rng.multinomial(num_groups, shares, size=rows) @ totals
    means.append(drawn[:, 0] / drawn[:, 1])
  return np.concatenate(means)


# Streams of tasks.


def _matrix(accuracy: ArrayLike, least: int) -> np.ndarray:
  matrix = np.asarray(accuracy, np.float64)
  if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
    raise UsageError(
      f'accuracy has shape {matrix.shape}; give [T, T], row i after task i'
    )
  if len(matrix) < least:
    raise UsageError(
      f'accuracy covers {len(matrix)} task; this needs at least {least}'
    )
  if np.isnan(matrix[np.tril_indices(len(matrix))]).any():
    raise UsageError(
      'accuracy has NaN on or below the diagonal; '
      'evaluate every task seen so far after each task'
    )
  return matrix


def accuracy_matrix(rows: list[ArrayLike]) -> np.ndarray:
  """[T, T] from T rows of at least 1, 2, ... T accuracies; NaN elsewhere."""
  matrix = np.full((len(rows), len(rows)), np.nan)
  for index, row in enumerate(rows):
    row = _vector(row, f'row {index}').astype(np.float64)
    if not index < len(row) <= len(rows):
      raise UsageError(
        f'row {index} has {len(row)} accuracies; '
        f'give {index + 1} to {len(rows)}'
      )
    matrix[index, : len(row)] = row
  return matrix


def average_accuracy(accuracy: ArrayLike) -> float:
  """Mean over all T tasks after the last: 1/T sum_j R[T, j]."""
  return float(_matrix(accuracy, 1)[-1].mean())


def backward_transfer(accuracy: ArrayLike) -> float:
  """Mean change on earlier tasks after the last one is learned.

  BWT = 1/(T-1) sum_{j<T} (R[T, j] - R[j, j]); negative means forgetting
  (Lopez-Paz & Ranzato 2017, https://arxiv.org/abs/1706.08840, eq. 3).
  """
  matrix = _matrix(accuracy, 2)
  return float((matrix[-1] - np.diag(matrix))[:-1].mean())


def forward_transfer(accuracy: ArrayLike, baseline: ArrayLike) -> float:
  """Mean gain on a task from what came before it.

  FWT = 1/(T-1) sum_{j>1} (R[j-1, j] - b[j]) (Lopez-Paz & Ranzato 2017, eq. 4).

  Args:
    accuracy: [T, T] with the entries just above the diagonal measured.
    baseline: [T], accuracy of the initial, untrained model on each task.
  """
  matrix = _matrix(accuracy, 2)
  baseline = _vector(baseline, 'baseline')
  _same_length(matrix, baseline, 'accuracy and baseline')
  before = np.diag(matrix, k=1)
  if np.isnan(before).any():
    raise UsageError(
      'accuracy[i, i + 1] is NaN; evaluate the next task before learning it'
    )
  return float((before - baseline[1:]).mean())


def forgetting_first_minus_last(accuracy: ArrayLike) -> float:
  """1/(T-1) sum_{j<T} (R[j, j] - R[T, j]): minus the backward transfer."""
  return -backward_transfer(accuracy)


def forgetting_chaudhry(accuracy: ArrayLike) -> float:
  """Mean drop from the best EARLIER row: may be negative.

  F = 1/(T-1) sum_{j<T} (max_{j<=l<T} R[l, j] - R[T, j]) (Chaudhry et al. 2018,
  https://arxiv.org/abs/1801.10112, eq. 3). Rows before task j are not read:
  what was not learned yet cannot be forgotten.
  """
  matrix = _matrix(accuracy, 2)
  return _drop_from_best(matrix[:-1, :-1], matrix[-1, :-1])


def forgetting_max_over_all(accuracy: ArrayLike) -> float:
  """Mean drop from the best row INCLUDING the last: never negative.

  F = 1/(T-1) sum_{j<T} (max_{j<=l<=T} R[l, j] - R[T, j]).
  """
  matrix = _matrix(accuracy, 2)
  return _drop_from_best(matrix[:, :-1], matrix[-1, :-1])


def _drop_from_best(rows: np.ndarray, last: np.ndarray) -> float:
  seen = np.tril(np.ones(rows.shape, bool))
  best = np.where(seen, rows, -np.inf).max(axis=0)
  return float((best - last).mean())
