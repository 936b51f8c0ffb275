"""Streams of tasks: what continual learning moves through, in order.

A stream is a list of `Task`s. Class-incremental: `by_classes`, labels
unchanged. Task-incremental: `by_classes(..., relabel=True)`, labels within
the task. Domain-incremental: `by_column` or `permuted`, the same labels in
every task (the three scenarios of van de Ven & Tolias 2019,
https://arxiv.org/abs/1904.07734).
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from fmeta.data import Columns, check_columns, check_labels, column, take
from fmeta.draw import PIXELS, permutation
from fmeta.errors import UsageError, suggest

# Label groups, in the order of the stream; a mapping also names the tasks.
Groups = Sequence[Iterable[int]] | Mapping[str, Iterable[int]]


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
    relabel: labels become positions in the task's group (task-incremental).

  Raises:
    UsageError: no groups, an empty one, a class without examples or in two
      groups.
  """
  check_columns(columns)
  label = column(columns, 'label')
  named = _named_groups(groups)
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


def _named_groups(groups: Groups) -> dict[str, list[int]]:
  if isinstance(groups, Mapping):
    pairs = groups.items()
  else:
    pairs = ((f'task_{k}', group) for k, group in enumerate(groups))
  return {str(name): [int(c) for c in group] for name, group in pairs}


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


def class_mask(groups: Groups, num_classes: int) -> np.ndarray:
  """bool [tasks, num_classes]: the classes of each task.

  For logits masked to a task, or (by `np.logical_or.accumulate`) to the
  classes seen so far.

  Raises:
    UsageError: if a label is outside [0, num_classes).
  """
  named = _named_groups(groups)
  mask = np.zeros((len(named), num_classes), bool)
  for row, group in zip(mask, named.values(), strict=True):
    check_labels(np.asarray(group, np.int64), num_classes)
    row[group] = True
  return mask


def by_column(
  columns: Columns, key: str, order: Sequence[Any] | None = None
) -> list[Task]:
  """One task per value of a column, labels unchanged (domain-incremental).

  Args:
    columns: examples.
    key: the column that names the task, of integers or strings.
    order: its values in stream order; default sorted. Values left out are
      left out of the stream.

  Raises:
    UsageError: an unknown column, a value without examples or named twice.
  """
  check_columns(columns)
  values = column(columns, key)
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
    tasks.append(Task(str(value), take(columns, rows)))
  if not tasks:
    raise UsageError(f'the order of {key!r} is empty; name at least one value')
  return tasks


def split_stream(
  train: Columns, test: Columns, key: str, order: Sequence[Any] | None = None
) -> tuple[list[Task], list[Task]]:
  """`by_column` of two splits, aligned: task k is one domain in both.

  Raises:
    UsageError: if a training task has no test examples, and as `by_column`.
  """
  check_columns(train)
  check_columns(test)
  if order is None:
    order = np.unique(column(train, key)).tolist()
  return by_column(train, key, order), by_column(test, key, order)


def joint(tasks: Sequence[Task]) -> Task:
  """All tasks at once: the upper bracket of a stream.

  Raises:
    UsageError: if there are no tasks, or their columns differ in name.
  """
  if not tasks:
    raise UsageError('no tasks to join; give at least one')
  keys = sorted(tasks[0].columns)
  for task in tasks:
    if sorted(task.columns) != keys:
      raise UsageError(
        f'task {task.name!r} has columns {sorted(task.columns)}, the first'
        f' has {keys}; give all tasks the same'
      )
  columns = {
    key: np.concatenate([np.asarray(task.columns[key]) for task in tasks])
    for key in keys
  }
  return Task('joint', columns)


def permuted(
  columns: Columns, seed: int, key: str = 'image'
) -> dict[str, np.ndarray]:
  """The same images with their pixels in one fixed random order.

  Channels of a pixel stay together. Give every split the same seed, every
  task another one (permuted MNIST, Goodfellow et al. 2013).

  Args:
    columns: `image` [N, H, W, C].
    seed: names the permutation.
    key: the column of images.

  Raises:
    UsageError: if the images are not [N, H, W, C].
  """
  image = column(columns, key)
  if image.ndim != 4:
    raise UsageError(f'images of shape {image.shape}; give [N, H, W, C]')
  num, height, width, channels = image.shape
  order = permutation(seed, PIXELS, 0, height * width)
  pixels = image.reshape(num, height * width, channels)[:, order]
  return {**columns, key: pixels.reshape(image.shape)}
