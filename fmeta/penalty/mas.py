"""Memory aware synapses: importance without labels."""

import functools
from collections.abc import Iterable

import jax
import jax.numpy as jnp

from fmeta import tree
from fmeta.errors import check_number
from fmeta.fisher.mean import mean_over
from fmeta.penalty.online_ewc import online_ewc
from fmeta.types import (
  Array,
  Batch,
  Forward,
  ModelState,
  Params,
  Penalty,
  Scalar,
)


def mas(strength: Scalar) -> Penalty:
  """Memory aware synapses.

    strength * sum_i Omega_i (p_i - p*_i)^2

  with p* the latest task's optimum and Omega the sum over tasks of
  `output_sensitivity` at the task's end (Aljundi et al. 2018,
  https://arxiv.org/abs/1711.09601).

  Args:
    strength: the paper's lambda, without a half. May be traced.

  Raises:
    UsageError: for a strength below 0, or, at a task's end, no batches.
  """
  check_number('mas strength', strength)
  return online_ewc(2 * strength, output_sensitivity)


def output_sensitivity(
  forward: Forward,
  params: Params,
  moving: Params,
  model_state: ModelState,
  batches: Iterable[Batch],
  rng: Array,
) -> Params:
  """How much each parameter changes the squared length of the outputs.

    Omega_i = mean over x of | d ||f(x)||^2 / d p_i |

  The absolute value is taken example by example, so gradients of opposite
  sign do not cancel and neither batch size nor padding rows (weight 0) change
  the mean. Runs in evaluation mode; labels are not read. An `Importance`, so
  it fits `ewc` as well.

  Args:
    forward: outputs are [B, ...].
    params: full merged parameters.
    moving: the subtree to differentiate.
    model_state: read only.
    batches: host batches with optional `weight`.
    rng: unused.

  Returns:
    Importance, shaped like `moving`.
  """
  del rng

  def add(total, count, batch):
    return _add(forward, total, count, params, moving, model_state, batch)

  return mean_over(add, moving, batches)


# The function is static: every task's pass is one compiled program.
@functools.partial(jax.jit, static_argnums=0)
def _add(forward, total, count, params, moving, model_state, batch):
  size = jax.tree.leaves(batch)[0].shape[0]
  weight = batch.get('weight', jnp.ones(size))

  def one(carry, index):
    total, count = carry
    row = jax.tree.map(lambda x: x[index][None], dict(batch))

    def length(moving):
      full = tree.combine(params, moving)
      return jnp.sum(forward(full, model_state, row, None)[0] ** 2)

    real = weight[index] > 0
    slopes = jax.grad(length)(moving)
    total = jax.tree.map(
      lambda t, s: t + jnp.where(real, jnp.abs(s), 0), total, slopes
    )
    return (total, count + real), None

  return jax.lax.scan(one, (total, count), jnp.arange(size))[0]
