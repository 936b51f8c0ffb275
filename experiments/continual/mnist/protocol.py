"""Streams of MNIST as all methods share them.

The protocol of van de Ven & Tolias 2018 (https://arxiv.org/abs/1809.10635):
ReLU networks trained with Adam at a constant rate, a fixed number of
iterations per task, every test image after every task. Their scenarios
(https://arxiv.org/abs/1904.07734) are what an answer is chosen from:

  task    the classes of the task at hand, which is known (one head each)
  domain  one head for all tasks
  class   all classes of the tasks so far

A head has one shape for the whole stream; `allowed` says which of its classes
may be answered, as data. Pixels are bytes on the device, in the memory too.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np

import fmeta
from fmeta import continual, data, evaluate, models, stream, train
from fmeta.models import Mlp

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


def as_bytes(columns: data.Columns) -> data.Columns:
  """Images in [0, 1] as bytes; exact, MNIST has 256 levels."""
  image = np.round(columns['image'] * 255).astype(np.uint8)
  return {'image': image, 'label': columns['label'].astype(np.int32)}


def split_tasks(
  splits: dict[str, data.Columns], scenario: Scenario
) -> Labelled:
  """Five tasks of two digits each: 0/1, 2/3, 4/5, 6/7, 8/9."""
  pairs = {f'{a}/{a + 1}': (a, a + 1) for a in range(0, 10, 2)}
  made = {
    name: stream.by_classes(columns, pairs, relabel=scenario == 'domain')
    for name, columns in splits.items()
  }
  allowed = stream.class_mask(pairs, 10)
  if scenario == 'domain':
    allowed = np.ones((len(pairs), 2), bool)
  return Labelled(made['train'], made['test'], allowed)


def permuted_tasks(
  splits: dict[str, data.Columns], scenario: Scenario, tasks: int, seed: int
) -> Labelled:
  """Tasks of ten digits whose pixels lie in another order each."""
  made = {'train': [], 'test': []}
  for task in range(tasks):
    for name, columns in splits.items():
      columns = stream.permuted(columns, seed * tasks + task)
      if scenario != 'domain':
        columns = {**columns, 'label': columns['label'] + 10 * task}
      made[name].append(stream.Task(f'order {task}', columns))
  allowed = np.ones((tasks, 10), bool)
  if scenario != 'domain':
    allowed = np.repeat(np.eye(tasks, dtype=bool), 10, axis=1)
  return Labelled(made['train'], made['test'], allowed)


class Bench:
  """A stream, its network, and how both are asked.

  Args:
    tasks: from `split_tasks` or `permuted_tasks`.
    scenario: what an answer is chosen from.
    sizes: hidden widths of the network.
    test_batch: test images at a time.
  """

  def __init__(
    self,
    tasks: Labelled,
    scenario: Scenario,
    sizes: Sequence[int],
    test_batch: int = 1000,
  ):
    self.tasks, self.scenario = tasks, scenario
    # What may be answered after each task.
    self.seen = np.logical_or.accumulate(tasks.allowed)
    self.classes = tasks.allowed.shape[1]
    self.module = Mlp(tuple(sizes), self.classes)
    # Logits of all classes: what a memory keeps and a loss masks.
    self.forward = scaled(models.forward(self.module, models.IMAGE))
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
    """The first rows of a task, for an importance pass."""
    rows = self.rows(task)[:size]
    columns = data.take(self.columns, rows)
    if self.scenario == 'class':
      columns['allowed'] = np.tile(self.seen[task], (len(rows), 1))
    return data.eval_batches(columns, min(500, len(rows)))

  def accuracies(self, params: fmeta.types.Params, stage: int) -> list[float]:
    """Test accuracy on each task so far, after task `stage`."""
    out = []
    for batches in self._tests[: stage + 1]:
      if self.scenario == 'class':
        mask = np.tile(self.seen[stage], (len(batches[0]['label']), 1))
        batches = [{**batch, 'allowed': mask} for batch in batches]
      out.append(evaluate.accuracy_of(self.answers, params, {}, batches))
    return out

  def program(self, learner: fmeta.Learner) -> train.Resident:
    """The learner's steps on images that stay on the device."""
    return train.Resident(learner, self.columns)


def scaled(forward: fmeta.Forward) -> fmeta.Forward:
  """A forward pass of images given as bytes."""

  def of_bytes(params, model_state, batch, rng):
    image = jnp.asarray(batch['image'], jnp.float32) / 255
    return forward(params, model_state, {**batch, 'image': image}, rng)

  return of_bytes


def now_allowed(batch: Any, rows: Any, valid: Any) -> Any:
  """`fmeta.append` in a class scenario: old rows get the mask of today."""
  size = valid.shape[0]
  mask = jnp.broadcast_to(
    batch['allowed'][:1], (size, *batch['allowed'][0].shape)
  )
  return fmeta.append(batch, {**rows, 'allowed': mask}, valid)
