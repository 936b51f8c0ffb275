"""How any optax transformation gets layer-wise rates, decay and clipping.

Two kinds of optimiser exist, and one combinator serves each. A *direction*
(`optax.scale_by_...`) leaves the rate to us: `with_rates`. A *complete*
optimiser has its rate inside, because the rate is part of its recursion or is
what it estimates: `with_multipliers`.
"""

from typing import TypedDict

import optax

from fmeta import tree
from fmeta.optim.clipping import clip_by_norm
from fmeta.optim.patterns import (
  DECAY,
  EVERYWHERE,
  decay_by_patterns,
  scale_by_patterns,
)
from fmeta.types import Scalar

Rate = Scalar | optax.Schedule


class Limits(TypedDict, total=False):
  """What every optimiser takes: `multipliers` and `clip_norm`."""

  multipliers: tree.Patterns
  clip_norm: Scalar | None


class Options(Limits, total=False):
  """What `with_rates` takes: decoupled decay as well."""

  weight_decay: Scalar | None
  decay: tree.Patterns


def clipping(clip_norm: Scalar | None) -> list[optax.GradientTransformation]:
  """`clip_by_norm` as the start of a chain, nothing for None."""
  return [] if clip_norm is None else [clip_by_norm(clip_norm)]


def with_rates(
  direction: optax.GradientTransformation,
  rate: Rate,
  *,
  weight_decay: Scalar | None = None,
  decay: tree.Patterns = DECAY,
  multipliers: tree.Patterns = EVERYWHERE,
  clip_norm: Scalar | None = None,
) -> optax.GradientTransformationExtraArgs:
  """An optimiser from a direction.

  For leaf k with multiplier m_k and decay multiplier d_k

    p_k <- p_k - rate m_k (direction(clip(g))_k + weight_decay d_k p_k),

  which is AdamW's decoupled decay (Loshchilov & Hutter 2017,
  https://arxiv.org/abs/1711.05101, algorithm 2) around any direction:

    with_rates(optax.scale_by_amsgrad(), 1e-3, multipliers=...)

  Args:
    direction: gradients to an ascent direction, without a rate.
    rate: float, traced array or optax schedule.
    weight_decay: times the rate and both multipliers; None leaves it out.
    decay: which leaves decay, ordered `(pattern, multiplier)`.
    multipliers: layer-wise rates, ordered `(pattern, multiplier)`. LoRA+
      (Hayou et al. 2024, https://arxiv.org/abs/2402.12354) is
      `((r'.*lora_b', 16.0), ('.*', 1.0))`; their RoBERTa runs are best near
      a ratio of 16.
    clip_norm: largest global norm of the trainable gradient, or None.
  """
  decayed = [] if weight_decay is None else [weight_decay]
  return optax.chain(
    *clipping(clip_norm),
    direction,
    *[decay_by_patterns(strength, decay) for strength in decayed],
    scale_by_patterns(multipliers),
    optax.scale_by_learning_rate(rate),
  )


def with_multipliers(
  optimizer: optax.GradientTransformation,
  *,
  multipliers: tree.Patterns = EVERYWHERE,
  clip_norm: Scalar | None = None,
) -> optax.GradientTransformationExtraArgs:
  """A complete optimiser whose steps are scaled per leaf.

    p_k <- p_k + m_k step(clip(g), p)_k

  Right where a step is proportional to a rate (LARS, Prodigy, MoMo, D-Adapt).
  It is not for optimisers that write parameters anew from their starting
  point (`optax.contrib.cocob`, `madgrad`), nor around an average of iterates:
  put `with_rates` inside `schedule_free` and `mechanize` instead.

  Args:
    optimizer: gradients to the change of the parameters.
    multipliers: layer-wise rates, ordered `(pattern, multiplier)`.
    clip_norm: largest global norm of the trainable gradient, or None.
  """
  return optax.chain(
    *clipping(clip_norm), optimizer, scale_by_patterns(multipliers)
  )
