"""How prompts of an example's own enter the model, and their matching loss.

What is chosen per example becomes leaves `.prompt` or `.prefix` [B, P, H],
which enter as those of `adapters.prompt` and `adapters.prefix` do: tokens take
the positions after them, and they are never padding.
"""

from collections.abc import Callable, Mapping
from typing import Any

import chex

from fmeta import tree
from fmeta.adapters import entry, siblings
from fmeta.errors import UsageError
from fmeta.losses import Criterion, supervised
from fmeta.types import (
  Array,
  Batch,
  Forward,
  LossFn,
  ModelState,
  Params,
  Scalar,
)


def leaves_of(params: Params, suffix: str) -> dict[str, Array]:
  """`{owner: leaf}` of the leaves with this suffix.

  Raises:
    UsageError: if there is none.
  """
  found = siblings.collect(params, suffix)
  if not found:
    raise UsageError(
      f'the parameters have no leaf `...{suffix}` to choose from; give those '
      "of the method's tuning, learner.params(state)"
    )
  return found


def only_leaf(params: Params, suffix: str) -> tuple[str, Array]:
  """(owner, leaf) of the one leaf with this suffix."""
  ((owner, leaf),) = leaves_of(params, suffix).items()
  return owner, leaf


def run_with(
  forward: Forward,
  leaves: Mapping[str, Array],
  made_of: tuple[str, ...],
  params: Params,
  model_state: ModelState,
  batch: Batch,
  rng: Array | None,
) -> tuple[Any, ModelState]:
  """Runs the model with leaves that were made of others.

  Args:
    forward: of `models.forward` or `adapters.entering`.
    leaves: by name, ending in `.prompt` or `.prefix`.
    made_of: suffixes of what they were made of, which the model never sees.
    params: with those.
    model_state: of the model.
    batch: of B rows.
    rng: as for a `Forward`.

  Raises:
    UsageError: if the model has no place for the leaves.
  """
  grown = siblings.grow(siblings.without(params, made_of), leaves)
  out = forward(grown, model_state, batch, rng)
  entry.check_entered(siblings.grow({}, leaves), ('.prompt', '.prefix'))
  for name in tree.names(params):
    if name.endswith(made_of):
      entry.note(name, tree.get(params, name))
  return out


def first_of(run: Forward) -> Forward:
  """A forward pass of `(outputs, distance)` that gives the outputs only."""

  def forward(params, model_state, batch, rng):
    (outputs, _), model_state = run(params, model_state, batch, rng)
    return outputs, model_state

  return forward


def matching_loss(
  run: Forward, criterion: Criterion, strength: Scalar
) -> LossFn:
  """criterion + strength * distance, a mean over the batch's rows.

  `Aux.outputs` are the model's own; the distance is the metric `matching`.

  Args:
    run: gives `(outputs, distance [B])`.
    criterion: of the outputs.
    strength: may be traced.
  """
  whole = supervised(run, _with_distance(criterion, strength))

  def loss_fn(params, model_state, batch, rng):
    loss, aux = whole(params, model_state, batch, rng)
    return loss, aux._replace(outputs=aux.outputs[0])

  return loss_fn


def _with_distance(criterion: Criterion, strength: Scalar) -> Callable:
  def both(outputs, batch):
    outputs, distance = outputs
    losses, metrics = criterion(outputs, batch)
    chex.assert_equal_shape([losses, distance])
    return losses + strength * distance, {**metrics, 'matching': distance}

  return both
