"""Diagonal Fisher information without a loop over examples.

With per-example gradients g(x, y) = grad log p(y | x) of the leaves that
move, all three are means over the examples, so neither the batch size nor
padding rows (weight 0) change them:

  exact      E_x sum_y p(y | x) g(x, y)^2
  sampled    E_x g(x, y)^2 with y ~ p(. | x)
  empirical  E_x g(x, label)^2, which is not a Fisher

(Martens 2020, https://arxiv.org/abs/1412.1193, section 11; Kunstner et al.
2019, https://arxiv.org/abs/1905.12558.) They equal a loop
over examples (`tests/fisher_by_example.py`) for any model. A leaf that the
model uses once, in a matrix product, a convolution without groups or a lookup,
gets its squares
from the layer's inputs and the cotangents of its outputs (`fisher.rows`),
which costs about what the gradient of the batch does. Every other leaf
(norms, biases, tied tables, what a loop reuses) holds B gradients of its size
until they are squared. Memory for a layer that sees sequences or images is
B times its kernel; smaller batches change no number. Everything runs in
evaluation mode and model state is left alone.
"""

import functools
from collections.abc import Iterable

import jax
import jax.numpy as jnp

from fmeta.fisher.labels import Labels, drawn, of_the_data, summed_over
from fmeta.fisher.mean import mean_over
from fmeta.fisher.passes import (
  keys_of,
  over_labels,
  passed,
  squares,
  without_padding,
)
from fmeta.types import Array, Batch, Forward, ModelState, Params


def exact_fisher(
  forward: Forward,
  params: Params,
  moving: Params,
  model_state: ModelState,
  batches: Iterable[Batch],
  rng: Array,
) -> Params:
  """Labels summed over: one backward pass per batch and class.

    F = 1/N sum_n sum_y p(y | x_n) (d log p(y | x_n) / d theta)^2

  Args:
    forward: outputs are logits [B, classes].
    params: full merged parameters.
    moving: the subtree to differentiate.
    model_state: read only.
    batches: host batches with optional `weight`.
    rng: unused here.

  Returns:
    The diagonal, shaped like `moving`.

  Raises:
    UsageError: if the outputs are not logits of one row per example.
  """
  return _mean(summed_over, forward, params, moving, model_state, batches, rng)


def sampled_fisher(
  forward: Forward,
  params: Params,
  moving: Params,
  model_state: ModelState,
  batches: Iterable[Batch],
  rng: Array,
) -> Params:
  """One label per example drawn from the model: unbiased for the exact one.

  The key of example number n is `fold_in(rng, n)`. Arguments and result as
  for `exact_fisher`.
  """
  return _mean(drawn, forward, params, moving, model_state, batches, rng)


def empirical_fisher(
  forward: Forward,
  params: Params,
  moving: Params,
  model_state: ModelState,
  batches: Iterable[Batch],
  rng: Array,
) -> Params:
  """Squared gradients at the data's own labels: no Fisher, but often used.

  Batches need `label` int [B]. Arguments and result as for `exact_fisher`.

  Raises:
    UsageError: also if there are no such labels.
  """
  return _mean(of_the_data, forward, params, moving, model_state, batches, rng)


def _mean(labels, forward, params, moving, model_state, batches, rng):
  def add(total, count, batch):
    return add_batch(
      labels, forward, total, count, params, moving, model_state, batch, rng
    )

  return mean_over(add, moving, batches)


# Functions are static: every task's pass is one compiled program.
@functools.partial(jax.jit, static_argnums=(0, 1))
def add_batch(
  labels: Labels,
  forward: Forward,
  total: Params,
  count: Array,
  params: Params,
  moving: Params,
  model_state: ModelState,
  batch: Batch,
  rng: Array,
) -> tuple[Params, Array]:
  """Adds a batch's sum of squares to `total` and its examples to `count`."""
  batch, real = without_padding(batch)
  one = passed(forward, params, moving, model_state, batch)
  added = over_labels(
    labels,
    one,
    batch,
    keys_of(rng, count, real),
    real,
    lambda cotangents: squares(one, cotangents, moving),
  )
  # Nothing real: the rows are padding still.
  some = real.any()
  total = jax.tree.map(lambda t, s: t + jnp.where(some, s, 0), total, added)
  return total, count + real.sum()
