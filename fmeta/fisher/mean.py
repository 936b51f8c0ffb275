"""A mean over batches of host data, summed by a compiled program."""

from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp

from fmeta.types import Array, Batch, Params

# (total, count, batch) -> (total, count)
Add = Callable[[Params, Array, Batch], tuple[Params, Array]]


def mean_over(add: Add, like: Params, batches: Iterable[Batch]) -> Params:
  """`total / count` after all batches; zeros if nothing was counted.

  Args:
    add: adds a batch to a sum shaped like `like` and to how many were summed;
      jitted by the caller with its functions static, so that every task's
      pass is one program.
    like: gives shapes and dtypes.
    batches: in order.
  """
  total = jax.tree.map(jnp.zeros_like, like)
  count = jnp.zeros((), jnp.int32)
  for batch in batches:
    total, count = add(total, count, batch)
  return jax.tree.map(lambda t: t / jnp.maximum(count, 1), total)
