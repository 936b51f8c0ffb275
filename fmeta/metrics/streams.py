"""What a stream of tasks taught and what it cost.

`accuracy[i, j]` is measured on task j after learning task i; entries above
the diagonal may be NaN except where a function says it reads them.

Forgetting has three definitions in the literature that differ on the same
numbers, so each has its own name here: on [[.90], [.95, .80], [.70, .85, .90]]
they give .075, .10 and .125.
"""

import numpy as np
from numpy.typing import ArrayLike

from fmeta.errors import UsageError
from fmeta.metrics.checks import finite_vector, same_length, vector


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
    row = vector(row, f'row {index}').astype(np.float64)
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


def learning_accuracy(accuracy: ArrayLike) -> float:
  """Mean over tasks right after each is learned: 1/T sum_j R[j, j].

  (Riemer et al. 2019, https://arxiv.org/abs/1810.11910.)
  """
  return float(np.diag(_matrix(accuracy, 1)).mean())


def average_over_time(accuracy: ArrayLike) -> np.ndarray:
  """[T], mean over the tasks seen so far: A[i] = 1/i sum_{j<=i} R[i, j]."""
  matrix = _matrix(accuracy, 1)
  seen = np.tril(np.ones(matrix.shape, bool))
  return np.where(seen, matrix, 0.0).sum(1) / seen.sum(1)


def anytime_accuracy(accuracy: ArrayLike) -> float:
  """Mean over the stream of the accuracy on all tasks seen so far.

  1/T sum_i 1/i sum_{j<=i} R[i, j], also known as average incremental accuracy
  (Rebuffi et al. 2017, https://arxiv.org/abs/1611.07725, where classes
  take the place of tasks: the two agree if tasks have as many test examples).
  """
  return float(average_over_time(accuracy).mean())


def intransigence(accuracy: ArrayLike, reference: ArrayLike) -> float:
  """Mean of what is missing on a task when it has just been learned.

  I = 1/T sum_j (b[j] - R[j, j]), the mean of the I_k of Chaudhry et al. 2018
  (https://arxiv.org/abs/1801.10112); negative where the stream does better.

  Args:
    accuracy: [T, T].
    reference: [T], accuracy on task j of a model trained on tasks 1..j
      together.
  """
  matrix = _matrix(accuracy, 1)
  reference = finite_vector(reference, 'reference')
  same_length(matrix, reference, 'accuracy and reference')
  return float((reference - np.diag(matrix)).mean())


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
  baseline = finite_vector(baseline, 'baseline')
  same_length(matrix, baseline, 'accuracy and baseline')
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
