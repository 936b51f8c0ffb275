"""Which block to tune, read from a few gradients before training.

Lee et al. 2022, "Surgical fine-tuning improves adaptation to distribution
shifts" (https://arxiv.org/abs/2210.11466, section 4): a block whose gradient
is large for its weights (Auto-RGN), or whose gradients agree from example to
example (Auto-SNR), is the one to move. Everything is measured on the given
parameters in evaluation mode; there is nothing random in it.
"""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from fmeta import blocks as blocks_of
from fmeta import tree
from fmeta.blocks import Blocks
from fmeta.errors import UsageError
from fmeta.tuning import select
from fmeta.types import Batch, LossFn, ModelState, Params, Tuning

# (loss_fn, params, batches, blocks, model_state) -> block -> score
Score = Callable[
  [LossFn, Params, Sequence[Batch], Blocks, ModelState], dict[str, float]
]


@functools.partial(jax.jit, static_argnums=0)
def _squares(loss_fn, params, model_state, batch):
  """Per leaf |g|^2 of the batch's mean loss."""
  grads = jax.grad(lambda p: loss_fn(p, model_state, batch, None)[0])(params)
  return jax.tree.map(lambda g: jnp.sum(jnp.square(g)), grads)


def relative_gradients(
  loss_fn: LossFn,
  params: Params,
  batches: Sequence[Batch],
  blocks: Blocks,
  model_state: ModelState = None,
) -> dict[str, float]:
  """Auto-RGN's criterion: gradient norm over weight norm of each block.

  r_b = mean over batches of |g_b|_2 / |w_b|_2 (Lee et al. 2022, section 4).
  A block whose weights are all zero, such as a fresh head, has r = inf.

  Args:
    loss_fn: differentiated with rng=None: no dropout, running statistics.
    params: where the gradient is taken.
    batches: a few, of the data to adapt to.
    blocks: name -> pattern, see `fmeta.blocks.find`.
    model_state: read only.

  Raises:
    UsageError: without a batch, or for a pattern that matches nothing.
  """
  batches = _some(batches)
  weights = blocks_of.totals(
    blocks, jax.tree.map(lambda w: jnp.sum(jnp.square(w)), params)
  )
  sums = dict.fromkeys(blocks, 0.0)
  for batch in batches:
    squares = _squares(loss_fn, params, model_state or {}, batch)
    for block, square in blocks_of.totals(blocks, squares).items():
      sums[block] += square**0.5 / len(batches)
  return {b: _ratio(sums[b], weights[b] ** 0.5) for b in blocks}


def _ratio(gradient: float, weight: float) -> float:
  if weight == 0:
    return float('inf') if gradient > 0 else 0.0
  return gradient / weight


@functools.partial(jax.jit, static_argnums=0)
def _moments(loss_fn, sums, params, model_state, batch):
  """Adds each example's gradient and its square, and counts examples."""

  def one(carry, row):
    row = jax.tree.map(lambda x: x[None], row)
    real = jnp.asarray(row.get('weight', jnp.ones(1)))[0] > 0
    grads = jax.grad(lambda p: loss_fn(p, model_state, row, None)[0])(params)
    first, second, count = carry
    first = jax.tree.map(lambda s, g: s + jnp.where(real, g, 0), first, grads)
    second = jax.tree.map(
      lambda s, g: s + jnp.where(real, g**2, 0), second, grads
    )
    return (first, second, count + real), None

  return jax.lax.scan(one, sums, dict(batch))[0]


def gradient_snr(
  loss_fn: LossFn,
  params: Params,
  batches: Sequence[Batch],
  blocks: Blocks,
  model_state: ModelState = None,
) -> dict[str, float]:
  """Auto-SNR's criterion: how well a block's per-example gradients agree.

  s_b = mean over the block's parameters of mean_i(g_i)^2 / var_i(g_i), with i
  over examples and the biased variance; a parameter without variance, one
  that no example moves, counts as 0 (Lee et al. 2022, section 4). One
  backward pass per example. Arguments as for `relative_gradients`.
  """
  zeros = jax.tree.map(jnp.zeros_like, params)
  sums = zeros, zeros, jnp.zeros((), jnp.int32)
  for batch in _some(batches):
    sums = _moments(loss_fn, sums, params, model_state or {}, batch)
  first, second, count = sums

  def snr(first, second):
    square = jnp.square(first / count)
    variance = second / count - square
    # Rounding can leave a tiny negative variance.
    safe = jnp.where(variance > 0, variance, 1)
    return jnp.sum(jnp.where(variance > 0, square / safe, 0))

  ratios = blocks_of.totals(blocks, jax.tree.map(snr, first, second))
  sizes = blocks_of.totals(blocks, jax.tree.map(jnp.size, params))
  return {block: ratios[block] / sizes[block] for block in blocks}


def _some(batches: Iterable[Batch]) -> list[Batch]:
  batches = list(batches)
  if not batches:
    raise UsageError('no batches to measure gradients on; give at least one')
  return batches


def best_blocks(scores: Mapping[str, float], count: int = 1) -> list[str]:
  """The `count` blocks with the highest scores, the best first.

  Raises:
    UsageError: if there are not that many.
  """
  if not 0 < count <= len(scores):
    raise UsageError(
      f'count={count} blocks of {len(scores)}; choose 1 to {len(scores)}'
    )
  return sorted(scores, key=lambda block: -scores[block])[:count]


def _scored(loss_fn, params, batches, model_state, blocks, also, score):
  """(blocks to choose from, their scores); `also` moves in any case."""
  batches = _some(batches)
  if blocks is None:
    blocks = blocks_of.find(
      lambda params, batch: loss_fn(params, model_state or {}, batch, None)[0],
      params,
      batches[0],
    )
  names = tree.names(params)
  if also:
    tree.check_patterns(also, names)
  pairs = [(pattern, None) for pattern in also]
  owner = blocks_of.assign(blocks, names)
  free = {b for n, b in owner.items() if tree.first_match(n, pairs) is None}
  blocks = {name: p for name, p in blocks.items() if name in free}
  return blocks, score(loss_fn, params, batches, blocks, model_state or {})


def auto_surgical(
  loss_fn: LossFn,
  params: Params,
  batches: Sequence[Batch],
  *,
  model_state: ModelState = None,
  blocks: Blocks | None = None,
  count: int = 1,
  also: tuple[str, ...] = (),
  score: Score = relative_gradients,
) -> Tuning:
  """Surgical fine-tuning of the block that the gradients point at.

  Select the `count` blocks of the highest score (Lee et al. 2022,
  https://arxiv.org/abs/2210.11466, section 4: Auto-RGN, Auto-SNR; the paper
  scales rates softly, see `auto_rates`, and chooses single blocks by hand).

  Args:
    loss_fn: what will be minimised.
    params: the pre-trained parameters.
    batches: a few of the tuning set.
    model_state: of the pre-trained model.
    blocks: name -> pattern to choose from; by default `fmeta.blocks.find` of
      depth 2.
    count: how many blocks move (1, as the paper's surgical rows).
    also: patterns that move in any case, such as a fresh head; blocks that
      they cover are not candidates.
    score: `relative_gradients` (Auto-RGN) or `gradient_snr` (Auto-SNR).

  Raises:
    UsageError: without a batch, or if there are fewer blocks than `count`.
  """
  blocks, scores = _scored(
    loss_fn, params, batches, model_state, blocks, also, score
  )
  chosen = best_blocks(scores, count)
  return select(*(blocks[name] for name in chosen), *also)


def auto_rates(
  loss_fn: LossFn,
  params: Params,
  batches: Sequence[Batch],
  *,
  model_state: ModelState = None,
  blocks: Blocks | None = None,
  also: tuple[str, ...] = (),
  score: Score = relative_gradients,
) -> tree.Patterns:
  """Layer-wise rates from the same scores: the soft version.

  m_b = s_b / max_b s_b, a list of multipliers for `fmeta.optim` (Lee et al.
  2022, section 4; they measure anew each epoch, this is once before
  training). Patterns in `also` and blocks of infinite score get 1. Arguments
  as for `auto_surgical`.

  Raises:
    UsageError: without a batch, or if every score is zero.
  """
  blocks, scores = _scored(
    loss_fn, params, batches, model_state, blocks, also, score
  )
  finite = [s for s in scores.values() if s != float('inf')]
  top = max(finite, default=0.0) or 1.0
  if not any(scores.values()):
    raise UsageError('every block has a zero gradient; give other batches')
  rates: list[tuple[str, Any]] = [(pattern, 1.0) for pattern in also]
  rates += [(p, min(scores[name] / top, 1.0)) for name, p in blocks.items()]
  return tuple(rates)
