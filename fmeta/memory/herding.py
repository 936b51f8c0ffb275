"""Exemplars whose mean is the mean of their class."""

import jax
import jax.numpy as jnp

from fmeta.errors import UsageError
from fmeta.types import Array


def herding(
  features: Array, labels: Array, weight: Array, num_classes: int, size: int
) -> Array:
  """Orders rows so that the first k of a class have nearly its mean.

  With mu_c the class mean, the k-th row of class c is

    argmin_x |mu_c - (phi(x) + sum_{j<k} phi(p_j)) / k|

  over the rows not yet chosen, the first of equals (Rebuffi et al. 2017,
  https://arxiv.org/abs/1611.07725, algorithm 4). All classes at once.

  Args:
    features: [N, D], of unit length for iCaRL; sums of them are not scaled
      again.
    labels: int [N] in [0, num_classes).
    weight: [N], zero for padding.
    num_classes: static.
    size: exemplars per class, static.

  Returns:
    int32 [N]: k - 1 for the k-th exemplar of its class, `size` for a row
    that is none.

  Raises:
    UsageError: for features without a feature axis, or another number of rows.
  """
  given = jnp.shape(features), jnp.shape(labels), jnp.shape(weight)
  if len(given[0]) != 2 or given[1] != given[0][:1] or given[2] != given[1]:
    raise UsageError(
      f'features, labels and weight of shapes {given}; give [N, D], [N], [N]'
    )
  rows = jnp.arange(len(labels), dtype=jnp.int32)
  real = weight > 0
  member = jax.nn.one_hot(labels, num_classes, dtype=features.dtype)
  member = member * real[:, None].astype(features.dtype)
  count = jnp.maximum(member.sum(0), 1)
  total = jnp.matmul(member.T, features, precision='highest')
  mean = total / count[:, None]

  def choose(carry, k):
    sums, order = carry
    gap = mean[labels] - (features + sums[labels]) / (k + 1)
    free = real & (order == size)
    distance = jnp.where(free, jnp.sum(gap**2, axis=-1), jnp.inf)
    least = jax.ops.segment_min(distance, labels, num_classes)
    best = free & (distance == least[labels])
    winner = jax.ops.segment_min(
      jnp.where(best, rows, len(rows)), labels, num_classes
    )
    there = winner < len(rows)
    added = jnp.where(there[:, None], features[winner % len(rows)], 0)
    slot = jnp.where(there, winner, len(rows))
    return (sums + added, order.at[slot].set(k, mode='drop')), None

  start = jnp.zeros_like(mean), jnp.full(len(rows), size, jnp.int32)
  order = jax.lax.scan(choose, start, jnp.arange(size, dtype=jnp.int32))[0][1]
  return order
