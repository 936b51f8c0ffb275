"""Diagonal Fisher information, one example at a time: the reference.

A loop over examples with a whole backward pass each.

With per-example gradients g(x, y) = grad log p(y | x) of the leaves that
move, all three are means over the examples, so neither the batch size nor
padding rows (weight 0) change them:

  exact      E_x sum_y p(y | x) g(x, y)^2
  sampled    E_x g(x, y)^2 with y ~ p(. | x)
  empirical  E_x g(x, label)^2, which is not a Fisher

(Martens 2020, https://arxiv.org/abs/1412.1193, section 11; Kunstner et al.
2019, https://arxiv.org/abs/1905.12558.) Everything runs in evaluation mode
and model state is left alone.
"""

import functools
from collections.abc import Iterable

import jax
import jax.numpy as jnp

from fmeta import tree
from fmeta.types import Array, Batch, Forward, ModelState, Params


def _sum_over_labels(log_probs_of, moving, batch, key):
  del key
  log_probs, pullback = jax.vjp(log_probs_of, moving)

  def of_class(label):
    one_hot = jnp.zeros_like(log_probs).at[label].set(1.0)
    (grads,) = pullback(one_hot)
    return jax.tree.map(lambda g: jnp.exp(log_probs[label]) * g**2, grads)

  squares = jax.lax.map(of_class, jnp.arange(log_probs.shape[0]))
  return jax.tree.map(lambda x: x.sum(0), squares)


def exact_fisher(
  forward: Forward,
  params: Params,
  moving: Params,
  model_state: ModelState,
  batches: Iterable[Batch],
  rng: Array,
) -> Params:
  """Labels summed over: one backward pass per class and example.

  Args:
    forward: outputs are logits [B, classes].
    params: full merged parameters.
    moving: the subtree to differentiate.
    model_state: read only.
    batches: host batches with optional `weight`.
    rng: unused here.

  Returns:
    The diagonal, shaped like `moving`.
  """

  return _mean_square(
    _sum_over_labels, forward, params, moving, model_state, batches, rng
  )


def _of_a_drawn_label(log_probs_of, moving, batch, key):
  def chosen(moving):
    log_probs = log_probs_of(moving)
    label = jax.random.categorical(key, jax.lax.stop_gradient(log_probs))
    return log_probs[label]

  return jax.tree.map(jnp.square, jax.grad(chosen)(moving))


def sampled_fisher(
  forward: Forward,
  params: Params,
  moving: Params,
  model_state: ModelState,
  batches: Iterable[Batch],
  rng: Array,
) -> Params:
  """One label per example drawn from the model: unbiased for the exact one.

  The key of example number i is `fold_in(rng, i)`. Arguments and result as
  for `exact_fisher`.
  """

  return _mean_square(
    _of_a_drawn_label, forward, params, moving, model_state, batches, rng
  )


def _of_the_data_label(log_probs_of, moving, batch, key):
  del key
  label = batch['label'][0]
  grads = jax.grad(lambda moving: log_probs_of(moving)[label])(moving)
  return jax.tree.map(jnp.square, grads)


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
  """

  return _mean_square(
    _of_the_data_label, forward, params, moving, model_state, batches, rng
  )


def _mean_square(square, forward, params, moving, model_state, batches, rng):
  total = jax.tree.map(jnp.zeros_like, moving)
  count = jnp.zeros((), jnp.int32)
  for batch in batches:
    total, count = _add(
      square, forward, total, count, params, moving, model_state, batch, rng
    )
  return jax.tree.map(lambda t: t / jnp.maximum(count, 1), total)


# Functions are static: every task's pass is one compiled program.
@functools.partial(jax.jit, static_argnums=(0, 1))
def _add(
  square, forward, total, count, params, moving, model_state, batch, rng
):
  size = jax.tree.leaves(batch)[0].shape[0]
  weight = batch.get('weight', jnp.ones(size))

  def one(carry, index):
    total, count = carry
    row = jax.tree.map(lambda x: x[index][None], dict(batch))

    def log_probs_of(moving):
      full = tree.combine(params, moving)
      outputs, _ = forward(full, model_state, row, None)
      return jax.nn.log_softmax(outputs[0])

    real = weight[index] > 0
    key = jax.random.fold_in(rng, count)
    squares = square(log_probs_of, moving, row, key)
    total = jax.tree.map(lambda t, s: t + jnp.where(real, s, 0), total, squares)
    return (total, count + real), None

  return jax.lax.scan(one, (total, count), jnp.arange(size))[0]
