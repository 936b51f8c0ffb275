"""Every continual method on a small stream, for tests that take them all."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
import toys

import fmeta
from fmeta import fisher, optim, train

FEATURES, CLASSES = 6, 3
TASKS, STEPS = 3, 12
LOSS, PARAMS, _, FORWARD = toys.problem(dropout=0.2)
ROW = {
  'x': jax.ShapeDtypeStruct((FEATURES,), np.float32),
  'label': jax.ShapeDtypeStruct((), np.int32),
}
KEPT = {**ROW, 'outputs': jax.ShapeDtypeStruct((CLASSES,), np.float32)}


class Method(NamedTuple):
  """How a method takes the stream.

  Attributes:
    learner: makes it.
    remembers: whether it looks at a task's data again at its end.
    ends_task: whether it is told of a task's end besides.
  """

  learner: Callable[[], fmeta.Learner]
  remembers: bool = False
  ends_task: bool = False


def batch(task: int, index: int) -> dict[str, np.ndarray]:
  """Batch `index` of a task: its own blobs for the same three classes."""
  rng = np.random.default_rng([task, index])
  label = rng.integers(0, CLASSES, 6).astype(np.int32)
  means = np.random.default_rng(task).normal(size=(CLASSES, FEATURES))
  x = means[label] + 0.5 * rng.normal(size=(6, FEATURES))
  return {'x': x.astype(np.float32), 'label': label}


def finetune(**options) -> fmeta.Learner:
  """The step with Adam."""
  return fmeta.finetune(LOSS, optim.adam(1e-2), **options)


def replay(learner: fmeta.Learner, spec=ROW, mix=fmeta.append) -> fmeta.Learner:
  """With a reservoir of ten rows, four in a step."""
  return fmeta.rehearse(learner, fmeta.reservoir(10, spec), 4, mix=mix)


METHODS = {
  'naive': Method(finetune),
  'ewc': Method(lambda: finetune(penalty=fmeta.ewc(5.0)), True),
  'ewc sampled': Method(
    lambda: finetune(penalty=fmeta.ewc(5.0, fisher.sampled_fisher)), True
  ),
  'er': Method(lambda: replay(finetune())),
  'er and ewc': Method(lambda: replay(finetune(penalty=fmeta.ewc(5.0))), True),
}


def stages(method: Method) -> list[train.Stage]:
  """Three tasks of twelve steps."""
  return [
    train.Stage(
      f'task_{task}',
      functools.partial(batch, task),
      STEPS,
      [batch(task, k) for k in range(2)] if method.remembers else (),
      ends_task=method.ends_task,
    )
    for task in range(TASKS)
  ]


def row_of_matrix(params, state, stage) -> list[float]:
  """Numbers that depend on every leaf, one per task so far."""
  del state
  total = sum(float(np.abs(leaf).sum()) for leaf in jax.tree.leaves(params))
  return [total + task for task in range(stage + 1)]
