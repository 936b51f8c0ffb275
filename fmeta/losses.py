"""Losses: a forward pass and a criterion, as a mean over weighted units."""

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax

from fmeta.errors import UsageError
from fmeta.types import Array, Aux, Batch, Forward, LossFn, Scalar

# (outputs, batch) -> (loss per unit, {metric per unit}); all the same shape.
Criterion = Callable[[Any, Batch], tuple[Array, dict[str, Array]]]


def softmax_cross_entropy(
  outputs: Array, batch: Batch
) -> tuple[Array, dict[str, Array]]:
  """-sum_k q_k log softmax(logits)_k and the accuracy, per example.

  With a class as label that is -log softmax(logits)[label]. The accuracy
  counts a distribution's likeliest class.

  Args:
    outputs: logits [B, classes].
    batch: `label`, int [B], or float [B, classes], distributions (mixup's).
  """
  label = batch['label']
  outputs = outputs.astype(jnp.promote_types(outputs.dtype, jnp.float32))
  if jnp.issubdtype(label.dtype, jnp.floating):
    chex.assert_rank(outputs, 2)
    chex.assert_equal_shape([outputs, label])
    loss = optax.softmax_cross_entropy(outputs, label)
    label = label.argmax(-1)
  else:
    chex.assert_rank([outputs, label], [2, 1])
    loss = optax.softmax_cross_entropy_with_integer_labels(outputs, label)
  correct = (outputs.argmax(-1) == label).astype(loss.dtype)
  return loss, {'accuracy': correct}


def smoothed_cross_entropy(smoothing: Scalar = 0.1) -> Criterion:
  """Label smoothing: cross entropy against labels mixed with the uniform.

    l = (1 - a) CE(q, p) + a CE(1 / classes, p)

  (Szegedy et al. 2016, https://arxiv.org/abs/1512.00567, section 7.) The
  metric `cross_entropy` is the one against the labels themselves. Labels as
  in `softmax_cross_entropy`.

  Args:
    smoothing: a in [0, 1]; 0.1 as in the paper. May be traced.

  Raises:
    UsageError: if a number outside [0, 1] is given.
  """
  if isinstance(smoothing, int | float) and not 0 <= smoothing <= 1:
    raise UsageError(f'label smoothing {smoothing}; give one in [0, 1]')

  def criterion(outputs, batch):
    plain, metrics = softmax_cross_entropy(outputs, batch)
    uniform = -jax.nn.log_softmax(outputs.astype(plain.dtype)).mean(-1)
    loss = (1 - smoothing) * plain + smoothing * uniform
    return loss, {**metrics, 'cross_entropy': plain}

  return criterion


def focal_cross_entropy(gamma: Scalar = 2.0) -> Criterion:
  """Focal loss: examples that are right already count less.

    l = (1 - p_label)^gamma * -log p_label

  (Lin et al. 2017, https://arxiv.org/abs/1708.02002, eq. 4.) With a
  distribution as label p_label is exp(-CE). The metric `cross_entropy` is the
  plain one.

  Args:
    gamma: at least 0; 2 as in the paper. May be traced.

  Raises:
    UsageError: if a negative number is given.
  """
  if isinstance(gamma, int | float) and gamma < 0:
    raise UsageError(f'focal gamma {gamma}; give at least 0')

  def criterion(outputs, batch):
    plain, metrics = softmax_cross_entropy(outputs, batch)
    # 1 - exp(-l) without the cancellation where l is small.
    missing = -jnp.expm1(-plain)
    return missing**gamma * plain, {**metrics, 'cross_entropy': plain}

  return criterion


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
