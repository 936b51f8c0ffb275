"""All numbers of the page, from two sets of parameters and some examples."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from fmeta import blocks as blocks_of
from fmeta import evaluate, fisher, losses, surgical, tree
from fmeta.blocks import Blocks
from fmeta.data import take
from fmeta.errors import UsageError
from fmeta.explain import activations, weights
from fmeta.explain.flips import Flip, flips
from fmeta.explain.recipe import Recipe, block_multipliers
from fmeta.types import Batch, Forward, ModelState, Params


class Case(NamedTuple):
  """A fine-tuning run to explain.

  Attributes:
    forward: a classifier made of linen modules.
    before: parameters at the start.
    after: merged parameters at the end.
    batches: labelled examples as `data.eval_batches` gives them.
    state_before: model state at the start.
    state_after: and at the end.
    recipe: how fast it moved, if that is known.
  """

  forward: Forward
  before: Params
  after: Params
  batches: Sequence[Batch]
  state_before: ModelState = None
  state_after: ModelState = None
  recipe: Recipe | None = None


class BlockRow(NamedTuple):
  """One block's numbers.

  Attributes:
    name: of the block.
    parameters: how many scalars it has.
    change: |w_after - w_before| / |w_before|.
    rank: effective rank of the change, and the largest possible; None for a
      block without matrices.
    cka: similarity of its outputs before and after; None for a block that is
      not one module.
    fisher: mean diagonal Fisher of a parameter after training.
    ratio: gradient norm over weight norm before training.
    rate: highest rate that was applied to it; None if that is not known.
  """

  name: str
  parameters: int
  change: float
  rank: tuple[float, float] | None
  cka: float | None
  fisher: float
  ratio: float
  rate: float | None


class Measured(NamedTuple):
  """What the page shows.

  Attributes:
    rows: from input to output.
    labels: true classes [N].
    before: probabilities [N, C] at the start.
    after: probabilities [N, C] at the end.
    flips: examples that changed their class.
    fisher_examples: how many the Fisher is a mean over.
  """

  rows: list[BlockRow]
  labels: np.ndarray
  before: np.ndarray
  after: np.ndarray
  flips: list[Flip]
  fisher_examples: int

  def accuracy(self, probabilities: np.ndarray) -> float:
    """Share of right answers."""
    return float((probabilities.argmax(-1) == self.labels).mean())


# Untuned: a backward pass each, and the figure is read to a factor of two.
FISHER_EXAMPLES = 32
# Untuned: the ratio of a few hundred examples, as in Lee et al. 2022.
RATIO_BATCHES = 4


def measure(
  case: Case,
  *,
  depth: int = 2,
  fisher_examples: int = FISHER_EXAMPLES,
) -> Measured:
  """Compares the model before and after, block by block.

  Args:
    case: the run.
    depth: modules in a block's name, see `fmeta.blocks.find`.
    fisher_examples: rows of the first batch that the Fisher is taken over,
      one label each, drawn from the model with key 0.

  Raises:
    UsageError: if before and after are of different models, there is no
      example, or `batches` have no `label`.
  """
  weights.check_same(case.before, case.after)
  if not case.batches or 'label' not in case.batches[0]:
    raise UsageError('no labelled examples to explain with; give at least two')
  blocks = _blocks(case, depth)
  (old, old_rows), (new, new_rows) = _run_both(case, blocks)
  labels = np.concatenate([_kept(batch, 'label') for batch in case.batches])
  before, after = (
    evaluate.Predictions(logits, labels).probabilities for logits in (old, new)
  )
  cka = {
    name: activations.linear_cka(old_rows[name], new_rows[name])
    for name in old_rows
  }
  some = _first_rows(case.batches[0], fisher_examples)
  return Measured(
    _rows(case, blocks, cka, some),
    labels,
    before,
    after,
    flips(before, after, labels),
    int((np.asarray(some['weight']) > 0).sum()),
  )


def _blocks(case: Case, depth: int) -> dict[str, str]:
  def run(params, batch):
    return case.forward(params, case.state_before or {}, batch, None)[0]

  return blocks_of.find(run, case.before, case.batches[0], depth=depth)


def _run_both(case: Case, blocks: Blocks):
  return [
    activations.run_through(
      case.forward, params, state or {}, case.batches, tuple(blocks)
    )
    for params, state in (
      (case.before, case.state_before),
      (case.after, case.state_after),
    )
  ]


def _kept(batch: Batch, key: str) -> np.ndarray:
  values = np.asarray(batch[key])
  return values[np.asarray(batch.get('weight', np.ones(len(values)))) > 0]


def _first_rows(batch: Batch, count: int) -> dict[str, Any]:
  weight = batch.get('weight', np.ones(len(batch['label']), np.float32))
  return take({**batch, 'weight': weight}, slice(0, count))


def _rows(case, blocks, cka, some) -> list[BlockRow]:
  change = weights.relative_change(case.before, case.after, blocks)
  rank = weights.change_ranks(case.before, case.after, blocks)
  sizes = blocks_of.totals(blocks, jax.tree.map(np.size, case.before))
  loss_fn = losses.supervised(case.forward, losses.softmax_cross_entropy)
  ratio = surgical.relative_gradients(
    loss_fn,
    case.before,
    case.batches[:RATIO_BATCHES],
    blocks,
    case.state_before or {},
  )
  information = fisher.sampled_fisher(
    case.forward,
    case.after,
    case.after,
    case.state_after or {},
    [some],
    jax.random.key(0),
  )
  sums = blocks_of.totals(
    blocks, jax.tree.map(lambda leaf: leaf.sum(), information)
  )
  rate = _peak_rates(case, blocks)
  return [
    BlockRow(
      name,
      int(sizes[name]),
      change[name],
      rank[name],
      cka.get(name),
      sums[name] / sizes[name],
      ratio[name],
      rate.get(name),
    )
    for name in blocks
  ]


def _peak_rates(case: Case, blocks: Blocks) -> dict[str, float]:
  if case.recipe is None or not case.recipe.rates:
    return {}
  tree.check_patterns(
    [pattern for pattern, _ in case.recipe.multipliers],
    tree.names(case.before),
  )
  scales = block_multipliers(case.recipe.multipliers, case.before, blocks)
  peak = max(case.recipe.rates)
  return {name: peak * scale for name, scale in scales.items()}
