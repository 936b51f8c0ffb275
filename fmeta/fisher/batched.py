"""The square of a batch's mean gradient: no Fisher, but often called one."""

import functools
from collections.abc import Iterable

import jax
import jax.numpy as jnp

from fmeta import tree
from fmeta.fisher.labels import of_the_data
from fmeta.fisher.mean import mean_over
from fmeta.types import Array, Batch, Forward, ModelState, Params


def batched_fisher(
  forward: Forward,
  params: Params,
  moving: Params,
  model_state: ModelState,
  batches: Iterable[Batch],
  rng: Array,
) -> Params:
  """Squares of the mean gradients of K batches: what `loss.backward()` gives.

    1/K sum_k (1/B_k sum_{n in batch k} g_n)^2,  g_n = grad log p(label_n | x_n)

  This is no Fisher. For independent examples its mean is

    1/B E[g^2] + (1 - 1/B) E[g]^2,

  so it shrinks with the batch size to the square of the mean gradient, which
  is zero where training has ended; only B = 1 gives `empirical_fisher`. It
  is here to reproduce implementations that square after the mean: a strength
  found with them belongs to their batch size.

  Args:
    forward: outputs are logits [B, classes].
    params: full merged parameters.
    moving: the subtree to differentiate.
    model_state: read only.
    batches: host batches with `label` int [B] and optional `weight`; one of
      padding only does not count.
    rng: unused here.

  Returns:
    Shaped like `moving`.

  Raises:
    UsageError: if a batch has no labels.
  """
  del rng

  def add(total, count, batch):
    return _add(forward, total, count, params, moving, model_state, batch)

  return mean_over(add, moving, batches)


@functools.partial(jax.jit, static_argnums=0)
def _add(forward, total, count, params, moving, model_state, batch):
  size = jax.tree.leaves(batch)[0].shape[0]
  real = jnp.asarray(batch.get('weight', jnp.ones(size))) > 0

  def mean(moving):
    full = tree.combine(params, moving)
    outputs, _ = forward(full, model_state, batch, None)
    log_probs = jax.nn.log_softmax(outputs)
    _, chosen = of_the_data(log_probs, batch, real)
    values = jnp.sum(log_probs * chosen(count), -1)
    return jnp.where(real, values, 0).sum() / jnp.maximum(real.sum(), 1)

  squares = jax.tree.map(jnp.square, jax.grad(mean)(moving))
  total = jax.tree.map(jnp.add, total, squares)
  return total, count + real.any()
