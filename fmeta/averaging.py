"""Averages of the weights along a run: EMA and SWA.

Each wraps an optimiser and keeps the average in the optimiser's state, so
there is still one update rule, and the average is saved, resumed, sharded and
differentiated with the rest. It never changes what the optimiser does:
`averaged(state)` is the state at the averaged weights, and
`with_average(learner)` a learner that is evaluated there.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fmeta.errors import UsageError
from fmeta.types import Array, Learner, Scalar, TrainState


class AverageState(NamedTuple):
  """Of an averaging optimiser: steps taken, and the average so far."""

  count: Array
  average: Any


def ema(
  optimizer: optax.GradientTransformation, decay: Scalar
) -> optax.GradientTransformation:
  """Exponential moving average of the trainable leaves, bias-corrected.

    a_t = (1 - d) / (1 - d^t) * sum_{i=1}^t d^(t-i) p_i

  with p_i the leaves after step i, so a_1 = p_1 and the starting point has no
  share (the correction is that of Kingma & Ba 2014,
  https://arxiv.org/abs/1412.6980, section 3).

  Args:
    optimizer: any optax transformation; its updates are not changed.
    decay: d in [0, 1); may be traced. The average reaches back over some
      1 / (1 - d) steps.

  Raises:
    UsageError: if a number outside [0, 1) is given.
  """
  if isinstance(decay, int | float) and not 0 <= decay < 1:
    raise UsageError(f'ema decay {decay}; give one in [0, 1)')

  def weight(count):
    # (1 - d) / (1 - d^t), exactly 1 at t = 1: in float32 1 - 0.9999 is 2e-4
    # off, and not by the same amount in both.
    log = jnp.log(decay)
    return jnp.expm1(log) / jnp.expm1(count * log)

  return _averaging(optimizer, weight)


def swa(
  optimizer: optax.GradientTransformation,
  start: int | Array,
  every: int | Array = 1,
) -> optax.GradientTransformation:
  """Stochastic weight averaging: the mean of p_start, p_(start+every), ...

  (Izmailov et al. 2018, https://arxiv.org/abs/1803.05407, algorithm 1, where
  the starting point counts: `start=0` and `every` the cycle's length.) Until
  `start` the average is the current leaves. With `every=1` it is Polyak's.
  The rate is the optimiser's business: constant or cyclical from `start` on.

  Args:
    optimizer: any optax transformation; its updates are not changed.
    start: steps before the first leaves are taken; may be traced.
    every: steps from one to the next, the cycle's length; may be traced.
      1 as in `torch.optim.swa_utils` called each step.

  Raises:
    UsageError: if a negative start or `every` below 1 is given.
  """
  if isinstance(start, int) and start < 0:
    raise UsageError(f'swa start={start}; give at least 0')
  if isinstance(every, int) and every < 1:
    raise UsageError(f'swa every={every}; give at least 1')

  def weight(count):
    since = count - start
    taken = jnp.where(since % every == 0, 1 / (1 + since // every), 0.0)
    return jnp.where(since <= 0, 1.0, taken)

  return _averaging(optimizer, weight)


def _averaging(
  optimizer: optax.GradientTransformation,
  weight: Callable[[Array], Array],
) -> optax.GradientTransformation:
  """a <- (1 - w_t) a + w_t p_t beside the optimiser; w = `weight(t)`."""

  def init(params):
    # Copied: `fit` donates the state, and a buffer can be donated only once.
    start = jax.tree.map(lambda p: jnp.array(p, copy=True), params)
    return AverageState(jnp.zeros((), jnp.int32), start)

  def update(updates, state, params=None):
    if params is None:
      raise UsageError('an average of weights needs `params` in each update')
    count = state.count + 1
    w = weight(count)

    def mix(average, p, u):
      # What the step's addition will give. This form, not a + w (p - a),
      # is exact at w = 0 and w = 1.
      p = (p + u).astype(p.dtype)
      return ((1 - w) * average + w * p).astype(average.dtype)

    average = jax.tree.map(mix, state.average, params, updates)
    return updates, AverageState(count, average)

  # Last in the chain, where the updates are final.
  return optax.chain(optimizer, optax.GradientTransformation(init, update))


def _is_average(node: Any) -> bool:
  return isinstance(node, AverageState)


def find_averages(opt_state: Any) -> list[AverageState]:
  """The averages in an optimiser's state, in order."""
  leaves = jax.tree.leaves(opt_state, is_leaf=_is_average)
  return [leaf for leaf in leaves if _is_average(leaf)]


def put_averages(opt_state: Any, averages: list[AverageState]) -> Any:
  """The optimiser's state with other averages; see `find_averages`."""
  given = iter(averages)
  return jax.tree.map(
    lambda node: next(given) if _is_average(node) else node,
    opt_state,
    is_leaf=_is_average,
  )


def averaged(state: TrainState) -> TrainState:
  """The state with the average in place of the trainable leaves.

  For evaluation and export: `learner.params(averaged(state))`. Factors of an
  adapter are averaged as they are, not their product.

  Raises:
    UsageError: if the optimiser keeps no average, or several; or if there is
      model state: a BatchNorm's statistics belong to the last weights. For
      such a model

        state = averaged(state.replace(model_state={}))
        statistics = soups.recompute_statistics(
          forward, learner.params(state), old_statistics, batches, rng)

      and put the old ones back where every BatchNorm was frozen.
  """
  found = find_averages(state.opt_state)
  if len(found) != 1:
    raise UsageError(
      f'the optimiser keeps {len(found)} averages of the weights; wrap it '
      'once: ema(optimizer, decay) or swa(optimizer, start, every)'
    )
  if jax.tree.leaves(state.model_state):
    raise UsageError(
      'the statistics in model_state belong to the last weights, not to their '
      'average; average with model_state={} and see '
      'soups.recompute_statistics'
    )
  return state.replace(trainable=found[0].average)


def with_average(learner: Learner) -> Learner:
  """The same learner, evaluated and exported at the averaged weights.

  `step` and `end_task` are unchanged; `params` and `using` read the average.
  In `train.fit` this is what `evaluate`, `after_stage`, `restore_best` and
  `Fitted.params` then see.

  Raises:
    UsageError: as `averaged`, when `params` or `using` is called.
  """
  return learner._replace(
    params=lambda state: learner.params(averaged(state)),
    using=lambda state: learner.using(averaged(state)),
  )
