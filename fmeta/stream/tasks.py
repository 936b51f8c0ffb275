"""Tasks: cutting labelled examples, and putting them together.

Class-incremental: `by_classes`, labels unchanged. Task-incremental: the same
with `with_allowed` (one head, of which a task's classes may be answered), or
`relabel=True` and a head per task. Domain-incremental: the same labels in every
task, by `by_column`, `permuted` or `rotated`, or by `relabel=True` and one head
(the three scenarios of van de Ven & Tolias 2019,
https://arxiv.org/abs/1904.07734).
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from fmeta.data import Columns, check_columns, check_labels, column, take
from fmeta.errors import UsageError, suggest
from fmeta.stream.classes import Groups, named_groups


class Task(NamedTuple):
  """One stretch of a stream.

  Attributes:
    name: for tables and plots.
    columns: its examples.
  """

  name: str
  columns: Columns


def by_classes(
  columns: Columns, groups: Groups, *, relabel: bool = False
) -> list[Task]:
  """One task per group of classes.

  Call it with the same groups for each split: tasks and labels then align.

  Args:
    columns: examples with an integer `label`.
    groups: labels of each task, for example `[[0, 1], [2, 3]]`, or a mapping
      from task names to labels.
    relabel: labels become positions in the task's group: one head of that
      size for all tasks (domain-incremental) or a head each
      (task-incremental).

  Raises:
    UsageError: no groups, an empty one, a class without examples or in two
      groups, labels that are no integers.
  """
  check_columns(columns)
  label = column(columns, 'label')
  if label.dtype.kind not in 'biu':
    raise UsageError(
      f"column 'label' holds {label.dtype}; by_classes cuts by integers: "
      'number the classes, or cut by_column'
    )
  named = named_groups(groups)
  _check_groups(named, label)
  return [
    _class_task(name, columns, label, group, relabel)
    for name, group in named.items()
  ]


def _class_task(
  name: str,
  columns: Columns,
  label: np.ndarray,
  group: Sequence[int],
  relabel: bool,
) -> Task:
  rows = np.flatnonzero(np.isin(label, group))
  out = take(columns, rows)
  if relabel:
    order = np.argsort(group)
    found = np.searchsorted(np.asarray(group)[order], out['label'])
    out['label'] = order[found].astype(label.dtype)
  return Task(name, out)


def _check_groups(
  named: Mapping[str, Sequence[int]], label: np.ndarray
) -> None:
  if not named:
    raise UsageError('no groups of classes; give at least one')
  present = [str(value) for value in np.unique(label)]
  owner = {}
  for name, group in named.items():
    if not group:
      raise UsageError(f'task {name!r} is empty; give it at least one class')
    for value in group:
      if str(value) not in present:
        raise UsageError(
          f'no example has class {value} of task {name!r}'
          f'{suggest(str(value), present)}'
        )
      if value in owner:
        raise UsageError(
          f'class {value} is in {owner[value]!r} and again in {name!r}; name'
          ' it once'
        )
      owner[value] = name


def by_column(
  columns: Columns,
  key: str,
  order: Sequence[Any] | None = None,
  *,
  keep: bool = False,
) -> list[Task]:
  """One task per value of a column, labels unchanged (domain-incremental).

  A column of numbers would travel in every batch and tell its task, so it is
  left out of the tasks, unless it is the label; strings never reach a batch.

  Args:
    columns: examples.
    key: the column that names the task, of integers or strings.
    order: its values in stream order; default sorted. Values left out are
      left out of the stream.
    keep: whether a column of numbers stays.

  Raises:
    UsageError: an unknown column, a value without examples or named twice.
  """
  check_columns(columns)
  values = column(columns, key)
  tells = values.dtype.kind in 'biuf' and key != 'label' and not keep
  kept = {k: v for k, v in columns.items() if not (tells and k == key)}
  present = np.unique(values).tolist()
  # Through numpy, so that np.int64(3) and 3 are the same value.
  wanted = present if order is None else np.asarray(list(order)).tolist()
  tasks = []
  for position, value in enumerate(wanted):
    if value not in present:
      raise UsageError(
        f'no example has {key} {value!r}'
        f'{suggest(str(value), map(str, present))}'
      )
    if value in wanted[:position]:
      raise UsageError(
        f'{key} {value!r} comes twice in the order; once will do'
      )
    rows = np.flatnonzero(values == value)
    tasks.append(Task(str(value), take(kept, rows)))
  if not tasks:
    raise UsageError(f'the order of {key!r} is empty; name at least one value')
  return tasks


def split_stream(
  train: Columns,
  test: Columns,
  key: str,
  order: Sequence[Any] | None = None,
  *,
  keep: bool = False,
) -> tuple[list[Task], list[Task]]:
  """`by_column` of two splits, aligned: task k is one domain in both.

  Raises:
    UsageError: if a training task has no test examples, and as `by_column`.
  """
  check_columns(train)
  check_columns(test)
  if order is None:
    order = np.unique(column(train, key)).tolist()
  first = by_column(train, key, order, keep=keep)
  return first, by_column(test, key, order, keep=keep)


def of_datasets(
  sources: Mapping[str, Columns], classes: Sequence[int] | None = None
) -> list[Task]:
  """One task per data set, in order.

  Call it with the same `classes` for each split: labels then align.

  Args:
    sources: name -> examples; all have the same columns.
    classes: how many classes each data set has: labels then follow each
      other, so that no two data sets share one (class-incremental). None:
      labels unchanged (domain-incremental).

  Raises:
    UsageError: no data sets, other columns or image sizes, a label that its
      number of classes does not allow.
  """
  tasks = [Task(name, columns) for name, columns in sources.items()]
  check_alike(tasks)
  if classes is None:
    return tasks
  if len(classes) != len(tasks):
    raise UsageError(
      f'{len(classes)} numbers of classes for {len(tasks)} data sets; give one'
      ' for each'
    )
  firsts = np.cumsum(classes) - classes
  out = []
  for task, count, first in zip(tasks, classes, firsts, strict=True):
    label = column(task.columns, 'label')
    check_labels(label, count)
    shifted = (label + first).astype(label.dtype)
    out.append(Task(task.name, {**task.columns, 'label': shifted}))
  return out


def numbered(tasks: Sequence[Task], key: str = 'task') -> list[Task]:
  """The same tasks, each example with the position of its task.

  The only way by which a batch learns of it: what reads that column is not
  task-free.

  Args:
    tasks: a stream.
    key: the new column, int32.

  Raises:
    UsageError: if there is such a column already.
  """
  out = []
  for position, task in enumerate(tasks):
    if key in task.columns:
      raise UsageError(
        f'task {task.name!r} has a column {key!r} already; give another key'
      )
    size = check_columns(task.columns)
    number = np.full(size, position, np.int32)
    out.append(Task(task.name, {**task.columns, key: number}))
  return out


def check_alike(tasks: Sequence[Task]) -> None:
  """Refuses tasks whose examples cannot stand in one batch.

  Raises:
    UsageError: naming the first task that differs from the first one.
  """
  if not tasks:
    raise UsageError('no tasks to join; give at least one')
  keys, shapes = sorted(tasks[0].columns), _row_shapes(tasks[0])
  for task in tasks:
    if sorted(task.columns) != keys:
      raise UsageError(
        f'task {task.name!r} has columns {sorted(task.columns)}, the first'
        f' has {keys}; give all tasks the same'
      )
    if _row_shapes(task) != shapes:
      raise UsageError(
        f'task {task.name!r} has rows of {_row_shapes(task)}, the first has'
        f' {shapes}; bring all tasks to one size'
      )


def _row_shapes(task: Task) -> dict[str, tuple[int, ...]]:
  return {k: np.shape(task.columns[k])[1:] for k in sorted(task.columns)}


def joint(tasks: Sequence[Task]) -> Task:
  """All tasks at once: the upper bracket of a stream.

  Raises:
    UsageError: if there are no tasks, or their columns differ in name or size.
  """
  check_alike(tasks)
  columns = {
    key: np.concatenate([np.asarray(task.columns[key]) for task in tasks])
    for key in sorted(tasks[0].columns)
  }
  return Task('joint', columns)
