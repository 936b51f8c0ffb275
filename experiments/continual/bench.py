"""A stream and a model, as all methods of a table share them.

Scenarios (van de Ven & Tolias 2019, https://arxiv.org/abs/1904.07734) are what
an answer is chosen from:

  task    the classes of the task at hand, which is known (one head each)
  domain  one head for all tasks
  class   all classes of the tasks so far

A head has one shape for the whole stream; `allowed` says which of its classes
may be answered, as data. The boundary is beside the batches: a stage ends.
"""

import functools
from collections.abc import Callable, Sequence
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

import fmeta
from fmeta import continual, data, evaluate, stream, train

Scenario = Literal['task', 'domain', 'class']
SCENARIOS = 'task', 'domain', 'class'


class Labelled(NamedTuple):
  """Tasks whose labels are positions in the head.

  Attributes:
    train: a task each.
    test: aligned with `train`.
    allowed: bool [tasks, classes], the classes of each task.
  """

  train: list[stream.Task]
  test: list[stream.Task]
  allowed: np.ndarray


class Bench:
  """A stream, its model, and how both are asked.

  Args:
    tasks: with numeric columns.
    scenario: what an answer is chosen from.
    forward: gives logits of all classes: what a memory keeps and a loss masks.
    start: `key -> params`, fresh.
    test_batch: test rows at a time.
    tuning: what moves; everything by default.
    model_state: at the start, such as statistics of pre-trained norms.
    program: `(learner, columns) -> Program` whose batches name rows.
  """

  def __init__(
    self,
    tasks: Labelled,
    scenario: Scenario,
    forward: fmeta.Forward,
    start: Callable[[jax.Array], fmeta.types.Params],
    test_batch: int = 1000,
    tuning: fmeta.Tuning | None = None,
    model_state: fmeta.types.ModelState = MappingProxyType({}),
    program: Callable[..., train.Resident] = train.Resident,
  ):
    self.forward, self.start, self.tuning = forward, start, tuning
    self.model_state, self._program = dict(model_state), program
    self.tasks, self.scenario = tasks, scenario
    # What may be answered after each task.
    self.seen = np.logical_or.accumulate(tasks.allowed)
    self.classes = tasks.allowed.shape[1]
    self.criterion = fmeta.softmax_cross_entropy
    self.answers = self.forward
    if scenario != 'domain':
      self.criterion = continual.masked(self.criterion)
      self.answers = continual.masked_forward(self.forward)
    self.loss = fmeta.supervised(self.forward, self.criterion)
    self._tests = [
      data.eval_batches(self._labelled(k, task), test_batch)
      for k, task in enumerate(tasks.test)
    ]

  def _labelled(self, index: int, task: stream.Task) -> data.Columns:
    """The rows of a task, with its classes where they are known."""
    if self.scenario != 'task':
      return dict(task.columns)
    size = len(task.columns['label'])
    mask = np.tile(self.tasks.allowed[index], (size, 1))
    return {**task.columns, 'allowed': mask}

  @functools.cached_property
  def columns(self) -> data.Columns:
    """All training rows, task after task."""
    parts = [
      stream.Task(task.name, self._labelled(k, task))
      for k, task in enumerate(self.tasks.train)
    ]
    return stream.joint(parts).columns

  def rows(self, index: int) -> np.ndarray:
    """The numbers of a task's rows in `columns`."""
    sizes = [len(task.columns['label']) for task in self.tasks.train]
    first = sum(sizes[:index])
    return np.arange(first, first + sizes[index])

  def batches(
    self, tasks: Sequence[int], batch_size: int, seed: int
  ) -> Callable[[int], dict[str, np.ndarray]]:
    """`i -> batch` of row numbers, shuffled anew each epoch."""
    numbers = np.concatenate([self.rows(task) for task in tasks])
    drawn = data.batches({'row': numbers}, batch_size, seed)
    if self.scenario != 'class':
      return drawn
    allowed = np.tile(self.seen[max(tasks)], (batch_size, 1))
    return lambda i: {**drawn(i), 'allowed': allowed}

  def spec(self) -> dict[str, Any]:
    """One row as a memory holds it."""
    return {key: value[0] for key, value in self.columns.items()}

  def remembered(self, task: int, size: int) -> list[dict[str, np.ndarray]]:
    """The first rows of a task, for what looks at it again at its end.

    Each class that is not among them adds its first: LwF teaches those alone
    that it has met.
    """
    rows = self.rows(task)
    label = self.columns['label'][rows]
    # Of each class the number of its first row within the task.
    first = np.unique(label, return_index=True)[1]
    rows = rows[np.union1d(np.arange(min(size, len(rows))), first)]
    columns = data.take(self.columns, rows)
    if self.scenario == 'class':
      columns['allowed'] = np.tile(self.seen[task], (len(rows), 1))
    return data.eval_batches(columns, min(500, len(rows)))

  def correct(
    self,
    params: fmeta.types.Params,
    model_state: fmeta.types.ModelState,
    stage: int,
  ) -> list[np.ndarray]:
    """Which test rows of each task so far are answered, after `stage`."""
    out = []
    for batches in self._tests[: stage + 1]:
      if self.scenario == 'class':
        mask = np.tile(self.seen[stage], (len(batches[0]['label']), 1))
        batches = [{**batch, 'allowed': mask} for batch in batches]
      found = evaluate.evaluate(self.answers, params, model_state, batches)
      out.append(found.correct)
    return out

  def accuracies(
    self,
    params: fmeta.types.Params,
    model_state: fmeta.types.ModelState,
    stage: int,
  ) -> list[float]:
    """Test accuracy on each task so far, after task `stage`."""
    correct = self.correct(params, model_state, stage)
    return [float(each.mean()) for each in correct]

  def program(self, learner: fmeta.Learner) -> train.Resident:
    """The learner's steps on images that stay on the device."""
    return self._program(learner, self.columns)


def by_label(
  tasks: Sequence[stream.Task], correct: Sequence[np.ndarray]
) -> list[bool]:
  """Answers of all tasks in an order that the tasks' order does not change.

  Where a class is in one task only: by class, and within it as in the data.
  """
  label = np.concatenate([task.columns['label'] for task in tasks])
  order = np.argsort(label, kind='stable')
  return np.concatenate(correct)[order].astype(bool).tolist()


def first_of_each(columns: data.Columns, count: int) -> data.Columns:
  """The first rows of each class, dealt in turn: the last are of all."""
  label, place = columns['label'], np.zeros(len(columns['label']), int)
  for value in np.unique(label):
    rows_of = np.flatnonzero(label == value)
    place[rows_of] = np.arange(len(rows_of))
  order = np.lexsort((label, place))
  return data.take(columns, order[place[order] < count])
