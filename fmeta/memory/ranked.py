"""What memories of the best-ranked rows share.

A memory is a dict of `rows` {key: [capacity, ...]}, their random `priority`
[capacity, 2] and `seen`, how many rows were offered. A row's priority is a
pure function of the key and of the row's number in the stream, so which rows
are best is a fact about the stream alone: it depends neither on their order
nor on how they were cut into batches or spread over shards.

Which slot a row lies in is not such a fact. `merged` of one memory puts its
rows in the order of their priority, the same for equal contents.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fmeta import tree
from fmeta.errors import UsageError
from fmeta.types import Array, Batch, Memory

Spec = Mapping[str, Any]
Held = dict[str, Any]
# (key -> its values [N], priority [N, 2], count) -> bool [N]: the `count`
# entries that leave.
Leave = Callable[[Callable[[str], Array], Array, int], Array]

# What entries that are no rows have for a priority: padding leaves first, an
# empty slot is taken next.
EMPTY, PADDING = -1.0, -2.0


def check_capacity(capacity: int) -> None:
  """Raises `UsageError` if there is no room for a row."""
  if not isinstance(capacity, int | np.integer) or capacity < 1:
    raise UsageError(
      f'memory capacity {capacity!r}; give at least 1, a whole number'
    )


def check_rehearsed(memory: Any, size: int) -> None:
  """Raises `UsageError` unless rows of a memory can be rehearsed."""
  if not isinstance(memory, Memory):
    raise UsageError(
      f'the memory is a {type(memory).__name__}; give rehearse(learner, '
      'memory, size) one such as reservoir(capacity, spec)'
    )
  if not isinstance(size, int | np.integer) or size < 1:
    raise UsageError(
      f'rehearse of {size!r} remembered rows; give at least 1, a whole number'
    )


def empty(capacity: int, spec: Spec) -> Held:
  """A memory of `capacity` empty slots."""
  rows = {
    key: jnp.zeros((capacity, *leaf.shape), leaf.dtype)
    for key, leaf in spec.items()
  }
  return {
    'rows': rows,
    'priority': jnp.full((capacity, 2), EMPTY, jnp.float32),
    'seen': jnp.zeros((), jnp.int32),
  }


def occupied(held: Held) -> Array:
  """bool [capacity]: the slots with a row in them."""
  return held['priority'][..., 0] >= 0


def bytes_of(held: Any) -> int:
  """Bytes of a memory: of its rows and of what it keeps beside them."""
  return tree.num_bytes(held)


def numbers(rows: Batch, real: Array, seen: Array) -> Array:
  """Each row's number in the stream, int32 [B].

  That is the batch's own `number` where it has one (a shard's must: only the
  reader knows the whole stream), else a count of the rows so far.
  """
  if 'number' in rows:
    return jnp.asarray(rows['number'], jnp.int32)
  return seen + jnp.cumsum(real, dtype=jnp.int32) - 1


def priorities(number: Array, real: Array, rng: Array) -> Array:
  """Sixty random bits per row, float32 [B, 2], for comparison only.

  They are two words whose bit patterns are uniform over 2^30 positive normal
  floats, which have the order of their patterns: `top_k` on a CPU is forty
  times as fast for floats as for integers (2026-11-26).
  """

  def draw(number):
    return jax.random.bits(jax.random.fold_in(rng, number), (2,), jnp.uint32)

  normal = (jax.vmap(draw)(number) >> 2) + jnp.uint32(0x00800000)
  words = jax.lax.bitcast_convert_type(normal, jnp.float32)
  return jnp.where(real[:, None], words, PADDING)


def lowest(keys: Array, count: int) -> Array:
  """bool [N]: the `count` lowest rows of [N, K]; of equals the first.

  Compared by the first key, then the next. Not a sort: with few rows to find
  `top_k` takes a fiftieth of its time on a CPU (2026-11-26).
  """
  found = jnp.zeros(len(keys), bool)
  if count == 0:
    return found
  tied, missing = ~found, jnp.asarray(count, jnp.int32)
  for key in keys.T:
    least = -jax.lax.top_k(jnp.where(tied, -key, -jnp.inf), count)[0]
    # A maximum, since XLA makes a sort of top_k and a slice.
    cut = jnp.where(jnp.arange(count) < missing, least, -jnp.inf).max()
    below = tied & (key < cut)
    found |= below
    missing -= below.sum(dtype=jnp.int32)
    tied &= key == cut
  return found | (tied & (jnp.cumsum(tied) <= missing))


def admit(
  held: Held, rows: Batch, priority: Array, count: Array, leave: Leave
) -> Held:
  """The memory after it was offered rows of known priority.

  Only what changes is written, so the cost in a scan is that of a batch.

  Args:
    held: the memory.
    rows: {key: [B, ...]}, at least the memory's keys.
    priority: [B, 2]; `PADDING` for what is no row.
    count: how many of them are rows.
    leave: which of held and offered rows go.
  """
  check_rows(held['rows'], rows)
  size, capacity = len(priority), len(held['priority'])
  new = {
    key: jnp.asarray(rows[key], x.dtype) for key, x in held['rows'].items()
  }
  both = jnp.concatenate([held['priority'], priority])
  out = leave(
    lambda key: jnp.concatenate([held['rows'][key], new[key]]), both, size
  )
  # As many slots become free as offered rows stay; top_k of a mask lists
  # where it holds, in order.
  free = out[:capacity].astype(jnp.float32)
  slots = jax.lax.top_k(free, min(size, capacity))[1]
  stays = ~out[capacity:]
  nth = jnp.cumsum(stays) - 1
  target = jnp.where(stays, slots[nth], capacity)
  place = lambda x, y: x.at[target].set(y, mode='drop')
  return {
    'rows': jax.tree.map(place, held['rows'], new),
    'priority': place(held['priority'], priority),
    'seen': held['seen'] + count,
  }


def offer(
  held: Held, rows: Batch, weight: Array, rng: Array, leave: Leave
) -> Held:
  """The memory after a batch; rows of zero weight are not offered."""
  real = weight > 0
  priority = priorities(numbers(rows, real, held['seen']), real, rng)
  return admit(held, rows, priority, real.sum(dtype=jnp.int32), leave)


def sample(held: Held, size: int, rng: Array) -> tuple[Batch, Array]:
  """`size` distinct rows, uniformly, and where they are rows at all.

  Raises:
    UsageError: if the memory has fewer slots.
  """
  return sample_of(held['rows'], occupied(held), size, rng)


def sample_of(
  rows: Batch, valid: Array, size: int, rng: Array
) -> tuple[Batch, Array]:
  """`size` of the valid rows without replacement; then the invalid ones."""
  capacity = valid.shape[0]
  if size > capacity:
    raise UsageError(
      f'cannot sample {size} rows from a memory of {capacity}; possible: '
      f'up to {capacity}'
    )
  noise = jax.random.uniform(rng, (capacity,), jnp.float32)
  chosen = jax.lax.top_k(jnp.where(valid, noise, -1.0), size)[1]
  picked = jax.tree.map(lambda x: x[chosen], rows)
  return picked, valid[chosen].astype(jnp.float32)


def merged(memories: Sequence[Held], capacity: int, leave: Leave) -> Held:
  """One memory out of those of disjoint parts of a stream.

  Raises:
    UsageError: if there is no memory, or one is smaller than `capacity`: it
      may have let a row go that belongs here.
  """
  sizes = [len(each['priority']) for each in memories]
  if not sizes or not 1 <= capacity <= min(sizes):
    raise UsageError(
      f'cannot merge memories of {sizes} rows into one of {capacity}; give at '
      'least one memory, and at most the rows of the smallest'
    )
  one = jax.tree.map(lambda *parts: jnp.concatenate(parts), *_parts(memories))
  priority = one['priority']
  out = leave(lambda key: one['rows'][key], priority, sum(sizes) - capacity)
  # Those that stay first, then by priority: equal for equal contents.
  order = jnp.lexsort((-priority[:, 1], -priority[:, 0], out))[:capacity]
  seen = jnp.stack([each['seen'] for each in memories]).sum(dtype=jnp.int32)
  return {**jax.tree.map(lambda x: x[order], one), 'seen': seen}


def _parts(memories):
  keys = 'rows', 'priority'
  return [{key: each[key] for key in keys} for each in memories]


def check_rows(held: Batch, rows: Batch) -> None:
  """Raises `UsageError` unless both have rows of one shape."""
  for key, leaf in held.items():
    found = jnp.shape(rows[key])[1:] if key in rows else 'nothing'
    if found != leaf.shape[1:]:
      raise UsageError(
        f'the memory holds {key!r} of shape {leaf.shape[1:]} per row, the '
        f'batch brings {found}; give a spec of ONE row, without the batch '
        'axis, and all batches rows of that shape'
      )
