"""Dropout whose masks are drawn a stack at a time.

Threefry is a third of a small model's step on a CPU and, with one generator
per dropout, most of its compilation. One generator for all layers and two
16-bit draws from each 32-bit word keep both small.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from fmeta.types import Array

_STEPS = 1 << 16


def kept_fraction(rate: float) -> float:
  """1 - rate rounded to 16 bits, the probability that `keep` has exactly."""
  return round((1.0 - rate) * _STEPS) / _STEPS


def keep(rng: Array, rate: float, shape: tuple[int, ...]) -> Array:
  """A mask of independent draws, True with `kept_fraction(rate)`."""
  return _halves(rng, shape) < round(kept_fraction(rate) * _STEPS)


def path_scales(
  rng: Array, rates: Sequence[float], shape: tuple[int, ...]
) -> Array:
  """What stochastic depth multiplies the branches of each block by.

  0 with the block's rate and 1 / kept_fraction otherwise, so the mean is 1
  (Huang et al. 2016, https://arxiv.org/abs/1603.09382, eqs. 2 and 5, in the
  inverted form: theirs scales at evaluation instead).

  Args:
    rng: key.
    rates: one in [0, 1) per block.
    shape: of one block's draws.

  Returns:
    float32 [len(rates), *shape].
  """
  each = (len(rates), *(1,) * len(shape))
  kept = np.reshape([kept_fraction(rate) for rate in rates], each)
  draws = _halves(rng, (len(rates), *shape))
  stays = draws < np.round(kept * _STEPS).astype(np.uint32)
  return jnp.where(stays, (1 / kept).astype(np.float32), np.float32(0))


def linear_decay(rate: float, num_layers: int) -> list[float]:
  """Drop rates l / L * rate of blocks l = 1..L, the last one's is `rate`.

  (Huang et al. 2016, eq. 4; their last block survives with probability 0.5.)
  """
  return [rate * (k + 1) / num_layers for k in range(num_layers)]


def _halves(rng: Array, shape: tuple[int, ...]) -> Array:
  """Independent uniform 16-bit numbers, as uint32."""
  words = jax.random.bits(rng, (*shape[:-1], -(-shape[-1] // 2)), jnp.uint32)
  halves = jax.lax.bitcast_convert_type(words, jnp.uint16)
  halves = halves.reshape(*shape[:-1], -1)[..., : shape[-1]]
  return halves.astype(jnp.uint32)


def drop(x: Array, mask: Array | None, rate: float) -> Array:
  """Zero where `mask` is False, scaled to keep the mean; None: x itself.

  Srivastava et al. 2014, in the inverted form.
  """
  if mask is None:
    return x
  return jnp.where(mask, x / kept_fraction(rate), 0.0)
