"""Tasks whose classes run into each other."""

from collections.abc import Sequence

import numpy as np

from fmeta.draw import BLUR, permutation, random_words
from fmeta.errors import UsageError
from fmeta.stream.tasks import Task, check_alike, joint


def blurry(
  tasks: Sequence[Task],
  percent: int,
  seed: int,
  *,
  disjoint: Sequence[int] = (),
) -> list[Task]:
  """Exactly M% of a task's examples come from other tasks.

  Every task gives floor(n M / 100) of its n examples away, drawn at random,
  and gets as many from the others, none of its own: sizes stay, each example
  stays in the stream once. Blurry-M of Bang et al. 2021
  (https://arxiv.org/abs/2103.17230) with the M% dealt out at random instead of
  evenly over the others; with `disjoint` the i-Blurry-N-M of Koh et al. 2022
  (https://arxiv.org/abs/2110.10031), n then counting the classes that blur.
  (Their released code may deal an example back to its own task; here M% is
  exact.)

  Args:
    tasks: a stream of two or more, with a column `label` if `disjoint` is
      given.
    percent: M, 0..100.
    seed: of what is given and to whom.
    disjoint: the classes (i-Blurry's N%) all of whose examples stay.

  Raises:
    UsageError: an impossible M, or a task that gives more than all others.
  """
  check_alike(tasks)
  if percent not in range(101):
    raise UsageError(f'percent {percent!r}; give a whole number 0..100')
  given = [
    _given(task, position, int(percent), seed, disjoint)
    for position, task in enumerate(tasks)
  ]
  owner = np.repeat(np.arange(len(tasks)), [len(rows) for rows in given])
  getter = _dealt(owner, [task.name for task in tasks], seed)
  sizes = [len(next(iter(task.columns.values()))) for task in tasks]
  starts = np.cumsum(sizes) - sizes
  pool = np.concatenate(given) + np.repeat(starts, [len(g) for g in given])
  everything = joint(tasks).columns
  out = []
  for position, task in enumerate(tasks):
    rows = starts[position] + np.arange(sizes[position])
    # What came takes the places of what went: sizes and the rest stay.
    rows[given[position]] = pool[getter == position]
    out.append(Task(task.name, {k: v[rows] for k, v in everything.items()}))
  return out


def _given(task, position, percent, seed, disjoint) -> np.ndarray:
  """The rows that a task gives away, in ascending order."""
  size = len(next(iter(task.columns.values())))
  may = np.arange(size)
  if len(disjoint):
    label = np.asarray(task.columns['label'])
    may = np.flatnonzero(~np.isin(label, disjoint))
  order = permutation(seed, BLUR, position + 1, len(may))
  return np.sort(may[order[: len(may) * percent // 100]])


def _dealt(owner: np.ndarray, names: Sequence[str], seed: int) -> np.ndarray:
  """For each given row who gets it: as many as they gave, none their own.

  A shuffle; then each row that came back to its owner is swapped with a random
  one of those where that leaves neither with their own.
  """
  counts = np.bincount(owner, minlength=len(names))
  if 2 * counts.max() > counts.sum():
    task = names[int(counts.argmax())]
    raise UsageError(
      f'task {task!r} gives {counts.max()} examples to others that give only'
      f' {counts.sum() - counts.max()} together; lower the percentage or even'
      ' out the tasks'
    )
  getter = owner[permutation(seed, BLUR, len(names) + 1, len(owner))]
  words = random_words(seed, BLUR, 0, len(owner))
  for at in np.flatnonzero(owner == getter):
    if owner[at] != getter[at]:  # an earlier swap has moved it
      continue
    free = np.flatnonzero((owner != owner[at]) & (getter != owner[at]))
    other = free[int(words[at]) % len(free)]
    getter[[at, other]] = getter[[other, at]]
  return getter
