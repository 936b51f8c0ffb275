"""A copy of the model as it was at the last boundary, kept in the state.

The copy is the merged values of the leaves that move; frozen ones are the
student's. A penalty is not told the model's current state (statistics), so
both run in evaluation mode with that of the boundary.
"""

from typing import Any

import jax.numpy as jnp

from fmeta import tree
from fmeta.errors import UsageError
from fmeta.penalty.leaves import moving_leaves, own
from fmeta.types import Array, Batch, Forward, ModelState, Params


def first_teacher(
  trainable: Params, params: Params, model_state: ModelState
) -> dict[str, Any]:
  """The start, in the place that `next_teacher` fills."""
  return {
    'teacher': own(moving_leaves(trainable, params)),
    'model_state': own({} if model_state is None else model_state),
  }


def next_teacher(
  state: dict[str, Any],
  trainable: Params,
  params: Params,
  model_state: ModelState,
) -> dict[str, Any]:
  """The model as it is now.

  Raises:
    UsageError: if the penalty was not told that the model has a state.
  """
  held, now = tree.names(state['model_state']), tree.names(model_state)
  if held != now:
    raise UsageError(
      f'the model has the state {now[:3]}, the penalty was given {held[:3]}: '
      'pass model_state=..., as learner.init gets it'
    )
  return {**state, **first_teacher(trainable, params, model_state)}


def student_and_teacher(
  forward: Forward, params: Params, state: dict[str, Any], batch: Batch
) -> tuple[Any, Any]:
  """Outputs of both on the batch, in evaluation mode."""
  then = tree.combine(params, state['teacher'])
  student, _ = forward(params, state['model_state'], batch, None)
  teacher, _ = forward(then, state['model_state'], batch, None)
  return student, teacher


def mean_over_rows(rows: Array, batch: Batch) -> Array:
  """sum_b w_b rows_b / sum_b w_b with the batch's optional `weight`."""
  weight = batch.get('weight')
  if weight is None:
    return rows.mean()
  total = weight.sum()
  return (rows * (weight / jnp.where(total > 0, total, 1))).sum()
