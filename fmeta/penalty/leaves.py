"""What penalties share: the leaves that move, anchors and distances to them.

A penalty on merged values treats LoRA factors (A, B) and (2A, B/2), which are
the same weights, alike. One that follows gradients step by step lives on the
trainable leaves themselves, for which alone a step has gradients.
"""

import jax
import jax.numpy as jnp
from jax.core import Tracer

from fmeta import tree
from fmeta.errors import UsageError
from fmeta.types import Array, Params


def moving_leaves(trainable: Params, params: Params) -> Params:
  """The merged values of the full parameters that the trainable leaves move.

  Raises:
    UsageError: for a leaf that belongs to no single parameter.
  """
  known = set(tree.names(params))
  moved = set()
  for name in tree.names(trainable):
    # What is no parameter is a factor: `<kernel>.<suffix>`.
    owner = name if name in known else name.rpartition('.')[0]
    if owner not in known:
      raise UsageError(
        f'{name!r} moves many parameters at once, so a penalty cannot tell '
        "which; decay it by the optimiser's weight decay instead"
      )
    moved.add(owner)
  return tree.partition(params, moved.__contains__)[0]


def own(leaves: Params) -> Params:
  """A copy: `fit` donates the state, and a buffer cannot be donated twice."""
  return jax.tree.map(lambda x: jnp.array(x, copy=True), leaves)


def zeros_like(leaves: Params) -> Params:
  """The same tree of zeros."""
  return jax.tree.map(jnp.zeros_like, leaves)


def half_square(values: Params, anchor: Params, weights: Params) -> Array:
  """sum_i w_i (x_i - a_i)^2 / 2 over all leaves."""
  terms = jax.tree.map(
    lambda x, a, w: jnp.sum(w * (x - a) ** 2), values, anchor, weights
  )
  return 0.5 * sum(jax.tree.leaves(terms), jnp.zeros(()))


def require_room(what: str, tasks: Array, num_tasks: int) -> None:
  """Refuses one task more than a state of fixed size has places for.

  A traced number cannot be asked; let the state become NaN then.

  Args:
    what: names the penalty in the error.
    tasks: remembered so far.
    num_tasks: places.

  Raises:
    UsageError: if there is none left.
  """
  if not isinstance(tasks, Tracer) and tasks >= num_tasks:
    raise UsageError(
      f'{what} has room for num_tasks={num_tasks} tasks, and this is one more; '
      'give it the number of tasks whose end it is to remember'
    )
