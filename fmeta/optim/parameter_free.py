"""Optimisers that estimate their rate, or need no schedule for it."""

from typing import Any, Unpack

import jax
import optax
import optax.contrib

from fmeta import tree
from fmeta.errors import UsageError
from fmeta.optim.patterns import DECAY, decay_by_patterns
from fmeta.optim.rates import (
  Limits,
  Options,
  Rate,
  with_multipliers,
  with_rates,
)
from fmeta.types import Scalar, TrainState


def dog(
  rate: Rate = 1.0,
  *,
  initial: Scalar = 1e-6,
  eps: Scalar = 1e-8,
  weight_decay: Scalar = 0.0,
  decay: tree.Patterns = DECAY,
  **limits: Unpack[Limits],
) -> optax.GradientTransformation:
  """Distance over gradients: the rate is how far we came over what it took.

    u = max_k |p_k - p_0| / sqrt(sum_k |g_k|^2 + eps) g

  with the distance initial (1 + |p_0|) at first (Ivgi et al. 2023,
  https://arxiv.org/abs/2302.12022, section 1). The paper averages the iterates.

  Args:
    rate: times the estimate; 1 in the paper.
    initial: 1e-6 in the paper, 1e-4 with batch norm.
    eps: added to the sum of squares; the paper's.
    weight_decay: added to the gradient.
    decay: which leaves decay.
    **limits: `multipliers` and `clip_norm`.
  """
  direction = optax.chain(
    decay_by_patterns(weight_decay, decay),
    optax.contrib.dog(-1.0, ('heuristic', initial), eps),
  )
  return with_rates(direction, rate, **limits)


def prodigy(
  rate: Rate = 1.0,
  *,
  b1: Scalar = 0.9,
  b2: Scalar = 0.999,
  eps: Scalar = 1e-8,
  initial: Scalar = 1e-6,
  growth: Scalar = 1.0,
  **limits: Unpack[Limits],
) -> optax.GradientTransformation:
  """Adam times an estimate d of the distance to the solution.

    d <- max(d, growth * sum_k w_k <g_k, p_0 - p_k> / |sum_k w_k g_k|_1)

  with weights w that favour recent steps (Mishchenko & Defazio 2023,
  https://arxiv.org/abs/2306.06101, algorithm 4). It has no decay of ours: the
  paper's is times d, which only the optimiser knows; use a penalty.

  Args:
    rate: times the estimate; 1 in the paper, or a schedule of peak 1.
    b1: decay of the first moment; Adam's.
    b2: decay of the second moment; Adam's.
    eps: added to the root, times d.
    initial: d at the start; 1e-6 in the paper.
    growth: factor on the estimate; 1 in the paper.
    **limits: `multipliers` and `clip_norm`.
  """
  step = optax.contrib.prodigy(
    rate, (b1, b2), eps=eps, estim_lr0=initial, estim_lr_coef=growth
  )
  return with_multipliers(step, **limits)


def schedule_free(
  optimizer: optax.GradientTransformation,
  rate: Rate,
  *,
  b1: Scalar = 0.9,
  power: Scalar = 2.0,
) -> optax.GradientTransformation:
  """Steps at z, an average x, gradients in between: no decaying schedule.

    y = (1 - b1) z + b1 x,   z <- z + step(grad(y)),   x <- (1 - c) x + c z

  with c = rate^power over its sum so far (Defazio et al. 2024,
  https://arxiv.org/abs/2405.15682, section 1). What a learner trains is y;
  `at_average` gives x, which is what one evaluates and keeps.

  Args:
    optimizer: any optimiser without momentum; its layer-wise rates, decay and
      clipping are those of z.
    rate: the optimiser's own, for the weights of the average; optax reads a
      schedule one step ahead here.
    b1: share of the average in y; 0.9 in the paper. Not 0.
    power: 2 in the paper's code.
  """
  return optax.contrib.schedule_free(optimizer, rate, b1, power)


def schedule_free_adamw(
  rate: Rate,
  *,
  b1: Scalar = 0.9,
  b2: Scalar = 0.999,
  eps: Scalar = 1e-8,
  **options: Unpack[Options],
) -> optax.GradientTransformation:
  """`schedule_free` around Adam without its first moment.

  Args:
    rate: float, traced array or a schedule that only warms up.
    b1: see `schedule_free`.
    b2: decay of the second moment; Adam's.
    eps: added to the root.
    **options: see `with_rates`.
  """
  direction = optax.scale_by_rms(
    b2, eps, eps_in_sqrt=False, bias_correction=True
  )
  return schedule_free(with_rates(direction, rate, **options), rate, b1=b1)


def at_average(state: TrainState) -> TrainState:
  """The state with the average x of `schedule_free` as its parameters.

    x = (y - (1 - b1) z) / b1

  Args:
    state: of a learner whose optimiser is, or contains, `schedule_free`.

  Raises:
    UsageError: if its optimiser has no such average.
  """
  found = [s for s in _states(state.opt_state) if _is_averaging(s)]
  if len(found) != 1:
    raise UsageError(
      f'at_average needs an optimiser with one schedule_free, this has '
      f'{len(found)}; build it with optim.schedule_free'
    )
  average = optax.contrib.schedule_free_eval_params(found[0], state.trainable)
  return state.replace(trainable=average)


def _is_averaging(state: Any) -> bool:
  return isinstance(state, optax.contrib.ScheduleFreeState)


def _states(opt_state: Any) -> list:
  return jax.tree.leaves(opt_state, is_leaf=_is_averaging)
