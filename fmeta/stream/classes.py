"""Which classes come when, and which of them a model may answer."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, get_args

import numpy as np

from fmeta.data import check_labels
from fmeta.draw import CLASS_ORDER, TASK_ORDER, permutation
from fmeta.errors import UsageError, suggest

# Label groups, in the order of the stream; a mapping also names the tasks.
Groups = Sequence[Iterable[int]] | Mapping[str, Iterable[int]]
Scenario = Literal['task', 'class', 'none']


def named_groups(groups: Groups) -> dict[str, list[int]]:
  """The groups by name; `task_<k>` where they have none.

  Raises:
    UsageError: for a group that is no list of integers.
  """
  if isinstance(groups, Mapping):
    pairs = groups.items()
  else:
    pairs = ((f'task_{k}', group) for k, group in enumerate(groups))
  return {str(name): _labels(name, group) for name, group in pairs}


def _labels(name: str, group: Iterable[int]) -> list[int]:
  labels = list(group) if isinstance(group, Iterable) else []
  whole = all(isinstance(label, int | np.integer) for label in labels)
  if not whole or not isinstance(group, Iterable):
    raise UsageError(
      f'group {name!r} is {group!r}; give each task a list of integer labels, '
      'such as [[0, 1], [2, 3]]'
    )
  return [int(label) for label in labels]


def class_orders(
  num_classes: int, tasks: int, seed: int
) -> list[tuple[int, ...]]:
  """Classes in a random order, cut into groups: one task order per seed.

  The same on every machine. Where the classes do not divide, the first groups
  have one more.

  Args:
    num_classes: labels are 0..num_classes - 1.
    tasks: number of groups.
    seed: names the order.

  Raises:
    UsageError: if there are fewer classes than tasks.
  """
  if not 1 <= tasks <= num_classes:
    raise UsageError(
      f'{num_classes} classes do not make {tasks} tasks; give'
      f' 1..{num_classes} tasks'
    )
  order = permutation(seed, CLASS_ORDER, 0, num_classes)
  return [tuple(part.tolist()) for part in np.array_split(order, tasks)]


def task_order(num_tasks: int, seed: int) -> list[int]:
  """The positions of given tasks in a random order, the same everywhere."""
  return permutation(seed, TASK_ORDER, 0, num_tasks).tolist()


def class_mask(groups: Groups, num_classes: int) -> np.ndarray:
  """bool [tasks, num_classes]: the classes of each task.

  Raises:
    UsageError: if a label is outside [0, num_classes).
  """
  named = named_groups(groups)
  mask = np.zeros((len(named), num_classes), bool)
  for row, group in zip(mask, named.values(), strict=True):
    check_labels(np.asarray(group, np.int64), num_classes)
    row[group] = True
  return mask


def allowed_classes(
  groups: Groups, num_classes: int, scenario: Scenario
) -> np.ndarray:
  """bool [tasks, num_classes]: what may be answered while a task lasts.

  Row k is, for the scenario 'task', the classes of task k (the task is known);
  for 'class', those of tasks 0..k (seen so far); for 'none', all.

  Raises:
    UsageError: an unknown scenario, or a label outside [0, num_classes).
  """
  mask = class_mask(groups, num_classes)
  if scenario == 'task':
    return mask
  if scenario == 'class':
    return np.logical_or.accumulate(mask)
  if scenario == 'none':
    return np.ones_like(mask)
  raise UsageError(
    f'no scenario {scenario!r}{suggest(str(scenario), get_args(Scenario))}'
  )
