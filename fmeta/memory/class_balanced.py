"""An equal quota for each class seen, and a uniform sample within each."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from fmeta.errors import UsageError, suggest
from fmeta.memory import ranked
from fmeta.types import Array, Memory


def class_balanced(
  capacity: int, spec: ranked.Spec, by: str = 'label'
) -> Memory:
  """A reservoir per class, all of one size as far as their rows go.

  With n_c rows of class c seen, min(n_c, L) of them are held, L the largest
  level with sum_c min(n_c, L) <= capacity; what is left over goes to one row
  more of the classes whose next row has the highest priority. These are the
  quotas of a greedy balancing sampler (Prabhu et al. 2020,
  https://doi.org/10.1007/978-3-030-58536-5_31), except that
  the rows of a class are a uniform sample of those seen, as in
  class-balancing reservoir sampling (Chrysakis & Moens 2020,
  https://proceedings.mlr.press/v119/chrysakis20a.html), and not its first.

  It holds the rows of lowest (rank in the own class, -priority). A rank only
  grows, so a row that had to leave would not come back, and contents are
  independent of order, batches and shards as a reservoir's. The number of
  classes need not be known.

  Args:
    capacity: rows held, of all classes together.
    spec: as for `reservoir`; its `by` is one integer.
    by: the key to balance, for example `label` or `task`.

  Raises:
    UsageError: if the capacity is not positive, or `by` is not an integer.
  """
  ranked.check_capacity(capacity)
  leaf = spec.get(by)
  if leaf is None or leaf.shape or not jnp.issubdtype(leaf.dtype, jnp.integer):
    raise UsageError(
      f'cannot balance {by!r}, which is {leaf} in the spec; give the key of '
      f'one integer per row, of {sorted(spec)}'
    )
  leave = _by_rank(by)

  def insert(memory, rows, weight, rng):
    return ranked.offer(memory, rows, weight, rng, leave)

  return Memory(lambda: ranked.empty(capacity, spec), insert, ranked.sample)


def merge_balanced(
  memories: Sequence[ranked.Held], capacity: int, by: str = 'label'
) -> ranked.Held:
  """The class-balanced memory of a whole stream from those of its parts.

  Arguments, conditions and errors as for `merge`.
  """
  return ranked.merged(memories, capacity, _by_rank(by))


def admit(
  held: ranked.Held,
  rows: ranked.Batch,
  order: Array,
  weight: Array,
  by: str = 'label',
) -> ranked.Held:
  """Inserts rows whose order within their class is chosen, not drawn.

  For exemplars by herding: classes share the memory equally, and when a
  class has to give up a row it is its last one.

  Args:
    held: the memory; all its rows inserted by this function.
    rows: {key: [B, ...]}.
    order: int [B], place of a row in its class, below 2^24; 0 is kept
      longest.
    weight: [B], zero for rows that are not inserted.
    by: the key that is balanced.
  """
  real = weight > 0
  # Lower is better; bounded, as a priority has to stay positive.
  first = jnp.where(real, 2.0**24 - order, ranked.PADDING)
  priority = jnp.stack([first, first], 1).astype(jnp.float32)
  count = real.sum(dtype=jnp.int32)
  return ranked.admit(held, rows, priority, count, _by_rank(by))


def quotas(held: ranked.Held, num_classes: int, by: str = 'label') -> Array:
  """How many rows of each class are held, int32 [num_classes].

  Raises:
    UsageError: if the memory does not hold `by`.
  """
  if by not in held['rows']:
    raise UsageError(
      f'the memory does not hold {by!r}{suggest(by, held["rows"])}'
    )
  there = ranked.occupied(held).astype(jnp.int32)
  return jax.ops.segment_sum(there, held['rows'][by], num_classes)


def _by_rank(by):
  def leave(column, priority, count):
    # What is no row first, then the largest classes' last rows.
    rank = _ranks(column(by), priority).astype(priority.dtype)
    keys = jnp.concatenate([-rank[:, None], priority], axis=1)
    return ranked.lowest(keys, count)

  return leave


def _ranks(label: Array, priority: Array) -> Array:
  """How many rows of the own class have a higher priority, int32 [N]."""
  size = len(label)
  order = jnp.lexsort((-priority[:, 1], -priority[:, 0], label))
  place = jnp.arange(size, dtype=jnp.int32)
  grouped = label[order]
  starts = jnp.concatenate([jnp.ones(1, bool), grouped[1:] != grouped[:-1]])
  first = jax.lax.cummax(jnp.where(starts, place, 0))
  rank = jnp.zeros(size, jnp.int32).at[order].set(place - first)
  return jnp.where(priority[:, 0] >= 0, rank, size)
