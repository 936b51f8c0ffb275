"""Accuracy on each task at many points of training, and its low points.

Evaluated only after each task, a method that forgets a task and then learns it
again looks as good as one that never forgot: the stability gap (De Lange et
al. 2023, https://arxiv.org/abs/2205.13452). Evaluate often:

  fitted = train.fit(..., evaluate=accuracy_per_task, evaluate_every=10)
  curves = task_curves(fitted.evaluations, names)
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from fmeta.errors import UsageError


class Curves(NamedTuple):
  """Evaluations of T tasks at E steps.

  Attributes:
    steps: int [E], ascending.
    accuracy: [E, T], NaN where a task was not evaluated.
    ends: int [T], ascending; the step at which each task has been learned.
  """

  steps: np.ndarray
  accuracy: np.ndarray
  ends: np.ndarray


def task_curves(
  evaluations: Sequence[Mapping[str, Any]], tasks: Sequence[str]
) -> Curves:
  """The curves of `Fitted.evaluations`.

  A task has been learned at the last evaluation of its stage, or of the phases
  of its stage (`<task>/phase_<k>`).

  Args:
    evaluations: `{'step', 'stage', 'evaluation': {task: accuracy, ...}}`; other
      names than those of tasks are not read.
    tasks: names in the order of the stream.

  Raises:
    UsageError: if a task has no stage or is never evaluated.
  """
  records = sorted(evaluations, key=lambda record: record['step'])
  accuracy = np.full((len(records), len(tasks)), np.nan)
  ends = np.zeros(len(tasks), np.int64)
  stages = [record['stage'] for record in records]
  for column, task in enumerate(tasks):
    own = [
      k
      for k, stage in enumerate(stages)
      if stage == task or stage.startswith(f'{task}/phase_')
    ]
    if not own:
      raise UsageError(
        f'no stage {task!r} among those evaluated, {sorted(set(stages))}; name'
        ' stages after tasks'
      )
    ends[column] = records[own[-1]]['step']
    for row, record in enumerate(records):
      accuracy[row, column] = record['evaluation'].get(task, np.nan)
  steps = np.array([record['step'] for record in records], np.int64)
  curves = Curves(steps, accuracy, ends)
  _check(curves, 1)
  return curves


def accuracy_at_ends(curves: Curves) -> np.ndarray:
  """[T, T]: the accuracy matrix, of the evaluations at the tasks' ends."""
  _check(curves, 1)
  return curves.accuracy[_at(curves, curves.ends)]


def minimum_accuracy(curves: Curves) -> float:
  """Mean of the worst ever seen on the earlier tasks, once learned: min-ACC.

  1/(T-1) sum_{j<T} min_{n > end_j} A_j(n), over all evaluations n after task j
  was learned (De Lange et al. 2023).
  """
  return float(_minima(curves).mean())


def worst_case_accuracy(curves: Curves) -> float:
  """The last task's accuracy and the others' worst: WC-ACC.

  1/T A_T(end) + (1 - 1/T) min-ACC (De Lange et al. 2023): a lower bound of the
  average accuracy that held at every evaluated step.
  """
  last = float(curves.accuracy[_at(curves, curves.ends[-1:])[0], -1])
  num = len(curves.ends)
  return last / num + (1 - 1 / num) * minimum_accuracy(curves)


def stability_gap(curves: Curves) -> float:
  """Mean depth of forgetting that was made good again by the end.

  1/(T-1) sum_{j<T} (A_j(end) - min_{n > end_j} A_j(n)): zero if no task was
  ever worse than at the end. De Lange et al. 2023 name the phenomenon and
  report min-ACC; this difference puts it into one number.
  """
  last = curves.accuracy[_at(curves, curves.ends[-1:])[0], :-1]
  return float((last - _minima(curves)).mean())


def windowed_forgetting(curves: Curves, window: int) -> float:
  """Mean over tasks of the deepest fall within a few evaluations: WF^w.

  1/T sum_j max_{m <= n < m + w} (A_j(m) - A_j(n)), where m and n number the
  evaluations of task j from the first after its learning began to the end of
  the stream: m and n lie in one window of w consecutive ones (De Lange et al.
  2023, https://arxiv.org/abs/2205.13452, who report w = 10 and 100 with an
  evaluation at every step). A task that never fell counts zero. With a longer
  window it is never lower, and with other distances between evaluations it is
  another number.

  Args:
    curves: of at least one task.
    window: w, evaluations; at least 2.

  Raises:
    UsageError: if a window holds no change, or curves are malformed.
  """
  return _largest_change(curves, window, -1)


def windowed_plasticity(curves: Curves, window: int) -> float:
  """Mean over tasks of the steepest rise within a few evaluations: WP^w.

  1/T sum_j max_{m <= n < m + w} (A_j(n) - A_j(m)), numbered as in
  `windowed_forgetting` (De Lange et al. 2023). A task that never rose counts
  zero. What a task gains by its very first step is not in it: the evaluation
  before that step is not the task's.

  Args:
    curves: of at least one task.
    window: w, evaluations; at least 2.

  Raises:
    UsageError: if a window holds no change, or curves are malformed.
  """
  return _largest_change(curves, window, 1)


def _largest_change(curves: Curves, window: int, sign: int) -> float:
  """Mean over tasks of max_{m <= n < m + window} sign (A(n) - A(m))."""
  _check(curves, 1)
  if window < 2:
    raise UsageError(f'window={window}; a change needs at least 2 evaluations')
  begins = [-np.inf, *curves.ends[:-1]]
  upto = curves.steps <= curves.ends[-1]
  largest = np.zeros(len(curves.ends))
  for task, begin in enumerate(begins):
    column = curves.accuracy[upto & (curves.steps > begin), task]
    column = sign * column[~np.isnan(column)]
    for lag in range(1, min(window, len(column))):
      change = (column[lag:] - column[:-lag]).max()
      largest[task] = max(largest[task], change)
  return float(largest.mean())


def _minima(curves: Curves) -> np.ndarray:
  """[T - 1], the lowest accuracy strictly after each task's end."""
  _check(curves, 2)
  upto = curves.steps[:, None] <= curves.ends[-1]
  after = upto & (curves.steps[:, None] > curves.ends[None, :-1])
  values = np.where(after, curves.accuracy[:, :-1], np.nan)
  missing = np.isnan(values).all(0)
  if missing.any():
    raise UsageError(
      f'task {int(missing.argmax())} has no evaluation after its end; evaluate'
      ' every task seen so far'
    )
  return np.nanmin(values, axis=0)


def _at(curves: Curves, steps: np.ndarray) -> np.ndarray:
  """Row numbers of these steps."""
  return np.searchsorted(curves.steps, steps)


def _check(curves: Curves, least: int) -> None:
  steps, accuracy, ends = map(np.asarray, curves)
  if accuracy.shape != (len(steps), len(ends)):
    raise UsageError(
      f'accuracy has shape {accuracy.shape} for {len(steps)} steps and'
      f' {len(ends)} tasks; give [E, T]'
    )
  if len(ends) < least:
    raise UsageError(
      f'curves of {len(ends)} tasks; this needs at least {least}'
    )
  for name, values in (('steps', steps), ('ends', ends)):
    if (np.diff(values) <= 0).any():
      raise UsageError(f'{name} do not ascend: {values.tolist()}; sort them')
  if not np.isin(ends, steps).all():
    raise UsageError(
      f'no evaluation at step {ends[~np.isin(ends, steps)][0]}, where a task'
      ' ends; evaluate there too'
    )
  rows = np.searchsorted(steps, ends)
  if np.isnan(accuracy[rows][np.tril_indices(len(ends))]).any():
    raise UsageError(
      'NaN for a task seen so far at the end of a task; evaluate every task'
      ' seen so far there'
    )
