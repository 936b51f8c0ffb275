"""Clipping whose derivative is right where a gradient is exactly zero.

The norm has no derivative at zero, and optax's clips give NaN there in an
outer gradient, also when nothing is clipped. These are the same functions
with the root taken of 1 where the sum of squares is 0.
"""

import jax
import jax.numpy as jnp
import optax

from fmeta.errors import UsageError
from fmeta.types import Array, Scalar

# Brock et al. 2021, equation 3: parameters that start at zero can move.
ADAPTIVE_EPS = 1e-3


def safe_root(squares: Array) -> Array:
  """Square root with derivative 0 at 0, instead of infinity.

  Args:
    squares: non-negative, any shape.
  """
  # Not `> 0`: a NaN has to stay one.
  some = squares != 0
  return jnp.where(some, jnp.sqrt(jnp.where(some, squares, 1)), 0)


def clip_by_norm(max_norm: Scalar) -> optax.GradientTransformation:
  """Scales all gradients so that their global norm is at most `max_norm`.

    g <- g min(1, max_norm / |g|)

  (Pascanu et al. 2013, https://arxiv.org/abs/1211.5063, algorithm 1.) The
  values are those of `optax.clip_by_global_norm`.

  Args:
    max_norm: largest norm over all leaves; may be traced.
  """

  def update(updates, state, params=None):
    del params
    squares = optax.tree.norm(updates, squared=True)
    norm = safe_root(squares)
    inside = (norm < max_norm) | (squares == 0)
    divisor = jnp.where(squares != 0, norm, 1)

    def clip(g):
      return jnp.where(inside, g, g / divisor.astype(g.dtype) * max_norm)

    return jax.tree.map(clip, updates), state

  return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def clip_by_unit(
  ratio: Scalar, eps: Scalar = ADAPTIVE_EPS
) -> optax.GradientTransformation:
  """Adaptive gradient clipping, by output unit.

    g_i <- g_i min(1, ratio max(|p_i|, eps) / |g_i|)

  where i is an output unit: a column of a kernel [..., out], a whole leaf if
  it has one axis (Brock et al. 2021, https://arxiv.org/abs/2102.06171, eq. 3).
  The values are those of `optax.adaptive_grad_clip`, except for a kernel [1,
  out], which optax takes for a vector.

  Args:
    ratio: largest norm of a unit's gradient over that of its parameters; may
      be traced. The paper uses 0.01 (section 4.1).
    eps: smallest norm of parameters that counts.
  """

  def one(g, p):
    squares = _by_unit(g)
    norm = safe_root(squares)
    allowed = ratio * jnp.maximum(safe_root(_by_unit(p)), eps)
    scale = allowed / jnp.where(squares != 0, norm, 1)
    return jnp.where((norm < allowed) | (squares == 0), g, g * scale)

  def update(updates, state, params=None):
    if params is None:
      raise UsageError('clip_by_unit needs the parameters; none were given')
    return jax.tree.map(one, updates, params), state

  return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _by_unit(x):
  axes = tuple(range(x.ndim if x.ndim < 2 else x.ndim - 1))
  return jnp.sum(jnp.square(x), axis=axes, keepdims=True)
