"""One static head, and which of its classes may be answered, as data.

A batch says it in `allowed`, bool [B, classes]: the classes of the task
(task-incremental), the classes seen so far, or all of them (absent). The head
has one shape for the whole stream, so nothing is compiled again at a
boundary.
"""

import jax.numpy as jnp

from fmeta.errors import UsageError
from fmeta.losses import Criterion
from fmeta.types import Array, Batch, Forward

# Its exponential is zero; in float16 the lowest number takes its place.
NEVER = -1e9


def masked(criterion: Criterion) -> Criterion:
  """A criterion that does not see the classes a row may not answer.

  Their logits count as minus infinity, so that they have no probability and
  get no gradient; the loss's recorded outputs stay the model's own.

  Args:
    criterion: of logits [B, classes]; its batches have `allowed`.
  """

  def over_allowed(outputs, batch):
    return criterion(_only(outputs, batch), batch)

  return over_allowed


def masked_forward(forward: Forward) -> Forward:
  """A forward pass whose answers are among the allowed classes.

  Args:
    forward: gives logits [B, classes]; its batches have `allowed`.
  """

  def over_allowed(params, model_state, batch, rng):
    outputs, model_state = forward(params, model_state, batch, rng)
    return _only(outputs, batch), model_state

  return over_allowed


def _only(outputs: Array, batch: Batch) -> Array:
  allowed = batch.get('allowed')
  if allowed is None or jnp.shape(allowed) != outputs.shape:
    raise UsageError(
      f"the batch's 'allowed' has shape "
      f'{None if allowed is None else jnp.shape(allowed)}; give bool '
      f'{outputs.shape}, see fmeta.stream.class_mask'
    )
  never = max(NEVER, float(jnp.finfo(outputs.dtype).min))
  return jnp.where(allowed, outputs, jnp.asarray(never, outputs.dtype))
