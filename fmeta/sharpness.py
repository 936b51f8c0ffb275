"""Sharpness-aware minimisation: the gradient at the worst nearby weights.

Each function is a `value_and_grad` wrapper (see `fmeta.gradients`), so the
step, the optimiser and the penalty do not know. One step costs two gradients.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from fmeta.errors import UsageError
from fmeta.gradients import plain
from fmeta.types import Array, Params, Scalar, ValueAndGrad

# Added to a squared norm: the square root of an exactly zero gradient would
# make a meta-gradient NaN. Below the rounding of any norm above 1e-6.
_TINY = 1e-20


def sharpness_aware(
  rho: Scalar = 0.05, value_and_grad: ValueAndGrad = plain
) -> ValueAndGrad:
  """SAM: the gradient at t + e, where the loss is largest to first order.

    e = rho * g / |g|,  g = grad L(t),  result: grad L(t + e)

  (Foret et al. 2020, https://arxiv.org/abs/2010.01412, eqs. 2 and 3, without
  the second-order term.) The norm is over the trainable leaves. Both
  gradients see the same batch and dropout; value, metrics and model state
  are those at t. `sharpness_aware(rho, accumulate(n))` perturbs once for the
  whole batch, `accumulate(n, sharpness_aware(rho))` once per microbatch
  (their m-sharpness, section 4.1).

  Args:
    rho: radius; 0.05 as in the paper's section 3.1. May be traced.
    value_and_grad: how each of the two gradients is taken.
  """
  _check_radius(rho)
  return _ascending(value_and_grad, lambda g, t: g, rho)


def adaptive_sharpness_aware(
  rho: Scalar = 0.5, eta: Scalar = 0.01, value_and_grad: ValueAndGrad = plain
) -> ValueAndGrad:
  """ASAM: SAM in a ball that scales with the weights.

    e = rho * T^2 g / |T g|,  T = |t| + eta elementwise

  (Kwon et al. 2021, https://arxiv.org/abs/2102.11600, section 4.)

  Args:
    rho: radius; 0.5, the paper's for CIFAR-10. May be traced.
    eta: least scale; 0.01, likewise. May be traced.
    value_and_grad: how each of the two gradients is taken.
  """
  _check_radius(rho)
  return _ascending(value_and_grad, lambda g, t: (jnp.abs(t) + eta) * g, rho)


def _check_radius(rho: Scalar) -> None:
  if isinstance(rho, int | float) and rho < 0:
    raise UsageError(f'sharpness-aware rho={rho}; give at least 0')


def _ascending(
  value_and_grad: ValueAndGrad,
  scale: Callable[[Array, Array], Array],
  rho: Scalar,
) -> ValueAndGrad:
  """The gradient at t + rho T(T g) / |T g|; `scale(g, t)` is T g."""

  def transform(fun):
    def wrapped(trainable, *rest):
      valued, grads = value_and_grad(fun)(trainable, *rest)
      scaled = jax.tree.map(scale, grads, trainable)
      length = rho * jax.lax.rsqrt(_squared_norm(scaled) + _TINY)

      def ascend(t, s):
        return t + (length * scale(s, t)).astype(t.dtype)

      worst = jax.tree.map(ascend, trainable, scaled)
      return valued, value_and_grad(fun)(worst, *rest)[1]

    return wrapped

  return transform


def _squared_norm(tree: Params) -> Array:
  return sum(
    (jnp.sum(x**2) for x in jax.tree.leaves(tree)), start=jnp.zeros(())
  )
