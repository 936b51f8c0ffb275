"""Dropout whose masks are drawn a stack at a time.

Threefry is a third of a small model's step on a CPU and, with one generator
per dropout, most of its compilation. One generator for all layers and two
16-bit draws from each 32-bit word keep both small.
"""

import jax
import jax.numpy as jnp

from fmeta.types import Array

_STEPS = 1 << 16


def kept_fraction(rate: float) -> float:
  """1 - rate rounded to 16 bits, the probability that `keep` has exactly."""
  return round((1.0 - rate) * _STEPS) / _STEPS


def keep(rng: Array, rate: float, shape: tuple[int, ...]) -> Array:
  """A mask of independent draws, True with `kept_fraction(rate)`."""
  words = jax.random.bits(rng, (*shape[:-1], -(-shape[-1] // 2)), jnp.uint32)
  halves = jax.lax.bitcast_convert_type(words, jnp.uint16)
  halves = halves.reshape(*shape[:-1], -1)[..., : shape[-1]]
  return halves.astype(jnp.uint32) < round(kept_fraction(rate) * _STEPS)


def drop(x: Array, mask: Array | None, rate: float) -> Array:
  """Zero where `mask` is False, scaled to keep the mean; None: x itself.

  Srivastava et al. 2014, in the inverted form.
  """
  if mask is None:
    return x
  return jnp.where(mask, x / kept_fraction(rate), 0.0)
