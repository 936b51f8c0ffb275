"""What fine-tuning did to the weights of each block."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from fmeta import blocks as blocks_of
from fmeta import tree
from fmeta.blocks import Blocks
from fmeta.errors import UsageError
from fmeta.types import Params


def relative_change(
  before: Params, after: Params, blocks: Blocks
) -> dict[str, float]:
  """|w_after - w_before|_2 / |w_before|_2 of each block.

  A block that was all zero and has moved has an infinite change.

  Args:
    before: the pre-trained parameters.
    after: the fine-tuned ones, of the same names and shapes.
    blocks: name -> pattern.

  Raises:
    UsageError: if names or shapes differ.
  """
  check_same(before, after)
  moved = _norms(jax.tree.map(jnp.subtract, after, before), blocks)
  start = _norms(before, blocks)
  return {
    name: moved[name] / start[name]
    if start[name]
    else (float('inf') if moved[name] else 0.0)
    for name in blocks
  }


def check_same(before: Params, after: Params) -> None:
  """Refuses two parameter trees of different models.

  Raises:
    UsageError: naming the first leaf that differs.
  """
  old, new = _shapes(before), _shapes(after)
  for name in [*old, *new]:
    if old.get(name) != new.get(name):
      raise UsageError(
        f'parameter {name!r} has shape {old.get(name)} before and '
        f'{new.get(name)} after; give the model that the run started from'
      )


def _shapes(params):
  leaves = jax.tree.leaves(params)
  return dict(zip(tree.names(params), map(jnp.shape, leaves), strict=True))


def _norms(params, blocks):
  squares = jax.tree.map(lambda w: jnp.sum(jnp.square(w)), params)
  sums = blocks_of.totals(blocks, squares)
  return {name: value**0.5 for name, value in sums.items()}


def effective_rank(matrix: np.ndarray) -> float:
  """exp of the entropy of the singular values, as shares of their sum.

  erank(A) = exp(-sum_k p_k ln p_k), p_k = s_k / sum_j s_j; between 1 and
  rank(A), and 0 for a zero matrix (Roy & Vetterli 2007, "The effective rank: a
  measure of effective dimensionality", definition 1,
  https://www.eurasip.org/Proceedings/Eusipco/Eusipco2007/Papers/a5p-h05.pdf).

  Args:
    matrix: [m, n].

  Raises:
    UsageError: if it is no matrix.
  """
  matrix = np.asarray(matrix)
  if matrix.ndim != 2:
    raise UsageError(
      f'an array of shape {matrix.shape} has no effective rank; give a matrix'
    )
  values = np.linalg.svd(matrix, compute_uv=False).astype(np.float64)
  if not values.sum():
    return 0.0
  shares = values / values.sum()
  shares = shares[shares > 0]
  return float(np.exp(-np.sum(shares * np.log(shares))))


def change_ranks(
  before: Params, after: Params, blocks: Blocks
) -> dict[str, tuple[float, float] | None]:
  """(effective rank of the change, the largest possible) of each block.

  Both are means over the block's leaves of two or more axes, each as the
  matrix [all but the last axis, the last]; None for a block without any.

  Raises:
    UsageError: if names or shapes differ.
  """
  check_same(before, after)
  names = tree.names(before)
  owner = blocks_of.assign(blocks, names)
  found: dict[str, list[Sequence[float]]] = {name: [] for name in blocks}
  leaves = jax.tree.leaves(before), jax.tree.leaves(after)
  for name, old, new in zip(names, *leaves, strict=True):
    if name in owner and old.ndim > 1:
      change = np.asarray(new) - np.asarray(old)
      change = change.reshape(-1, change.shape[-1])
      found[owner[name]].append((effective_rank(change), min(change.shape)))
  return {
    name: tuple(np.mean(ranks, axis=0).tolist()) if ranks else None
    for name, ranks in found.items()
  }
