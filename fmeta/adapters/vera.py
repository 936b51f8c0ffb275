"""VeRA: one pair of random matrices for all layers, two vectors in each.

Beside a kernel stand the trained `kernel.vera_d` and `kernel.vera_b`; the
shared matrices are the frozen leaves `vera.a` and `vera.b` at the top.
"""

import functools

import jax
import jax.numpy as jnp

from fmeta import tree
from fmeta.adapters.factors import (
  Method,
  beside,
  check_born,
  chosen,
  key_of,
  low_rank,
)
from fmeta.adapters.layers import Change
from fmeta.errors import UsageError
from fmeta.types import Array, Params, Tuning

D, B = SUFFIXES = ('.vera_d', '.vera_b')
SHARED_A, SHARED_B = SHARED = ('vera.a', 'vera.b')


def vera_init(
  params: Params, rng: Array, patterns: tuple[str, ...], rank: int
) -> dict:
  """The parameters with VeRA's vectors, and the shared matrices.

  A [largest in, rank] and B [rank, largest out] are uniform in
  +-sqrt(6 / fan in) (Kaiming); a layer uses their first rows and columns. d
  is 0.1 (peft's default) and b is zero, so the model starts unchanged
  (Kopiczko et al. 2023, https://arxiv.org/abs/2310.11454).

  Args:
    params: full parameters; matching kernels are [in, out].
    rng: key of the shared matrices.
    patterns: full-match regular expressions of the kernels to adapt.
    rank: width of the matrices; it may exceed a kernel's sides.

  Raises:
    UsageError: if a pattern matches nothing or a leaf is not [in, out].
  """
  kernels = chosen(params, patterns, SUFFIXES)
  for name, kernel in kernels.items():
    if kernel.ndim != 2:
      raise UsageError(
        f'vera needs [in, out] kernels, but {name!r} has shape {kernel.shape}; '
        'narrow the pattern'
      )
  widest = [max(k.shape[axis] for k in kernels.values()) for axis in (0, 1)]
  dtype = jnp.result_type(*kernels.values())
  leaves = {
    name: {
      D: jnp.full((rank,), 0.1, kernel.dtype),
      B: jnp.zeros((kernel.shape[1],), kernel.dtype),
    }
    for name, kernel in kernels.items()
  }

  def uniform(name, shape, fan_in):
    bound = (6 / fan_in) ** 0.5
    return jax.random.uniform(key_of(rng, name), shape, dtype, -bound, bound)

  return {
    **beside(params, leaves),
    SHARED_A: uniform(SHARED_A, (widest[0], rank), widest[0]),
    SHARED_B: uniform(SHARED_B, (rank, widest[1]), rank),
  }


def _change(kernel, leaves, frozen) -> Change:
  rows, columns = kernel.shape
  # Both vectors beside B: the inputs are then not kept for the backward pass.
  b = leaves[D][:, None] * tree.get(frozen, SHARED_B)[:, :columns]
  return Change(tree.get(frozen, SHARED_A)[:rows], b * leaves[B][None])


def vera(*patterns: str, rank: int = 256, also: tuple[str, ...] = ()) -> Tuning:
  """Vector-based random matrix adaptation.

  y = x W + ((x A) * d) B * b with A and B random, frozen and shared by all
  layers (Kopiczko et al. 2023, https://arxiv.org/abs/2310.11454, with inputs
  on the left). It trains rank + out numbers per layer, but computes as
  much as a LoRA of the same rank.

  Args:
    *patterns: full-match regular expressions of [in, out] kernels.
    rank: width of the shared matrices; 256 is peft's default, untuned.
    also: patterns of ordinary parameters that move too.

  Raises:
    UsageError: if a pattern matches nothing, a kernel is not [in, out], the
      shared matrices are missing, or a kernel belongs to a layer that cannot
      be entered (`layers.enter`).
  """
  if rank < 1:
    raise UsageError(f'vera rank {rank}; give at least 1')
  birth = functools.partial(vera_init, patterns=patterns, rank=rank)
  check = check_born('tuning', rank, D)
  return low_rank(Method(SUFFIXES, birth, _change, check, SHARED), also)
