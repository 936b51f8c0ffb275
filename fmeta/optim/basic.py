"""Gradient descent and Adam."""

import optax

from fmeta import tree
from fmeta.optim.patterns import DECAY, EVERYWHERE
from fmeta.optim.rates import Rate, with_rates
from fmeta.types import Scalar, TrainState


def sgd(
  rate: Rate,
  *,
  momentum: Scalar | None = None,
  multipliers: tree.Patterns = EVERYWHERE,
  clip_norm: Scalar | None = None,
) -> optax.GradientTransformation:
  """Stochastic gradient descent; u = -rate * m * trace(g).

  Args:
    rate: float, traced array or optax schedule.
    momentum: decay of the velocity; none by default.
    multipliers: layer-wise rates.
    clip_norm: largest global norm of the trainable gradient; none by default.
  """
  direction = optax.identity() if momentum is None else optax.trace(momentum)
  return with_rates(
    direction, rate, multipliers=multipliers, clip_norm=clip_norm
  )


def nesterov(
  rate: Rate,
  *,
  momentum: Scalar = 0.9,
  multipliers: tree.Patterns = EVERYWHERE,
  clip_norm: Scalar | None = None,
) -> optax.GradientTransformation:
  """Gradient descent with Nesterov's momentum.

    v <- momentum v + g,   u = -rate m (g + momentum v)

  (Sutskever et al. 2013, https://proceedings.mlr.press/v28/sutskever13.html,
  eqs. 3 and 4, in the variables that torch uses.)

  Args:
    rate: float, traced array or optax schedule.
    momentum: decay of the velocity; 0.9 is what optax shows, untuned.
    multipliers: layer-wise rates.
    clip_norm: largest global norm of the trainable gradient; none by default.
  """
  return with_rates(
    optax.trace(momentum, nesterov=True),
    rate,
    multipliers=multipliers,
    clip_norm=clip_norm,
  )


def adamw(
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
  """Bias-corrected Adam with decoupled decay and layer-wise rates.

  (Loshchilov & Hutter 2017, https://arxiv.org/abs/1711.05101, algorithm 2.)
  Decay 0.01 and clipping at 1 are BERT's (Devlin et al. 2018, appendix A.2
  and released code).

  Args:
    rate: float, traced array or optax schedule.
    weight_decay: times the rate and the leaf's multiplier.
    decay: which leaves decay, ordered `(pattern, multiplier)`.
    multipliers: layer-wise rates, ordered `(pattern, multiplier)`.
    clip_norm: largest global norm of the trainable gradient, or None.
    b1: decay of the first moment.
    b2: decay of the second moment.
    eps: added outside the square root.
    eps_root: added inside it; use 1e-8 in an inner loop, where an exactly
      zero gradient otherwise makes the meta-gradient NaN.
  """
  return with_rates(
    optax.scale_by_adam(b1, b2, eps, eps_root),
    rate,
    weight_decay=weight_decay,
    decay=decay,
    multipliers=multipliers,
    clip_norm=clip_norm,
  )


def adam(rate: Rate, *, eps_root: Scalar = 0.0) -> optax.GradientTransformation:
  """Adam without decay or clipping, as meta-learners use it."""
  return adamw(rate, weight_decay=0.0, clip_norm=None, eps_root=eps_root)


def set_hyper(state: TrainState, **values: Scalar) -> TrainState:
  """Sets hyper-parameters that live in the optimiser's state.

  With `optax.inject_hyperparams(factory)(rate=..., ...)` as the optimiser one
  compiled step serves every rate:

    def factory(rate, num_steps):
      return adamw(warmup_linear(rate, num_steps))

  Args:
    state: of a learner with such an optimiser.
    **values: by the names of the factory's arguments.

  Raises:
    KeyError: if the optimiser's state has no such value.
  """
  return state.replace(opt_state=optax.tree.set(state.opt_state, **values))
