"""Which task is at hand, for methods that have to know it.

In training it is the batch's `task`, int [B]. The stream does not say it:
`counting_tasks` counts the ends of tasks and adds the key, and only what is
wrapped in it learns of a boundary. An experiment may instead give it on
purpose, by `fmeta.stream.numbered`; remembered rows then keep theirs.

In evaluation a batch's `task` is never read. What counts there is how many
tasks the model has been trained on, which is model state: like a running
statistic it is written in training only, saved and resumed with the rest.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer

from fmeta import tree
from fmeta.errors import UsageError
from fmeta.learner import rehearse
from fmeta.types import Array, Batch, Forward, Learner, Memory, ModelState

COLLECTION, KEY = 'prompts', 'task'


class Told(NamedTuple):
  """What a forward pass knows of tasks.

  Attributes:
    rows: int [B], the task of each row; None in evaluation.
    task: the task at hand, in evaluation the last one trained on.
    seen: how many tasks there have been, this one included.
  """

  rows: Array | None
  task: Array
  seen: Array


def no_tasks() -> ModelState:
  """The model state before the first task.

    learner.init(params, key, {**model_state, **no_tasks()})

  `counting_tasks` adds it by itself.
  """
  zero = lambda: jnp.zeros((), jnp.int32)
  return {COLLECTION: {'task': zero(), 'seen': zero()}}


def task_of(batch: Batch) -> Array:
  """The task of each row, int [B].

  Raises:
    UsageError: if the batch does not say.
  """
  if KEY not in batch:
    raise UsageError(
      f'the batch has no {KEY!r}; it has {sorted(batch)}: wrap the learner in '
      'counting_tasks, or number the tasks with fmeta.stream.numbered'
    )
  return jnp.asarray(batch[KEY])


def told_of(model_state: ModelState | None) -> dict[str, Array]:
  """`task` and `seen`, as a model state has them.

  Raises:
    UsageError: if it has none.
  """
  if COLLECTION not in (model_state or {}):
    raise UsageError(
      f'the model state has no {COLLECTION!r}, which says what tasks there '
      'have been; start from learner.init(params, rng, no_tasks()), and '
      'evaluate with the model state of the run'
    )
  return model_state[COLLECTION]  # pyright: ignore


def with_tasks(run: Callable[..., tuple[Any, ModelState]]) -> Forward:
  """A `Forward` of one that is told about tasks.

  Args:
    run: `(params, model_state, batch, rng, told)`; the model state is the
      model's own.
  """

  def forward(params, model_state, batch, rng):
    before = told_of(model_state)
    own = {k: x for k, x in model_state.items() if k != COLLECTION}
    if rng is None:
      out, _ = run(params, own, batch, None, Told(None, **before))
      return out, model_state
    rows = task_of(batch)
    task = rows.max().astype(jnp.int32)
    now = {'task': task, 'seen': jnp.maximum(before['seen'], task + 1)}
    out, own = run(params, own, batch, rng, Told(rows, **now))
    return out, {**own, COLLECTION: now}

  return forward


def counting_tasks(learner: Learner, tasks: int) -> Learner:
  """The same learner, whose batches say which task it is.

  Every batch gets `task`, int [B]: how often `end_task` has been called. The
  count lies in the place of a memory; to replay rows as well, number the
  stream instead.

  Args:
    learner: its loss or penalty reads `task`.
    tasks: of the stream.

  Raises:
    UsageError: if a batch has that key already, or more tasks end than there
      are.
  """

  def sample(memory, size, rng):
    del rng
    return {KEY: jnp.broadcast_to(memory[KEY], (size,))}, jnp.ones(size)

  def end_task(memory):
    task = memory[KEY]
    # Known on the host only.
    if not isinstance(task, Tracer) and int(task) >= tasks:
      raise UsageError(
        f'task {int(task)} ends, counted from 0, and counting_tasks was told '
        f'of {tasks}; give it the number of tasks of the stream'
      )
    return {KEY: task + 1}

  counter = Memory(
    init=lambda: {KEY: jnp.zeros((), jnp.int32)},
    insert=lambda memory, rows, weight, rng: memory,
    sample=sample,
    end_task=end_task,
  )
  counted = rehearse(learner, counter, 1, mix=_saying_task)

  def init(params, rng, model_state=None):
    return counted.init(params, rng, {**no_tasks(), **(model_state or {})})

  return counted._replace(init=init)


def _saying_task(batch: Batch, rows: Batch, valid: Array) -> Batch:
  del valid
  if KEY in batch:
    raise UsageError(
      f'the batch says its {KEY!r} already; leave counting_tasks out'
    )
  size = jax.tree.leaves(batch)[0].shape[0]
  return {**batch, KEY: jnp.broadcast_to(rows[KEY], (size,))}


def of_this_task(
  optimizer: optax.GradientTransformation, suffixes: tuple[str, ...]
) -> optax.GradientTransformationExtraArgs:
  """An optimiser that moves leaves with an axis of tasks in one row only.

  In the leaves [tasks, ...] of these suffixes it moves the row of the task at
  hand. Others stay bitwise as they are, and so do their slots: a zero gradient
  alone would let momentum and decay move them on. It reads the task from the
  model state that the loss returns. A row whose task begins late has zero
  moments, so Adam should count per entry:

    of_this_task(plasticity.adam_per_entry(1e-3), CODA_PROMPT)

  which is what a new optimiser for every task does to them. Slots of another
  shape than their leaf (Adafactor's) are not held. It cannot be
  differentiated through: an inner loop takes its optimiser bare.

  Args:
    optimizer: any optax transformation.
    suffixes: of leaves [tasks, ...]: `DUAL_PROMPT` or `CODA_PROMPT`.

  Raises:
    UsageError: in a step, if the model state does not say the task.
  """
  inner = optax.with_extra_args_support(optimizer)

  def update(updates, state, params=None, *, model_state=None, **extra):
    task = told_of(model_state)['task']
    moved, after = inner.update(
      updates, state, params, model_state=model_state, **extra
    )
    held = {
      name: leaf.shape
      for name, leaf in zip(
        tree.names(updates), jax.tree.leaves(updates), strict=True
      )
      if name.endswith(suffixes)
    }

    def in_row(name, new, old):
      if held.get(_owner(name, held)) != jnp.shape(new):
        return new
      row = jnp.arange(len(new)).reshape(-1, *[1] * (new.ndim - 1))
      return jnp.where(row == task, new, old)

    still = jax.tree.map(jnp.zeros_like, moved)
    return (
      tree.map_with_name(in_row, moved, still),
      tree.map_with_name(in_row, after, state),
    )

  return optax.GradientTransformationExtraArgs(inner.init, update)


def _owner(name: str, leaves) -> str:
  """The leaf that a slot `0/mu/<leaf>` belongs to; '' for none."""
  while name and name not in leaves:
    name = name.partition('/')[2]
  return name
