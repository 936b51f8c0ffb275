"""Augmentation as a value: a batch and a key in, a batch out.

An `Augment` runs inside the compiled step. `augmented(loss_fn, augment)` is a
`LossFn` like any other, so the same augmentation serves plain training, an
inner loop and a stream; its key is derived from the step's, which is a
function of (seed, step), so a resumed run draws what it would have drawn. In
evaluation (`rng=None`) nothing is changed.
"""

from collections.abc import Callable

import jax

from fmeta.types import Array, Batch, LossFn

Augment = Callable[[Batch, Array], Batch]


def augmented(loss_fn: LossFn, augment: Augment) -> LossFn:
  """The loss on an augmented batch; on the batch itself where rng is None."""

  def wrapped(params, model_state, batch, rng):
    if rng is None:
      return loss_fn(params, model_state, batch, rng)
    key, rng = jax.random.split(rng)
    return loss_fn(params, model_state, augment(batch, key), rng)

  return wrapped


def chain(*augments: Augment) -> Augment:
  """One after the other, each with a key of its own."""

  def augment(batch, key):
    for index, each in enumerate(augments):
      batch = each(batch, jax.random.fold_in(key, index))
    return batch

  return augment
