"""Reservoir sampling: every row seen is held with equal probability."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from fmeta.errors import UsageError
from fmeta.types import Memory


def reservoir(capacity: int, spec: Mapping[str, Any]) -> Memory:
  """Reservoir sampling: every row seen is held with equal probability.

  Row number s (from 0) goes to slot s while there is room, and afterwards to
  slot r ~ Uniform{0..s} if r < capacity (Vitter 1985, algorithm R,
  https://doi.org/10.1145/3147.3165). Row s draws from
  `fold_in(rng, s)`, so contents depend neither on batch size nor on the
  number of devices.

  Args:
    capacity: rows held.
    spec: key -> array or ShapeDtypeStruct of ONE row, without batch axis.
      Other keys of the inserted rows are ignored; `outputs` may be among
      them.

  Raises:
    UsageError: if the capacity is not positive.
  """
  if capacity < 1:
    raise UsageError(f'memory capacity {capacity}; give at least 1')

  def init():
    rows = {
      key: jnp.zeros((capacity, *leaf.shape), leaf.dtype)
      for key, leaf in spec.items()
    }
    return {'rows': rows, 'seen': jnp.zeros((), jnp.int32)}

  def insert(memory, rows, weight, rng):
    real = weight > 0
    order = memory['seen'] + jnp.cumsum(real) - 1

    def slot_of(number):
      drawn = jax.random.randint(
        jax.random.fold_in(rng, number), (), 0, jnp.maximum(number, 0) + 1
      )
      return jnp.where(number < capacity, number, drawn)

    slots = jnp.where(real, jax.vmap(slot_of)(order), capacity)
    # Of several rows with one slot the last stays, as one by one.
    index = jnp.arange(weight.shape[0])
    writer = jax.ops.segment_max(index, slots, num_segments=capacity + 1)
    writer = writer[:capacity]
    written = (writer >= 0) & (writer < weight.shape[0])

    def place(held, new):
      mask = written.reshape(-1, *[1] * (held.ndim - 1))
      return jnp.where(mask, new[jnp.where(written, writer, 0)], held)

    _check_rows(spec, rows)
    held = {
      key: place(memory['rows'][key], jnp.asarray(rows[key], leaf.dtype))
      for key, leaf in spec.items()
    }
    return {'rows': held, 'seen': memory['seen'] + real.sum(dtype=jnp.int32)}

  def sample(memory, size, rng):
    if size > capacity:
      raise UsageError(
        f'cannot sample {size} rows from a memory of {capacity}; possible: '
        f'up to {capacity}'
      )
    held = jnp.arange(capacity) < memory['seen']
    # Without replacement: the largest of one uniform number per held row.
    noise = jax.random.uniform(rng, (capacity,)) + held
    chosen = jax.lax.top_k(noise, size)[1]
    rows = jax.tree.map(lambda x: x[chosen], memory['rows'])
    return rows, held[chosen].astype(jnp.float32)

  return Memory(init, insert, sample)


def _check_rows(spec, rows):
  for key, leaf in spec.items():
    found = jnp.shape(rows[key])[1:] if key in rows else 'nothing'
    if found != leaf.shape:
      raise UsageError(
        f'the memory holds {key!r} of shape {leaf.shape} per row, the batch '
        f'brings {found}; give all batches one shape, the one of the spec'
      )
