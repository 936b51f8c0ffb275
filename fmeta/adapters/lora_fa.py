"""LoRA-FA: the first factor stays as it was born, the second moves.

The leaves are LoRA's; `kernel.lora_a` is among the frozen ones.
"""

from contextlib import contextmanager

from fmeta import tree
from fmeta.adapters.lora import A, lora
from fmeta.errors import UsageError
from fmeta.types import Params, Scalar, Tuning


def lora_fa(
  *patterns: str,
  rank: int = 8,
  alpha: Scalar = 16.0,
  also: tuple[str, ...] = (),
) -> Tuning:
  """Low-rank adaptation with a frozen A.

  y = x W + (alpha / rank) (x A) B where only B moves (Zhang et al. 2023,
  https://arxiv.org/abs/2308.03303): W changes within the span of A's columns,
  no gradient of A is formed and its inputs need not be kept.

  Args:
    *patterns: full-match regular expressions of kernels.
    rank: width of the factors; LoRA's default.
    alpha: scale; LoRA's default, untuned. May be traced.
    also: patterns of ordinary parameters that move too.

  Raises:
    UsageError: as `lora`, and for a table, whose A is zero at birth.
  """
  whole = lora(*patterns, rank=rank, alpha=alpha, also=also)

  def init(params, rng):
    trainable, frozen = whole.init(params, rng)
    still, moving = tree.partition(trainable, lambda name: name.endswith(A))
    for name in tree.names(still):
      if name.endswith(f'embedding{A}'):
        raise UsageError(
          f'{name!r} is born zero and would stay so; leave tables out of the '
          'patterns of lora_fa, or use lora'
        )
    return moving, tree.combine(frozen, still)

  @contextmanager
  def intercept(trainable, frozen):
    with whole.intercept(*_as_lora(trainable, frozen)) as params:
      yield params

  return whole._replace(
    init=init,
    merge=lambda trainable, frozen: whole.merge(*_as_lora(trainable, frozen)),
    intercept=intercept,
  )


def _as_lora(trainable: Params, frozen: Params) -> tuple[Params, Params]:
  """The leaves as `lora` splits them."""
  factors, still = tree.partition(frozen, lambda name: name.endswith(A))
  return tree.combine(trainable, factors), still
