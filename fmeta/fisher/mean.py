"""A mean over batches of host data, summed by a compiled program."""

from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp

from fmeta.errors import UsageError
from fmeta.types import Array, Batch, Params

# (total, count, batch) -> (total, count)
Add = Callable[[Params, Array, Batch], tuple[Params, Array]]


def mean_over(add: Add, like: Params, batches: Iterable[Batch]) -> Params:
  """`total / count` after all batches; zeros if all their rows are padding.

  Args:
    add: adds a batch to a sum shaped like `like` and to how many were summed;
      jitted by the caller with its functions static, so that every task's
      pass is one program.
    like: gives shapes and dtypes.
    batches: in order.

  Raises:
    UsageError: if there are none, as importances of zero would hold nothing.
  """
  total = jax.tree.map(jnp.zeros_like, like)
  count, some = jnp.zeros((), jnp.int32), False
  for batch in batches:
    total, count, some = *add(total, count, batch), True
  if not some:
    raise UsageError(
      'no batches to take importances from; give some of the task, as '
      '`remember` of a train.Stage'
    )
  return jax.tree.map(lambda t: t / jnp.maximum(count, 1), total)
