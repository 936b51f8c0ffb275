"""How the gradient of the objective is taken.

Each function returns something with the contract of
`jax.value_and_grad(fun, has_aux=True)` for objectives of the form
`fun(trainable, frozen, model_state, batch, rng) -> (scalar, Aux)`.
"""

import jax
import jax.numpy as jnp

from fmeta.errors import UsageError
from fmeta.types import Aux, ValueAndGrad


def plain(fun):
  """Reverse mode: `jax.value_and_grad` with the auxiliary output."""
  return jax.value_and_grad(fun, has_aux=True)


def first_order(value_and_grad: ValueAndGrad = plain) -> ValueAndGrad:
  """Treats the gradient as a constant when it is differentiated itself.

  In an inner loop this makes MAML first-order MAML: the meta-gradient is the
  query gradient at the adapted weights (Finn et al. 2017,
  https://arxiv.org/abs/1703.03400, section 5.2).
  """

  def transform(fun):
    def wrapped(*args):
      (value, aux), grads = value_and_grad(fun)(*args)
      # Statistics of the support set are constants, too.
      state = jax.lax.stop_gradient(aux.model_state)
      aux = aux._replace(model_state=state)
      return (value, aux), jax.lax.stop_gradient(grads)

    return wrapped

  return transform


def accumulate(
  num_microbatches: int, value_and_grad: ValueAndGrad = plain
) -> ValueAndGrad:
  """Sums gradients over microbatches, exact for unequal weights.

  With microbatch means g_k over w_k units the result is
  sum_k w_k g_k / sum_k w_k, the gradient of the whole batch's mean, and not
  the mean of means. Model state is threaded through the microbatches in
  order; outputs are concatenated again.

  Args:
    num_microbatches: divides the leading axis of every array of the batch.
    value_and_grad: how each microbatch is differentiated.

  Raises:
    UsageError: if the batch cannot be divided.
  """

  def transform(fun):
    def wrapped(trainable, frozen, model_state, batch, rng):
      parts = jax.tree.map(lambda x: _split(x, num_microbatches), batch)

      def body(carry, inputs):
        model_state, totals = carry
        index, part = inputs
        (loss, aux), grads = value_and_grad(fun)(
          trainable, frozen, model_state, part, jax.random.fold_in(rng, index)
        )
        sums = jax.tree.map(
          lambda x: x * aux.weight, (loss, dict(aux.metrics), grads)
        )
        totals = jax.tree.map(jnp.add, totals, (*sums, aux.weight))
        return (aux.model_state, totals), aux.outputs

      indices = jnp.arange(num_microbatches)
      shapes = jax.eval_shape(
        lambda: _example(fun, trainable, frozen, model_state, parts, rng)
      )
      loss, metrics, weight = shapes
      zeros = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype),
        (loss, metrics, trainable, weight),
      )
      (model_state, totals), outputs = jax.lax.scan(
        body, (model_state, zeros), (indices, parts)
      )
      loss, metrics, grads, weight = totals
      # A batch of padding only has no units and moves nothing.
      scale = 1 / jnp.where(weight > 0, weight, 1)
      loss, metrics, grads = jax.tree.map(
        lambda x: x * scale, (loss, metrics, grads)
      )
      outputs = jax.tree.map(
        lambda x: x.reshape(-1, *x.shape[2:]) if x.ndim > 1 else x, outputs
      )
      return (loss, Aux(model_state, metrics, weight, outputs)), grads

    return wrapped

  return transform


def _split(x, num):
  if x.shape[0] % num:
    raise UsageError(
      f'{num} microbatches do not divide a batch of {x.shape[0]} rows; choose '
      'a divisor'
    )
  return x.reshape(num, x.shape[0] // num, *x.shape[1:])


def _example(fun, trainable, frozen, model_state, parts, rng):
  part = jax.tree.map(lambda x: x[0], parts)
  loss, aux = fun(trainable, frozen, model_state, part, rng)
  return loss, dict(aux.metrics), aux.weight
