"""GDumb: a network trained from nothing on what the memory holds."""

from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np

from fmeta.data import batches
from fmeta.errors import UsageError
from fmeta.memory import occupied
from fmeta.memory.ranked import Held
from fmeta.train.stages import Stage
from fmeta.types import Array, Batch, Memory


def collect(
  memory: Memory, held: Held, stream: Iterable[Batch], rng: Array
) -> Held:
  """Passes a stream through a memory; nothing is trained.

  Args:
    memory: for example `class_balanced(...)`.
    held: its state; `memory.init()` at the start.
    stream: batches with the memory's keys, and an optional `weight`.
    rng: root key; the same for all parts of a stream.
  """
  insert = jax.jit(memory.insert)
  for batch in stream:
    size = jax.tree.leaves(batch)[0].shape[0]
    weight = batch.get('weight', jnp.ones(size, jnp.float32))
    held = insert(held, batch, weight, rng)
  return held


def held_columns(held: Held) -> dict[str, np.ndarray]:
  """The rows of a memory on the host, without empty slots.

  Remembered `outputs` stay behind: they are of another network.
  """
  there = np.asarray(occupied(held))
  return {
    key: np.asarray(value)[there]
    for key, value in held['rows'].items()
    if key != 'outputs'
  }


def gdumb(held: Held, batch_size: int, num_steps: int, seed: int) -> Stage:
  """The one stage of GDumb: so many steps on the rows of a memory alone.

  Prabhu et al. 2020 (https://doi.org/10.1007/978-3-030-58536-5_31) keep a
  class-balanced memory while the stream passes and train a new network on it
  whenever an answer is asked for. So: `collect` with a
  `fmeta.memory.class_balanced`, a fresh `learner.init`, `fit` on this stage.

  Args:
    held: state of the memory.
    batch_size: rows of a step, at most those held.
    num_steps: of the stage.
    seed: of the batches' order.

  Raises:
    UsageError: if the memory holds fewer rows than a batch.
  """
  columns = held_columns(held)
  size = int(np.asarray(occupied(held)).sum())
  if size < batch_size:
    raise UsageError(
      f'the memory holds {size} rows, fewer than the batch of {batch_size}; '
      'collect more of the stream or take smaller batches'
    )
  return Stage('gdumb', batches(columns, batch_size, seed), num_steps)
