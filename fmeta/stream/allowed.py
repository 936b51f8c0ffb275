"""Seen and unseen classes as a column, for `fmeta.continual.masked`."""

from collections.abc import Sequence

import numpy as np

from fmeta.data import check_columns
from fmeta.errors import UsageError
from fmeta.stream.tasks import Task


def with_allowed(tasks: Sequence[Task], masks: np.ndarray) -> list[Task]:
  """The same tasks, each example with the classes that it may answer.

    masks = allowed_classes(groups, 10, 'class')
    train = with_allowed(train, masks)
    after_task_k = with_allowed(test[: k + 1], masks[k])

  Masks tell of the task; a task-free method gets tasks without them.

  Args:
    tasks: a stream of T tasks.
    masks: bool [T, C], a row per task, or [C], the same for all of them.

  Raises:
    UsageError: masks of another shape or type, or a label that its own mask
      forbids.
  """
  masks = np.asarray(masks)
  if masks.dtype != bool or masks.ndim not in (1, 2):
    raise UsageError(
      f'masks of {masks.dtype} {masks.shape}; give bool [classes] or'
      ' [tasks, classes], see fmeta.stream.allowed_classes'
    )
  if masks.ndim == 1:
    masks = np.tile(masks, (len(tasks), 1))
  if len(masks) != len(tasks):
    raise UsageError(
      f'{len(masks)} masks for {len(tasks)} tasks; give one row for each'
    )
  return [
    _with_mask(task, mask) for task, mask in zip(tasks, masks, strict=True)
  ]


def _with_mask(task: Task, mask: np.ndarray) -> Task:
  size = check_columns(task.columns)
  label = np.asarray(task.columns.get('label', np.zeros(0, np.int64)))
  wrong = ~np.isin(label, np.flatnonzero(mask))
  if wrong.any():
    raise UsageError(
      f'label {label[wrong][0]} of task {task.name!r} is not among the classes'
      f' {np.flatnonzero(mask).tolist()} that it may answer; give the groups'
      ' that the tasks were cut by'
    )
  return Task(task.name, {**task.columns, 'allowed': np.tile(mask, (size, 1))})
