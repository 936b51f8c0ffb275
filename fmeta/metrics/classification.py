"""Predictions [N] or probabilities [N, C] against labels [N]."""

import numpy as np
from numpy.typing import ArrayLike

from fmeta.errors import UsageError
from fmeta.metrics.checks import same_length, vector


def _pair(predictions, labels) -> tuple[np.ndarray, np.ndarray]:
  predictions = vector(predictions, 'predictions')
  labels = vector(labels, 'labels')
  same_length(predictions, labels, 'predictions and labels')
  return predictions, labels


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
