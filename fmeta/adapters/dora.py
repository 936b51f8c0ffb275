"""DoRA: the magnitude and the direction of a weight, adapted apart.

Beside a kernel stand `kernel.lora_a`, `kernel.lora_b` (its direction) and
`kernel.dora_m` (the length of each of its columns).
"""

import functools

import jax
import jax.numpy as jnp

from fmeta.adapters.factors import (
  Method,
  beside,
  check_born,
  chosen,
  low_rank,
)
from fmeta.adapters.layers import Change
from fmeta.adapters.lora import A, B, lora_init
from fmeta.errors import UsageError
from fmeta.types import Array, Params, Scalar, Tuning

M = '.dora_m'


def lengths(kernel: Array) -> Array:
  """[..., out] -> [out], the norm of what leads to each output."""
  return jnp.sqrt(jnp.sum(jnp.square(kernel), range(kernel.ndim - 1)))


def dora_init(
  params: Params, rng: Array, patterns: tuple[str, ...], rank: int
) -> dict:
  """The parameters with LoRA factors and magnitudes beside matching leaves.

  Args:
    params: as for `lora_init`.
    rng: as for `lora_init`; the factors are the same.
    patterns: full-match regular expressions of the leaves to adapt.
    rank: width of the factors.

  Raises:
    UsageError: as `lora_init`.
  """
  kernels = chosen(params, patterns, (A, B, M))
  magnitudes = {name: {M: lengths(leaf)} for name, leaf in kernels.items()}
  # Only the kernels are named: `beside` puts M next to them.
  return beside(lora_init(params, rng, patterns, rank), magnitudes)


def dora(
  *patterns: str,
  rank: int = 8,
  alpha: Scalar = 16.0,
  also: tuple[str, ...] = (),
) -> Tuning:
  """Weight-decomposed low-rank adaptation.

    W' = m V / |V|,  V = W + (alpha / rank) A B,

  with a norm per output and m trainable (Liu et al. 2024,
  https://arxiv.org/abs/2402.09353, eq. 5). The norm is a constant in the
  backward pass (section 4.3), so the gradient is the paper's, not that of W';
  neither is a meta-gradient through it. Runs through the activations as
  `lora` does; forming |V| costs in * out * rank per step, whatever the batch.

  Args:
    *patterns: as for `lora`.
    rank: width of the factors; LoRA's default.
    alpha: scale; LoRA's default, untuned. May be traced.
    also: patterns of ordinary parameters that move too.

  Raises:
    UsageError: as `lora`.
  """
  if rank < 1:
    raise UsageError(f'dora rank {rank}; give at least 1')

  def change(kernel, leaves, frozen):
    del frozen
    b = (alpha / rank) * leaves[B]
    norm = lengths(jax.lax.stop_gradient(kernel + leaves[A] @ b))
    # A column of zeros has no direction and stays zero.
    return Change(leaves[A], b, leaves[M] / jnp.where(norm > 0, norm, 1))

  birth = functools.partial(dora_init, patterns=patterns, rank=rank)
  check = check_born('tuning', rank, A)
  return low_rank(Method((A, B, M), birth, change, check), also)
