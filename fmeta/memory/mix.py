"""How a batch and remembered rows become one, for `fmeta.rehearse`."""

import jax
import jax.numpy as jnp

from fmeta.errors import UsageError
from fmeta.memory.ranked import check_rows
from fmeta.types import Array, Batch


def append(batch: Batch, rows: Batch, valid: Array) -> Batch:
  """Experience replay: the batch and the remembered rows as one batch.

  Rows of an empty memory get weight zero. Keys that only the memory has are
  dropped.

  Raises:
    UsageError: if the memory lacks a key of the batch, or has rows of another
      shape.
  """
  missing = sorted(set(batch) - set(rows) - {'weight'})
  if missing:
    raise UsageError(
      f'the memory does not hold {missing[0]!r} of the batch; it holds '
      f'{sorted(rows)}: add it to the spec of the memory'
    )
  check_rows({k: rows[k] for k in batch if k != 'weight'}, batch)
  size = jax.tree.leaves(batch)[0].shape[0]
  weight = batch.get('weight', jnp.ones(size, valid.dtype))
  mixed = {
    key: jnp.concatenate([value, rows[key]])
    for key, value in batch.items()
    if key != 'weight'
  }
  return {**mixed, 'weight': jnp.concatenate([weight, valid])}


def beside(batch: Batch, rows: Batch, valid: Array) -> Batch:
  """The remembered rows under `memory_*` keys, for losses that read them."""
  named = {f'memory_{key}': value for key, value in rows.items()}
  return {**batch, **named, 'memory_weight': valid}
