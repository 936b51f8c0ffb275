"""PiSSA: LoRA that starts from the principal part of the weight.

The factors are LoRA's, `kernel.lora_a` and `kernel.lora_b`; the kernel beside
them is the residual, which stays frozen.
"""

import functools

import jax.numpy as jnp

from fmeta.adapters.factors import (
  Method,
  beside,
  check_born,
  check_rank,
  chosen,
  leaves_of,
  low_rank,
)
from fmeta.adapters.lora import SUFFIXES, A, B, scaled
from fmeta.errors import UsageError
from fmeta.types import Array, Params, Tuning


def principal(kernel: Array, rank: int) -> tuple[Array, Array]:
  """A = U_r sqrt(S_r), B = sqrt(S_r) V_r' of W = U S V', the best rank-r A B.

  Args:
    kernel: [..., out]; its leading axes are one.
    rank: r.
  """
  matrix = kernel.reshape(-1, kernel.shape[-1])
  u, s, v = jnp.linalg.svd(matrix, full_matrices=False)
  root = jnp.sqrt(s[:rank])
  a = (u[:, :rank] * root[None]).reshape(*kernel.shape[:-1], rank)
  return a, root[:, None] * v[:rank]


def pissa_init(
  params: Params, rng: Array, patterns: tuple[str, ...], rank: int
) -> dict:
  """The parameters with principal factors; kernels become the residual W - AB.

  Args:
    params: as for `lora_init`.
    rng: not used: nothing is random.
    patterns: full-match regular expressions of the leaves to adapt.
    rank: width of the factors.

  Raises:
    UsageError: as `lora_init`.
  """
  del rng
  leaves = {}
  for name, leaf in chosen(params, patterns, SUFFIXES).items():
    check_rank('pissa', name, leaf, rank)
    a, b = principal(leaf, rank)
    leaves[name] = {'': leaf - a @ b, A: a, B: b}
  return beside(params, leaves)


def pissa(*patterns: str, rank: int = 8, also: tuple[str, ...] = ()) -> Tuning:
  """Principal singular values and vectors adaptation.

  y = x W_res + (x A) B, with A B the principal part of W at the start (Meng
  et al. 2024, https://arxiv.org/abs/2404.02948): the function of
  LoRA with scale 1, started where the gradient is large. `pissa_to_lora`
  turns the result into factors for the original weights.

  Args:
    *patterns: as for `lora`.
    rank: width of the factors; LoRA's default, untuned.
    also: patterns of ordinary parameters that move too.

  Raises:
    UsageError: as `lora`.
  """
  if rank < 1:
    raise UsageError(f'pissa rank {rank}; give at least 1')
  birth = functools.partial(pissa_init, patterns=patterns, rank=rank)
  check = check_born('tuning', rank, A)
  return low_rank(Method(SUFFIXES, birth, scaled(1.0), check), also)


def pissa_to_lora(params: Params, start: Params, trained: Params) -> dict:
  """The original parameters with the LoRA factors of what PiSSA has learned.

  W_res + A B = W + [A, A0] [B; -B0], exactly, so rank 2 r and
  `lora(rank=2 * r, alpha=2 * r)`, whose scale is 1.

  Args:
    params: the original parameters.
    start: trainable leaves at the start, A0 and B0 among them.
    trained: the same leaves after training.

  Raises:
    UsageError: if `start` and `trained` have not the same factors.
  """
  first, last = leaves_of(start, SUFFIXES), leaves_of(trained, SUFFIXES)
  if not first or set(first) != set(last):
    raise UsageError(
      f'factors of {sorted(first)} at the start but of {sorted(last)} after '
      'training; give the trainable leaves of one PiSSA run'
    )
  leaves = {
    name: {
      A: jnp.concatenate([last[name][A], first[name][A]], -1),
      B: jnp.concatenate([last[name][B], -first[name][B]], 0),
    }
    for name in last
  }
  return beside(params, leaves)
