"""Directions that divide by a running size of the gradient.

Each function is `with_rates` around an optax direction, so it takes
`multipliers`, `clip_norm`, `weight_decay` and `decay` as `**options`. Any
other direction of optax is used the same way, without a function of ours:
`with_rates(optax.contrib.scale_by_adopt(), rate, ...)`.

An `eps` under a square root (`eps_root`) is what makes a derivative at an
exactly zero gradient finite; see the table in `README.md`.
"""

from typing import Unpack

import jax
import optax
import optax.contrib

from fmeta.optim.rates import Options, Rate, with_rates
from fmeta.types import Array, Scalar


def nadam(
  rate: Rate,
  *,
  b1: Scalar = 0.9,
  b2: Scalar = 0.999,
  eps: Scalar = 1e-8,
  eps_root: Scalar = 0.0,
  **options: Unpack[Options],
) -> optax.GradientTransformation:
  """Adam with Nesterov's momentum.

    u = (b1 m / (1 - b1^(t+1)) + (1 - b1) g / (1 - b1^t)) / (sqrt(v_hat) + eps)

  (Dozat 2016, https://openreview.net/forum?id=OM0jvwB8jIp57ZJjtNEZ, algorithm
  2 with a constant b1; torch's warms b1 up.)

  Args:
    rate: float, traced array or optax schedule.
    b1: decay of the first moment; Adam's.
    b2: decay of the second moment; Adam's.
    eps: added outside the square root.
    eps_root: added inside it.
    **options: see `with_rates`.
  """
  direction = optax.scale_by_adam(b1, b2, eps, eps_root, nesterov=True)
  return with_rates(direction, rate, **options)


def radam(
  rate: Rate,
  *,
  b1: Scalar = 0.9,
  b2: Scalar = 0.999,
  eps: Scalar = 1e-8,
  **options: Unpack[Options],
) -> optax.GradientTransformation:
  """Adam whose first steps, of too large a variance, are momentum steps.

  With rho_t the length of the approximated average, u = r_t m_hat /
  (sqrt(v_hat) + eps) where rho_t >= 5, and u = m_hat before (Liu et al. 2019,
  https://arxiv.org/abs/1908.03265, algorithm 2).

  Args:
    rate: float, traced array or optax schedule.
    b1: decay of the first moment; Adam's.
    b2: decay of the second moment; Adam's.
    eps: added to the root.
    **options: see `with_rates`.
  """
  return with_rates(optax.scale_by_radam(b1, b2, eps), rate, **options)


def adabelief(
  rate: Rate,
  *,
  b1: Scalar = 0.9,
  b2: Scalar = 0.999,
  eps: Scalar = 1e-16,
  eps_root: Scalar = 1e-16,
  **options: Unpack[Options],
) -> optax.GradientTransformation:
  """Adam that divides by the surprise instead of the size of the gradient.

    s <- b2 s + (1 - b2) (g - m)^2 + eps_root,  u = m_hat / (sqrt(s_hat) + eps)

  (Zhuang et al. 2020, https://arxiv.org/abs/2010.07468, algorithm 2.)

  Args:
    rate: float, traced array or optax schedule.
    b1: decay of the first moment; Adam's.
    b2: decay of the second; Adam's.
    eps: added outside the root; 1e-16 is optax's.
    eps_root: added to s; 1e-16 is optax's. Use 1e-8 in an inner loop.
    **options: see `with_rates`.
  """
  direction = optax.scale_by_belief(b1, b2, eps, eps_root)
  return with_rates(direction, rate, **options)


def yogi(
  rate: Rate,
  *,
  b1: Scalar = 0.9,
  b2: Scalar = 0.999,
  eps: Scalar = 1e-3,
  **options: Unpack[Options],
) -> optax.GradientTransformation:
  """Adam whose second moment moves by an amount set by the gradient alone.

    v <- v - (1 - b2) sign(v - g^2) g^2

  (Zaheer et al. 2018, NeurIPS, algorithm 2; both moments start at 1e-6, as in
  optax.)

  Args:
    rate: float, traced array or optax schedule.
    b1: decay of the first moment; Adam's.
    b2: step of the second; Adam's.
    eps: added to the root; 1e-3 in the paper.
    **options: see `with_rates`.
  """
  return with_rates(optax.scale_by_yogi(b1, b2, eps), rate, **options)


def adagrad(
  rate: Rate,
  *,
  initial: Scalar = 0.1,
  eps: Scalar = 1e-7,
  **options: Unpack[Options],
) -> optax.GradientTransformation:
  """Divides by the root of the sum of all squares so far.

    s <- s + g^2,   u = g / sqrt(s + eps)

  (Duchi et al. 2011, https://jmlr.org/papers/v12/duchi11a.html, figure 1,
  diagonal.)

  Args:
    rate: float, traced array or optax schedule.
    initial: s at the start; 0.1 is optax's, untuned.
    eps: added inside the root; 1e-7 is optax's.
    **options: see `with_rates`.
  """
  return with_rates(optax.scale_by_rss(initial, eps), rate, **options)


def rmsprop(
  rate: Rate,
  *,
  b2: Scalar = 0.9,
  eps_root: Scalar = 1e-8,
  momentum: Scalar | None = None,
  **options: Unpack[Options],
) -> optax.GradientTransformation:
  """Divides by the root of a running mean of squares.

    v <- b2 v + (1 - b2) g^2,   u = trace(g / sqrt(v + eps_root))

  (Tieleman & Hinton 2012, Coursera lecture 6.5.)

  Args:
    rate: float, traced array or optax schedule.
    b2: decay of the mean of squares; 0.9 in the lecture.
    eps_root: added inside the root; 1e-8 is optax's.
    momentum: decay of a velocity after it; none by default.
    **options: see `with_rates`.
  """
  scaled = optax.scale_by_rms(b2, eps_root)
  if momentum is not None:
    scaled = optax.chain(scaled, optax.trace(momentum))
  return with_rates(scaled, rate, **options)


def adafactor(
  rate: Rate,
  *,
  min_dim: int = 128,
  decay_rate: Scalar = 0.8,
  threshold: Scalar = 1.0,
  eps: Scalar = 1e-30,
  **options: Unpack[Options],
) -> optax.GradientTransformation:
  """Second moments of matrices as an outer product of row and column means.

    v = R C / mean(R),   u = max(1e-3, rms(p)) clip_rms(g / sqrt(v), threshold)

  (Shazeer & Stern 2018, https://arxiv.org/abs/1804.04235, algorithm 4.) A
  leaf's state is its rows plus its columns. `weight_decay` is times the rate,
  as in torch; optax's is not.

  Args:
    rate: the relative step; the paper has min(1e-2, 1 / sqrt(t)).
    min_dim: factors leaves whose two largest axes have at least this size;
      128 is optax's.
    decay_rate: the mean's decay is 1 - t^-decay_rate; 0.8 in the paper.
    threshold: largest root mean square of a leaf's update; 1 in the paper.
    eps: added to squares; 1e-30 in the paper.
    **options: see `with_rates`.
  """
  direction = optax.chain(
    optax.scale_by_factored_rms(
      decay_rate=decay_rate, min_dim_size_to_factor=min_dim, epsilon=eps
    ),
    optax.clip_by_block_rms(threshold),
    optax.scale_by_param_block_rms(),
  )
  return with_rates(direction, rate, **options)


def adan(
  rate: Rate,
  *,
  b1: Scalar = 0.98,
  b2: Scalar = 0.92,
  b3: Scalar = 0.99,
  eps: Scalar = 1e-8,
  eps_root: Scalar = 1e-8,
  **options: Unpack[Options],
) -> optax.GradientTransformation:
  """Adam with a moment of the gradient's differences.

    u = (m_hat + (1 - b2) v_hat) / (sqrt(n_hat + eps_root) + eps)

  where v averages d = g - g_before and n the squares of g + (1 - b2) d (Xie et
  al. 2022, https://arxiv.org/abs/2208.06677, algorithm 1, with b_k for their
  1 - beta_k).

  Args:
    rate: float, traced array or optax schedule.
    b1: decay of the gradient's moment; 0.98 in the paper.
    b2: decay of the differences' moment; 0.92 in the paper.
    b3: decay of the second moment; 0.99 in the paper.
    eps: added outside the root.
    eps_root: added inside it; 1e-8 is optax's.
    **options: see `with_rates`.
  """
  direction = optax.scale_by_adan(b1, b2, b3, eps, eps_root)
  return with_rates(direction, rate, **options)


def sophia(
  rate: Rate,
  key: Array,
  *,
  b1: Scalar = 0.965,
  b2: Scalar = 0.99,
  gamma: Scalar = 0.01,
  interval: int = 10,
  **options: Unpack[Options],
) -> optax.GradientTransformation:
  """Divides by a running diagonal of the Hessian and clips each entry.

    u = clip(m_hat / max(gamma h, 1e-8), 1)

  where every `interval` steps h averages z * (H z) with random signs z
  (Sophia-H; Liu et al. 2023, https://arxiv.org/abs/2305.14342, algorithms 1
  and 3). The learner's step hands over the loss whose Hessian it is.

  Args:
    rate: float, traced array or optax schedule.
    key: for the random signs; it lives in the optimiser's state.
    b1: decay of the first moment; 0.965 is optax's (0.96 in the paper).
    b2: decay of the diagonal; 0.99 in the paper.
    gamma: scale of the diagonal; 0.01 in the paper for Sophia-H.
    interval: steps between two estimates; 10 in the paper.
    **options: see `with_rates`.
  """
  # As plain integers: a state is saved as arrays of numbers.
  seed = jax.random.key_data(key)
  direction = optax.contrib.sophia(
    -1.0,  # an ascent direction: the rate is ours
    b1,
    b2,
    weight_decay=0.0,
    gamma=gamma,
    update_interval=interval,
    hessian_diagonal_fn=optax.contrib.hutchinson_estimator_diag_hessian(seed),
  )
  return with_rates(direction, rate, **options)
