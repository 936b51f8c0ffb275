"""A stream as one list of batches, with its boundaries beside them.

`Flow.batches` is a pure function of the step, as `fmeta.train.Stage` wants it.
No batch says which task it is from or whether one has ended: where tasks end
is known to who holds `Flow.spans`, and batches are cut without regard to it.

  flow = online(tasks, 10, seed)
  stages = [train.Stage(*piece) for piece in flow.pieces()]
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from fmeta.data import Batches, Collate, check_batch_size, numeric
from fmeta.draw import DRIFT, EPOCH, permutation, random_words
from fmeta.errors import UsageError
from fmeta.stream.tasks import Task, joint


class Span(NamedTuple):
  """The steps of a task: `start` and how many."""

  name: str
  start: int
  num_steps: int


class Flow(NamedTuple):
  """What is seen, and, apart from it, when tasks end.

  Attributes:
    batches: `i -> batch`; i counts from the stream's start.
    spans: of the tasks, in order.
  """

  batches: Batches
  spans: tuple[Span, ...]

  @property
  def num_steps(self) -> int:
    """Of the whole stream."""
    return sum(span.num_steps for span in self.spans)

  def pieces(self) -> list[tuple[str, Callable[[int], Any], int]]:
    """Name, batches (i counts from the task's start) and steps of each task."""
    return [
      (
        span.name,
        lambda i, start=span.start: self.batches(start + i),
        span.num_steps,
      )
      for span in self.spans
    ]


def online(
  tasks: Sequence[Task],
  batch_size: int,
  seed: int | None,
  *,
  collate: Collate | None = None,
) -> Flow:
  """A single pass: every example exactly once, task after task.

  A batch may straddle two tasks; the step at which a task's last example comes
  is its last. `weight` float32 [B] is 1; only the rows that fill up the last
  batch of the whole stream have 0 (they repeat its last example).

  Args:
    tasks: a stream; rows of all tasks have the same columns and shapes.
    batch_size: rows of the global batch.
    seed: of the order within a task; None: as the examples stand.
    collate: applied to each batch.

  Raises:
    UsageError: a batch larger than the stream, or a task that begins and ends
      within one batch of its predecessor's.
  """
  columns = numeric(joint(tasks).columns)
  size = check_batch_size(columns, batch_size)
  sizes = np.array([len(next(iter(t.columns.values()))) for t in tasks])
  order = _task_by_task(sizes, seed)
  steps = -(-size // batch_size)
  # One more row than there are examples: what fills up the last batch.
  filled = np.append(order, np.full(steps * batch_size - size, size))
  weight = np.asarray(columns.get('weight', np.ones(size)), np.float32)
  columns['weight'] = weight
  padded = {
    key: np.concatenate([array, array[order[-1:]]])
    for key, array in columns.items()
  }
  padded['weight'][-1] = 0.0
  batches = _cut(padded, filled, batch_size, seed or 0, collate)
  return Flow(batches, _spans(tasks, sizes, batch_size))


def _task_by_task(sizes: np.ndarray, seed: int | None) -> np.ndarray:
  """Rows of the joined tasks in stream order."""
  if seed is None:
    return np.arange(sizes.sum())
  starts = np.cumsum(sizes) - sizes
  return np.concatenate(
    [
      start + permutation(seed, EPOCH, position, int(size))
      for position, (start, size) in enumerate(zip(starts, sizes, strict=True))
    ]
  )


def _cut(columns, rows, batch_size, seed, collate) -> Batches:
  """Batches of a finished list of rows."""
  steps = len(rows) // batch_size

  def rows_of(i):
    if not 0 <= i < steps:
      raise UsageError(
        f'no batch {i}; the stream has {steps} and passes only once'
      )
    return rows[i * batch_size : (i + 1) * batch_size]

  return Batches(columns, batch_size, seed, steps, rows_of, collate)


def _spans(tasks, sizes, batch_size) -> tuple[Span, ...]:
  ends = -(-np.cumsum(sizes) // batch_size)
  starts = np.append(0, ends[:-1])
  spans = []
  for task, start, end in zip(tasks, starts, ends, strict=True):
    if start == end:
      raise UsageError(
        f'task {task.name!r} begins and ends within the last batch of the one'
        f' before; give a batch_size below {batch_size}'
      )
    spans.append(Span(task.name, int(start), int(end - start)))
  return tuple(spans)


def drift_weights(
  num_tasks: int, num_steps: int, width: float = 1.0
) -> np.ndarray:
  """float64 [num_steps, num_tasks]: each task's share of each step's examples.

  Tasks have equal lengths; around the end of each, over `width` of a length,
  its share falls linearly from 1 to 0 as the next one's rises.

  Args:
    num_tasks: T.
    num_steps: S.
    width: 0 (abrupt) to 1 (there is always a mixture, but for a point).

  Raises:
    UsageError: fewer steps than tasks, or a width outside [0, 1].
  """
  if not 1 <= num_tasks <= num_steps:
    raise UsageError(
      f'{num_steps} steps for {num_tasks} tasks; give at least one for each'
    )
  if not 0 <= width <= 1:
    raise UsageError(f'width {width}; give one in [0, 1]')
  # Where a step's middle lies, in lengths of a task.
  place = (np.arange(num_steps) + 0.5) * num_tasks / num_steps
  past = place[:, None] - np.arange(1, num_tasks)[None]
  # Beyond the smallest number a width of zero divides to plus or minus one.
  risen = np.clip(past / max(width, np.finfo(float).tiny) + 0.5, 0, 1)
  ends = np.ones((num_steps, 1)), np.zeros((num_steps, 1))
  return np.hstack([ends[0], risen]) - np.hstack([risen, ends[1]])


def task_free(
  tasks: Sequence[Task],
  batch_size: int,
  num_steps: int,
  seed: int,
  *,
  width: float = 1.0,
  collate: Collate | None = None,
) -> Flow:
  """A drift from task to task without a boundary.

  Each row of a batch is from task t with the probability that `drift_weights`
  gives it at that step; a task's examples come in random order, all of them
  before any comes again. `spans` divide the steps evenly, for whoever
  evaluates: nothing happens there.

  Args:
    tasks: a stream; rows of all tasks have the same columns and shapes.
    batch_size: rows of the global batch.
    num_steps: of the whole stream.
    seed: of tasks and rows.
    width: of the transitions, in lengths of a task, see `drift_weights`.
    collate: applied to each batch.

  Raises:
    UsageError: as `drift_weights`, or a batch larger than the stream.
  """
  columns = numeric(joint(tasks).columns)
  check_batch_size(columns, batch_size)
  weights = drift_weights(len(tasks), num_steps, width)
  owner = _drawn_tasks(weights, batch_size, seed)
  sizes = [len(next(iter(task.columns.values()))) for task in tasks]
  rows = np.empty(owner.size, np.int64)
  start = 0
  for position, size in enumerate(sizes):
    mine = np.flatnonzero(owner == position)
    rows[mine] = start + _in_epochs(seed, position, size, len(mine))
    start += size
  ends = [(k + 1) * num_steps // len(tasks) for k in range(len(tasks))]
  spans = tuple(
    Span(task.name, first, end - first)
    for task, first, end in zip(tasks, [0, *ends], ends, strict=False)
  )
  return Flow(_cut(columns, rows, batch_size, seed, collate), spans)


def _drawn_tasks(weights: np.ndarray, batch_size: int, seed: int) -> np.ndarray:
  """int [S * B]: the task of every row, from one word each."""
  steps = len(weights)
  words = random_words(seed, DRIFT, 0, steps * batch_size)
  uniform = (words >> np.uint64(11)).astype(np.float64) / 2**53
  # The last sum may fall short of one by rounding; no draw may lie beyond it.
  upper = np.cumsum(weights, 1)[:, :-1]
  uniform = uniform.reshape(steps, batch_size, 1)
  return (uniform >= upper[:, None]).sum(-1).ravel()


def _in_epochs(seed: int, position: int, size: int, count: int) -> np.ndarray:
  """The first `count` rows of a task, shuffled anew each time it is through."""
  epochs = -(-count // size)
  order = [
    permutation(seed, DRIFT, ((position + 1) << 32) + epoch, size)
    for epoch in range(epochs)
  ]
  return np.concatenate([np.zeros(0, np.int64), *order])[:count]
