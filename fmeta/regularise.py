"""R-Drop: two dropout passes that have to agree."""

import chex
import jax
import jax.numpy as jnp

from fmeta.types import Array, LossFn, Scalar


def r_drop(loss_fn: LossFn, strength: Scalar) -> LossFn:
  """Adds the divergence between two dropout passes to their mean loss.

    (l_1 + l_2) / 2 + strength * (KL(p_1 | p_2) + KL(p_2 | p_1)) / 2

  (Wu et al. 2021, https://arxiv.org/abs/2106.14448, eqs. 2 to 4.) The paper
  adds l_1 + l_2: half of its objective with alpha = 2 * strength. The mean
  keeps the scale of the plain loss, to which strength 0 and no dropout lead
  back. The metric `divergence` is the unweighted second term. Evaluation
  (`rng=None`) is one pass without it. A step costs two.

  Args:
    loss_fn: a mean over the rows of the batch's optional `weight`, whose
      `Aux.outputs` are logits, one row of the last axis per unit.
    strength: may be traced. The paper's alpha is 5 in translation and 0.1
      to 1 on GLUE.
  """

  def wrapped(params, model_state, batch, rng):
    if rng is None:
      return loss_fn(params, model_state, batch, rng)
    first, second = jax.random.split(rng)
    one, aux = loss_fn(params, model_state, batch, first)
    two, again = loss_fn(params, aux.model_state, batch, second)
    rows = symmetric_kl(aux.outputs, again.outputs)
    weight = batch.get('weight')
    weight = jnp.ones_like(rows) if weight is None else weight
    chex.assert_equal_shape([rows, weight])
    total = weight.sum()
    share = weight / jnp.where(total > 0, total, 1)
    divergence = jnp.sum(rows * share)
    metrics = jax.tree.map(
      lambda a, b: 0.5 * (a + b), dict(aux.metrics), dict(again.metrics)
    )
    aux = aux._replace(
      model_state=again.model_state,
      metrics={**metrics, 'divergence': divergence},
    )
    return 0.5 * (one + two) + strength * divergence, aux

  return wrapped


def symmetric_kl(first: Array, second: Array) -> Array:
  """(KL(p | q) + KL(q | p)) / 2 = sum_k (p_k - q_k) log(p_k / q_k) / 2.

  Args:
    first: logits of p, [..., classes].
    second: logits of q, the same shape.

  Returns:
    In nats, [...], float32 or wider.
  """
  chex.assert_equal_shape([first, second])
  dtype = jnp.promote_types(first.dtype, jnp.float32)
  p, q = (jax.nn.log_softmax(x.astype(dtype)) for x in (first, second))
  return 0.5 * jnp.sum((jnp.exp(p) - jnp.exp(q)) * (p - q), axis=-1)
