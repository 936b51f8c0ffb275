"""Averages of finished models: soups, and the line between two of them.

All work on parameters. Statistics of a BatchNorm are not parameters and
cannot be averaged with them: they belong to the weights they were collected
under. Trees that hold them are refused, and `recompute_statistics` collects
new ones for an average.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fmeta import tree
from fmeta.errors import UsageError
from fmeta.types import Array, Batch, Forward, ModelState, Params, Scalar

STATISTICS = 'batch_stats'
# alpha = 0, 0.1, ..., 1; the paper's figures use steps of 0.05.
ALPHAS = tuple(k / 10 for k in range(11))


class Soup(NamedTuple):
  """A greedy soup.

  Attributes:
    params: the mean of its ingredients.
    ingredients: their indices, in the order they went in.
    score: of `params`.
  """

  params: Params
  ingredients: list[int]
  score: float


def uniform_soup(candidates: Sequence[Params]) -> Params:
  """The mean of all candidates.

  (Wortsman et al. 2022, https://arxiv.org/abs/2203.05482, section 2.)

  Args:
    candidates: parameters of models that were fine-tuned from one
      pre-trained model.

  Raises:
    UsageError: if there is none, or their leaves differ in name or shape.
  """
  _check(candidates)
  mean = candidates[0]
  for count, params in enumerate(candidates[1:], start=1):
    mean = _stir(mean, count, params)
  return mean


def greedy_soup(
  candidates: Sequence[Params], evaluate: Callable[[Params], float]
) -> Soup:
  """Adds a candidate to the mean where the mean does not get worse.

  From the best candidate to the worst: it goes in if the mean with it scores
  at least as high as the mean without it (Wortsman et al. 2022,
  https://arxiv.org/abs/2203.05482, algorithm 1). The soup is therefore never
  worse than the best candidate by `evaluate`, which has to be another split
  than the one the result is reported on.

  Args:
    candidates: as in `uniform_soup`.
    evaluate: `params -> score`, higher is better; a score that is not a
      number is the worst. For a model with BatchNorm it must call
      `recompute_statistics` first.

  Raises:
    UsageError: as `uniform_soup`.
  """
  _check(candidates)

  def score(params):
    value = float(evaluate(params))
    return -np.inf if np.isnan(value) else value

  scores = [score(params) for params in candidates]
  # Stable: of equal candidates the first.
  first, *others = sorted(range(len(scores)), key=lambda k: -scores[k])
  soup = Soup(candidates[first], [first], scores[first])
  for k in others:
    params = _stir(soup.params, len(soup.ingredients), candidates[k])
    value = score(params)
    if value >= soup.score:
      soup = Soup(params, [*soup.ingredients, k], value)
  return soup


def _stir(mean: Params, count: int, params: Params) -> Params:
  """The mean of `count` + 1 from that of `count` and one more."""
  return _line(mean, params, 1 / (count + 1))


def _line(start: Params, end: Params, alpha: Scalar) -> Params:
  def between(a, b):
    if not _is_float(a):
      return a
    return ((1 - alpha) * a + alpha * b).astype(a.dtype)

  return jax.tree.map(between, start, end)


def interpolate(start: Params, end: Params, alpha: Scalar) -> Params:
  """(1 - alpha) start + alpha end, exact at both ends.

  With the zero-shot or pre-trained model as `start` and the fine-tuned as
  `end` it is WiSE-FT (Wortsman et al. 2022, https://arxiv.org/abs/2109.01903,
  section 3).

  Args:
    start: parameters.
    end: the same names and shapes.
    alpha: may be traced; beyond [0, 1] it extrapolates.

  Raises:
    UsageError: if the trees differ or hold statistics.
  """
  _check((start, end))
  return _line(start, end, alpha)


def interpolation_curve(
  start: Params,
  end: Params,
  evaluate: Callable[[Params], Mapping[str, float]],
  alphas: Sequence[float] = ALPHAS,
) -> list[dict[str, float]]:
  """What the models on the line from `start` to `end` score.

  Args:
    start: parameters at alpha = 0.
    end: parameters at alpha = 1.
    evaluate: `params -> {name: value}`, for example accuracies on the
      training distribution and on a shifted one. For a model with BatchNorm
      it must call `recompute_statistics` first.
    alphas: where.

  Returns:
    `{'alpha': alpha, name: value, ...}` for each; `report.interpolation`
    draws it.

  Raises:
    UsageError: if the trees differ or hold statistics, or there is no alpha.
  """
  if not len(alphas):
    raise UsageError('no alphas; give at least one, for example 0.5')
  mix = jax.jit(interpolate)
  return [
    {'alpha': float(alpha)}
    | {
      name: float(value)
      for name, value in evaluate(mix(start, end, alpha)).items()
    }
    for alpha in alphas
  ]


def _check(candidates: Sequence[Params]) -> None:
  if not len(candidates):
    raise UsageError('a soup of no candidates; give at least one')
  first = _shapes(candidates[0])
  for k, params in enumerate(candidates):
    other = _shapes(params)
    for name in [*first, *(name for name in other if name not in first)]:
      if first.get(name) != other.get(name):
        raise UsageError(
          f'candidate {k} differs from candidate 0 in {name!r}: '
          f'{other.get(name, "absent")} and {first.get(name, "absent")}; '
          'only models of one architecture can be averaged'
        )
  if any(STATISTICS in name.split('/') for name in first):
    raise UsageError(
      f'the parameters hold {STATISTICS!r}, which cannot be averaged; give '
      'parameters only and see recompute_statistics'
    )


def _shapes(params: Params) -> dict[str, tuple[int, ...]]:
  leaves = zip(tree.names(params), jax.tree.leaves(params), strict=True)
  return {name: tuple(np.shape(leaf)) for name, leaf in leaves}


def recompute_statistics(
  forward: Forward,
  params: Params,
  model_state: ModelState,
  batches: Iterable[Batch],
  rng: Array,
) -> ModelState:
  """BatchNorm's statistics of these parameters: the mean over the batches.

  As in stochastic weight averaging (Izmailov et al. 2018,
  https://arxiv.org/abs/1803.05407, section 3.2) and `torch.optim.swa_utils.
  update_bn`: every batch counts the same, whatever the layer's momentum m. A
  step makes m old + (1 - m) new of the statistics, and from old = 0 and
  old = 1 both m and new follow.

  Args:
    forward: in training mode a linear function of the old statistics, as
      every BatchNorm's is.
    params: merged parameters, for example `learner.params(averaged(state))`.
    model_state: gives structure and shapes. A leaf that training leaves alone
      or that is no float keeps its value.
    batches: of equal size, drawn from the training data.
    rng: key, for dropout.

  Raises:
    UsageError: if there is no batch.
  """

  @jax.jit
  def one(params, model_state, batch, rng):
    def after(value):
      old = jax.tree.map(
        lambda x: jnp.full_like(x, value) if _is_float(x) else x, model_state
      )
      return forward(params, old, batch, rng)[1]

    def solve(before, low, high):
      moves = _is_float(before) & (high - low < 1)
      new = low / jnp.where(moves, 1 - (high - low), 1)
      return jnp.where(moves, new, before).astype(before.dtype)

    return jax.tree.map(solve, model_state, after(0), after(1))

  total, count = None, 0
  for batch in batches:
    found = one(params, model_state, batch, jax.random.fold_in(rng, count))
    count += 1
    total = found if total is None else _stir(total, count - 1, found)
  if total is None:
    raise UsageError('no batches to compute statistics on; give at least one')
  return total


def _is_float(x: Any) -> bool:
  return jnp.issubdtype(jnp.asarray(x).dtype, jnp.floating)
