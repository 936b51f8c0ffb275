"""Losses: a forward pass and a criterion, as a mean over weighted units."""

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax

from fmeta.types import Array, Aux, Batch, Forward, LossFn

# (outputs, batch) -> (loss per unit, {metric per unit}); all the same shape.
Criterion = Callable[[Any, Batch], tuple[Array, dict[str, Array]]]


def softmax_cross_entropy(
  outputs: Array, batch: Batch
) -> tuple[Array, dict[str, Array]]:
  """-log softmax(logits)[label] and the accuracy, per example.

  Args:
    outputs: logits [B, classes].
    batch: `label` int [B].
  """
  chex.assert_rank([outputs, batch['label']], [2, 1])
  outputs = outputs.astype(jnp.promote_types(outputs.dtype, jnp.float32))
  loss = optax.softmax_cross_entropy_with_integer_labels(
    outputs, batch['label']
  )
  correct = (outputs.argmax(-1) == batch['label']).astype(loss.dtype)
  return loss, {'accuracy': correct}


def squared_error(
  outputs: Array, batch: Batch
) -> tuple[Array, dict[str, Array]]:
  """Mean squared error over the last axis, per example.

  Args:
    outputs: predictions [B, D].
    batch: `target` [B, D].
  """
  chex.assert_equal_shape([outputs, batch['target']])
  return jnp.mean((outputs - batch['target']) ** 2, axis=-1), {}


def supervised(forward: Forward, criterion: Criterion) -> LossFn:
  """A `LossFn` from a model and a criterion.

  The value is sum_i w_i l_i / sum_i w_i with w the batch's optional `weight`
  (0 for padding rows), so microbatches of unequal weight add up exactly.
  """

  def loss_fn(params, model_state, batch, rng):
    outputs, model_state = forward(params, model_state, batch, rng)
    losses, metrics = criterion(outputs, batch)
    weight = batch.get('weight')
    weight = jnp.ones_like(losses) if weight is None else weight
    chex.assert_equal_shape([losses, weight])
    total = weight.sum()
    # A batch of padding only: zero loss, zero gradient, no division by zero.
    share = weight / jnp.where(total > 0, total, 1)
    loss = jnp.sum(losses * share)
    means = {key: jnp.sum(value * share) for key, value in metrics.items()}
    return loss, Aux(model_state, means, total, outputs)

  return loss_fn


def cast(forward: Forward, dtype: Any) -> Forward:
  """Runs a forward pass in another precision on f32 master weights.

  Parameters and floating inputs are cast on the way in and outputs back to
  f32, so gradients, losses and optimiser state stay f32.
  """

  def lower(x):
    x = jnp.asarray(x)
    return x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x

  def wrapped(params, model_state, batch, rng):
    outputs, model_state = forward(
      jax.tree.map(lower, params),
      model_state,
      {k: v if k == 'weight' else lower(v) for k, v in batch.items()},
      rng,
    )
    return jax.tree.map(lambda x: x.astype(jnp.float32), outputs), model_state

  return wrapped
