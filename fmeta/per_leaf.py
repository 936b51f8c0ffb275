"""Optimisers whose leaves each count their own steps.

Adam corrects its moments by one count for all leaves. A leaf that thaws in a
later phase starts with zero moments under a large count, and its first
updates are 2.5 to 5 times the rate. `per_leaf` gives every leaf a state of
its own, count included.
"""

from typing import Any, NamedTuple

import jax
import optax

from fmeta import tree
from fmeta.optim import (
  DECAY,
  EVERYWHERE,
  Rate,
  decay_by_patterns,
  scale_by_patterns,
)
from fmeta.types import Scalar


class PerLeafState(NamedTuple):
  """Leaf name -> state of the transformation on that leaf alone."""

  leaves: dict[str, Any]


def _alone(name: str, leaf: Any) -> Any:
  """A tree of this leaf under its full name, so that patterns find it."""
  for key in reversed(name.split('/')):
    leaf = {key: leaf}
  return leaf


def per_leaf(
  transformation: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
  """Runs a transformation on every leaf alone.

  u_p = T(g_p, s_p, p) with a state s_p per leaf p: for Adam the same updates
  as together, and a count that `fmeta.retune` starts at zero for a leaf that
  thaws. Wrap what keeps slots and a count, `scale_by_adam`. Leave out what is
  meant to see all leaves (clipping by the global norm would clip each alone)
  and schedules (a thawed leaf would start the schedule anew).

  Args:
    transformation: any optax transformation.
  """
  inner = optax.with_extra_args_support(transformation)

  def init(params):
    def start(name, leaf):
      return inner.init(_alone(name, leaf))

    named = zip(tree.names(params), jax.tree.leaves(params), strict=True)
    return PerLeafState({name: start(name, leaf) for name, leaf in named})

  def update(updates, state, params=None, **extra):
    leaves, structure = jax.tree.flatten(updates)
    values = [None] * len(leaves) if params is None else jax.tree.leaves(params)
    moved, states = [], {}
    for name, leaf, value in zip(
      tree.names(updates), leaves, values, strict=True
    ):
      given = None if params is None else _alone(name, value)
      alone, states[name] = inner.update(
        _alone(name, leaf), state.leaves[name], given, **extra
      )
      moved += jax.tree.leaves(alone)
    return jax.tree.unflatten(structure, moved), PerLeafState(states)

  return optax.GradientTransformationExtraArgs(init, update)


def adamw_per_leaf(
  rate: Rate,
  *,
  weight_decay: Scalar = 0.01,
  decay: tree.Patterns = DECAY,
  multipliers: tree.Patterns = EVERYWHERE,
  clip_norm: Scalar | None = 1.0,
  b1: Scalar = 0.9,
  b2: Scalar = 0.999,
  eps: Scalar = 1e-8,
  eps_root: Scalar = 0.0,
) -> optax.GradientTransformation:
  """`optim.adamw` for phases: every leaf has its own step count.

  The gradient's norm is that of all trainable leaves and a schedule counts
  the steps of the run, as in `optim.adamw`, whose arguments, defaults and
  sources these are.
  """
  clip = [] if clip_norm is None else [optax.clip_by_global_norm(clip_norm)]
  return optax.chain(
    *clip,
    per_leaf(optax.scale_by_adam(b1, b2, eps, eps_root)),
    decay_by_patterns(weight_decay, decay),
    scale_by_patterns(multipliers),
    optax.scale_by_learning_rate(rate),
  )
