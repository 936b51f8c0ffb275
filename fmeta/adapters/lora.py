"""Low-rank adaptation: LoRA, and rsLoRA, which scales it by the rank's root.

A factor is a leaf beside its kernel, `kernel.lora_a` and `kernel.lora_b`.
"""

import functools
import math

import jax
import jax.numpy as jnp

from fmeta import tree
from fmeta.adapters.factors import (
  Method,
  beside,
  check_born,
  check_rank,
  chosen,
  key_of,
  low_rank,
  run_merged,
)
from fmeta.adapters.layers import Change
from fmeta.errors import UsageError
from fmeta.types import Array, Params, Scalar, Tuning

A, B = SUFFIXES = ('.lora_a', '.lora_b')


def lora_init(
  params: Params, rng: Array, patterns: tuple[str, ...], rank: int
) -> dict:
  """The parameters with low-rank factors beside every matching leaf.

  The model starts unchanged. For a kernel A is uniform in +-1/sqrt(fan in)
  and B is zero (Hu et al. 2021, https://arxiv.org/abs/2106.09685, section
  4.1; the distribution of A is the one of the authors' code). For a table A
  is zero and B standard normal, as in their code: a zero A keeps the rows
  that no example has looked up. Use it to let an outer loop own the factors:
  they are then meta-learned instead of drawn anew in every episode.

  Args:
    params: full parameters; a matching leaf is a kernel [in, out] or
      [h, w, in, out], or a table `embedding` [rows, out].
    rng: key; each factor's own key depends on its name only.
    patterns: full-match regular expressions of the leaves to adapt.
    rank: width of the factors, A [..., rank] and B [rank, out].

  Raises:
    UsageError: if a pattern matches nothing or a leaf has no such shape.
  """
  leaves = {}
  for name, leaf in chosen(params, patterns, SUFFIXES).items():
    check_rank('lora', name, leaf, rank)
    leaves[name] = new_factors(name, leaf, rank, key_of(rng, name))
  return beside(params, leaves)


def new_factors(name: str, leaf: Array, rank: int, key: Array) -> dict:
  """A and B of one leaf, see `lora_init`."""
  shapes = (*leaf.shape[:-1], rank), (rank, leaf.shape[-1])
  if name.rpartition('/')[2] == 'embedding':
    a = jnp.zeros(shapes[0], leaf.dtype)
    return {A: a, B: jax.random.normal(key, shapes[1], leaf.dtype)}
  bound = math.prod(leaf.shape[:-1]) ** -0.5
  a = jax.random.uniform(key, shapes[0], leaf.dtype, -bound, bound)
  return {A: a, B: jnp.zeros(shapes[1], leaf.dtype)}


def scaled(scale: Scalar):
  """A `Method.change`: W' = W + scale A B."""
  return lambda kernel, leaves, frozen: Change(leaves[A], scale * leaves[B])


def _lora(what, patterns, rank, scale, also) -> Tuning:
  if rank < 1:
    raise UsageError(f'{what} rank {rank}; give at least 1')
  birth = functools.partial(lora_init, patterns=patterns, rank=rank)
  check = check_born('tuning', rank, A)
  return low_rank(Method(SUFFIXES, birth, scaled(scale), check), also)


def lora(
  *patterns: str,
  rank: int = 8,
  alpha: Scalar = 16.0,
  also: tuple[str, ...] = (),
) -> Tuning:
  """Low-rank adaptation through the activations.

  y = x W + (alpha / rank) (x A) B with W frozen (Hu et al. 2021,
  https://arxiv.org/abs/2106.09685, eq. 3), for dense layers, convolutions
  (A is a convolution to `rank` channels, B a 1x1 one) and tables (A has a row
  per row). No full-size weight gradient is ever formed; `merge` gives
  W + (alpha / rank) A B for export. Factors already among the parameters
  (`lora_init`) are used, otherwise they are born from the key given to
  `init`.

  Args:
    *patterns: full-match regular expressions of kernels and tables.
    rank: width of the factors; 8 as in the paper's Table 2 (RoBERTa-base).
    alpha: scale; 16 as in the paper's Table 9 for rank 8. May be traced.
    also: patterns of ordinary parameters that move too, such as a new head.

  Raises:
    UsageError: if a pattern matches nothing, a leaf has another shape, the
      rank does not fit, or a leaf belongs to a layer that cannot be entered
      (`layers.enter`).
  """
  return _lora('lora', patterns, rank, alpha / max(rank, 1), also)


def rslora(
  *patterns: str,
  rank: int = 8,
  alpha: Scalar = 16.0,
  also: tuple[str, ...] = (),
) -> Tuning:
  """Rank-stabilised LoRA: the scale is alpha / sqrt(rank).

  y = x W + (alpha / sqrt(rank)) (x A) B; activations and gradients then keep
  their size as the rank grows (Kalajdzievski 2023,
  https://arxiv.org/abs/2312.03732).

  Args:
    *patterns: as for `lora`.
    rank: width of the factors; LoRA's default.
    alpha: LoRA's default, untuned; may be traced.
    also: patterns of ordinary parameters that move too.

  Raises:
    UsageError: as `lora`.
  """
  return _lora('rslora', patterns, rank, alpha / max(rank, 1) ** 0.5, also)


def lora_merged(
  *patterns: str,
  rank: int = 8,
  alpha: Scalar = 16.0,
  also: tuple[str, ...] = (),
) -> Tuning:
  """LoRA that runs the model on merged weights, for any parameter.

  The same function of the factors as `lora`, at the cost of a full-size
  weight gradient; for layers that `lora` cannot enter.
  """
  return run_merged(lora(*patterns, rank=rank, alpha=alpha, also=also))


def lora_plus(
  ratio: Scalar = 16.0, rates: tree.Patterns = (('.*', 1.0),)
) -> tuple[tuple[str, Scalar], ...]:
  """LoRA+: rate multipliers that let B move faster than A.

  eta_B = ratio eta_A (Hayou et al. 2024, https://arxiv.org/abs/2402.12354):
  `optim.adamw(rate, multipliers=lora_plus())`.

  Args:
    ratio: eta_B / eta_A; 16 as the paper recommends for Adam. May be traced.
    rates: multipliers of all other leaves, A among them.
  """
  return ((r'(.*/)?[^/]*\.lora_b', ratio), *rates)
