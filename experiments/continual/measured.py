"""A row's runs, one per seed, and what they say: means and intervals."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments.continual import rows
from fmeta import metrics


class Measured(NamedTuple):
  """A row of the table.

  Attributes:
    row: what it is.
    strength: chosen.
    runs: a result per seed, with `matrix` and `seconds`.
  """

  row: rows.Row
  strength: float
  runs: list[dict[str, Any]]


def standard_error(runs: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
  """Mean final accuracy over seeds and its standard error."""
  finals = [final_accuracy(run['matrix']) for run in runs]
  spread = np.std(finals, ddof=1) / len(finals) ** 0.5 if finals[1:] else 0.0
  return float(np.mean(finals)), float(spread)


def final_accuracy(matrix: Sequence[Sequence[float]]) -> float:
  """Mean over tasks after the last, also of a method without a history."""
  return float(np.mean(matrix[-1]))


def _answers(measured: Measured) -> np.ndarray:
  return np.array([run['correct'] for run in measured.runs])


def interval_of(measured: Measured) -> tuple[float, float] | None:
  """95% of the final accuracy.

  Over test rows where orders differ, else over seeds: None for a single one.
  """
  if 'correct' in measured.runs[0]:
    return metrics.bootstrap_ci(_answers(measured)).ci95
  if not measured.runs[1:]:
    return None
  finals = [final_accuracy(run['matrix']) for run in measured.runs]
  return metrics.mean_t(finals).ci95


def difference_of(
  measured: Measured, reference: Measured
) -> metrics.Interval | None:
  """Final accuracy minus the reference's.

  Over test rows, where both answered the same ones (means over orders first);
  else over seeds, None for a single one.
  """
  runs, others = measured.runs, reference.runs
  if 'correct' in runs[0] and 'correct' in others[0]:
    return metrics.paired_bootstrap(_answers(measured), _answers(reference))
  if not runs[1:]:
    return None
  return metrics.paired_difference(
    dict(enumerate(run['matrix'] for run in runs)),
    dict(enumerate(run['matrix'] for run in others)),
    final_accuracy,
  )
