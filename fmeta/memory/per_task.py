"""A reservoir for each task, on an axis of fixed length."""

import jax
import jax.numpy as jnp
from jax.core import Tracer

from fmeta.errors import UsageError
from fmeta.memory import ranked
from fmeta.memory.reservoir import reservoir
from fmeta.types import Array, Batch, Memory


def per_task(tasks: int, rows_per_task: int, spec: ranked.Spec) -> Memory:
  """A reservoir for each task: old tasks never give way to new ones.

  The state is {'rows': {key: [tasks, rows_per_task, ...]}, 'priority',
  'seen': [tasks], 'task': int}. Rows go to the task at hand; `end_task`
  moves on. A sample is of the rows of past tasks, uniformly, and says in
  `task` whose they are; `task_rows` gives them all, for methods with a
  constraint per task.

  Args:
    tasks: how many tasks the stream has.
    rows_per_task: rows held of each.
    spec: as for `reservoir`, without the key `task`.

  Raises:
    UsageError: if a size is not positive, `task` is in the spec, or more
      tasks end than there are.
  """
  ranked.check_capacity(tasks)
  if 'task' in spec:
    raise UsageError("a memory per task adds 'task' itself; leave it out")
  inner = reservoir(rows_per_task, spec)

  def init():
    one = inner.init()
    several = jax.tree.map(lambda x: jnp.stack([x] * tasks), one)
    return {**several, 'task': jnp.zeros((), jnp.int32)}

  def insert(memory, rows, weight, rng):
    task = memory['task']
    held = {key: x for key, x in memory.items() if key != 'task'}
    # Numbers begin anew with each task, so tasks need keys of their own.
    mine = inner.insert(
      jax.tree.map(lambda x: x[task], held),
      rows,
      weight,
      jax.random.fold_in(rng, task),
    )
    # After the last task there is no place: dropped.
    put = lambda x, y: x.at[task].set(y, mode='drop')
    return {**jax.tree.map(put, held, mine), 'task': task}

  def sample(memory, size, rng):
    rows, valid = task_rows(memory)
    place = jnp.arange(tasks, dtype=jnp.int32)[:, None]
    rows = {**rows, 'task': jnp.broadcast_to(place, valid.shape)}
    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), rows)
    return ranked.sample_of(flat, valid.reshape(-1), size, rng)

  def end_task(memory):
    task = memory['task']
    # Known on the host only; inside jit the rows are dropped as above.
    if not isinstance(task, Tracer) and int(task) >= tasks:
      raise UsageError(
        f'task {int(task)} ends in a memory of {tasks} tasks; give per_task '
        'the number of tasks of the stream'
      )
    return {**memory, 'task': task + 1}

  return Memory(init, insert, sample, end_task)


def task_rows(memory: ranked.Held) -> tuple[Batch, Array]:
  """All rows of a `per_task` memory, and which are of past tasks.

  Returns:
    {key: [tasks, rows_per_task, ...]} and bool [tasks, rows_per_task].

  Raises:
    UsageError: for the state of another memory.
  """
  if 'task' not in memory:
    raise UsageError(
      'this memory has no rows per task; give the state of per_task(tasks, '
      'rows_per_task, spec)'
    )
  past = jnp.arange(len(memory['seen'])) < memory['task']
  return memory['rows'], ranked.occupied(memory) & past[:, None]
