"""Shrink and perturb."""

import jax
import jax.numpy as jnp

from fmeta.errors import UsageError
from fmeta.types import Params, Scalar, TrainState


def shrink_and_perturb(
  state: TrainState, fresh: Params, shrink: Scalar, sigma: Scalar
) -> TrainState:
  """Moves the trainable leaves towards a fresh start, between two tasks.

    p <- shrink * p + sigma * p_fresh

  (Ash & Adams 2020, https://arxiv.org/abs/1910.08475.) A scaled fresh start
  is noise of each layer's own size. For use between two
  calls of `train.fit`, or of `adapt`:

    fresh = learner.init(make_params(key), key).trainable
    state = shrink_and_perturb(state, fresh, 0.4, 0.1)

  Slots of the optimiser stay; for a fresh optimiser too, take `opt_state`
  from that `learner.init`. A penalty's anchor stays.

  Args:
    state: of any learner.
    fresh: shaped like `state.trainable`.
    shrink: 1 leaves the leaves, 0 forgets them; may be traced.
    sigma: share of the fresh start; may be traced.

  Raises:
    UsageError: if `fresh` has other leaves than the state.
  """
  here, there = (jax.tree.map(jnp.shape, x) for x in (state.trainable, fresh))
  if here != there:
    raise UsageError(
      f'fresh leaves are {there}, those of the state {here}; give '
      'learner.init(fresh_params, key).trainable'
    )

  def mix(p, new):
    return (shrink * p + sigma * new).astype(p.dtype)

  return state.replace(trainable=jax.tree.map(mix, state.trainable, fresh))
