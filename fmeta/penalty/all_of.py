"""Several penalties as one."""

import jax
import jax.numpy as jnp

from fmeta.penalty.quadratic import require_penalty
from fmeta.types import Penalty


def all_of(*penalties: Penalty) -> Penalty:
  """The sum of penalties, each with a state of its own.

  Their `direct` are composed in the order given: the first sees the total
  gradient. Each draws from a key of its own. The state is a tuple.

  Args:
    *penalties: any; none is no penalty.

  Raises:
    UsageError: for an argument that is none, such as a list.
  """
  for each in penalties:
    require_penalty(each)

  def init(trainable, params):
    return tuple(each.init(trainable, params) for each in penalties)

  def value(trainable, params, state, batch, rng):
    values = [
      each.value(trainable, params, own, batch, _key(rng, k))
      for k, (each, own) in enumerate(zip(penalties, state, strict=True))
    ]
    return sum(values, jnp.zeros(()))

  def direct(grads, state):
    for each, own in zip(penalties, state, strict=True):
      grads = each.direct(grads, own)
    return grads

  def observe(state, *seen):
    return tuple(
      each.observe(own, *seen)
      for each, own in zip(penalties, state, strict=True)
    )

  def consolidate(state, trainable, params, model_state, forward, batches, rng):
    # Read by each penalty: an iterator would be empty after the first.
    batches = list(batches)
    return tuple(
      each.consolidate(
        own, trainable, params, model_state, forward, batches, _key(rng, k)
      )
      for k, (each, own) in enumerate(zip(penalties, state, strict=True))
    )

  return Penalty(init, value, direct, observe, consolidate)


def _key(rng, k):
  return None if rng is None else jax.random.fold_in(rng, k)
