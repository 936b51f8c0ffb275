"""T trials of one learner: one compiled step, a leading axis on what differs.

  def learner(hyper):
    return finetune(loss, optim.adamw(hyper['rate']), tuning=select('head/.*'))

  hyper = log_uniform(0, 16, rate=(1e-4, 1e-1))
  trials = Trials(learner)
  state = trials.init(params, hyper, keys(range(16)))
  state, metrics = trials.run(state, hyper, batches, keys(range(16)), 100)

Each trial is what a run of its own with the same values, key and batches
would be. Frozen leaves are shared, not copied.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fmeta.errors import UsageError
from fmeta.learner import adapt
from fmeta.search.hyper import (
  Factory,
  Hyper,
  Watched,
  as_arrays,
  as_factory,
  num_trials,
)
from fmeta.search.ways import Way, vmapped
from fmeta.train.dispatch import chunks
from fmeta.train.stopping import Monitor
from fmeta.types import (
  Array,
  Batch,
  Learner,
  LossFn,
  ModelState,
  Params,
  TrainState,
)

# i -> batch for all trials, or one such function for each trial.
Batches = Callable[[int], Batch] | Sequence[Callable[[int], Batch]]
# (stacked state, hyper) -> [T]; higher is better, not finite: diverged.
Score = Callable[[TrainState, Hyper], np.ndarray]

_AXES: Any = TrainState(0, 0, None, 0, 0, 0, 0)  # pyright: ignore


def keys(seeds: Sequence[int] | range | np.ndarray) -> Array:
  """`jax.random.key` of each seed, [T]."""
  return jax.vmap(jax.random.key)(jnp.asarray(seeds))


def take(state: TrainState, rows: Any) -> TrainState:
  """The trials `rows` (with repeats, if asked) of a stacked state."""
  rows = jnp.asarray(rows)
  moving = jax.tree.map(lambda x: x[rows], state.replace(frozen={}))
  return moving.replace(frozen=state.frozen)


def one(state: TrainState, trial: int) -> TrainState:
  """One trial's state, as its own learner would hold it."""
  return take(state, trial)


class Trials:
  """Compiled chunks of T runs of one learner.

  Args:
    learner: a function `hyper -> Learner`, or a learner whose optimiser holds
      its hyper-parameters (`optax.inject_hyperparams`), see `injected`.
    way: `vmapped`, `mapped` or `looped`; `compare` says which is fastest.

  Attributes:
    traces: programs traced so far: one per number of trials, number of steps
      and batch shapes.
  """

  def __init__(self, learner: Learner | Factory, way: Way = vmapped):
    self.factory = as_factory(learner)
    self.way = way
    self.traces = 0
    self._shared = way(self._chunk, None)
    self._own = way(self._chunk, 1)

  def init(
    self,
    params: Params | Callable[[Array], Params],
    hyper: Hyper,
    rng: Array,
    model_state: ModelState | None = None,
  ) -> TrainState:
    """The stacked state: every leaf [T, ...] but the frozen ones, shared.

    Args:
      params: of all trials, or a function of a trial's key (fresh heads).
      hyper: name -> [T].
      rng: one key for all trials, or keys [T].
      model_state: of all trials.

    Raises:
      UsageError: if lengths differ, or frozen leaves would.
    """
    _check_keys(rng, num_trials(hyper))

    def start(hyper, key):
      own = params(key) if callable(params) else params
      return self.factory(Watched(hyper)).init(own, key, model_state)

    axes = (0, 0 if rng.ndim else None)
    try:
      return jax.vmap(start, axes, _AXES)(as_arrays(hyper), rng)
    except ValueError as error:
      if 'out_axes' not in str(error):
        raise
      raise UsageError(
        'a frozen leaf differs between trials, which share frozen leaves; '
        'give `init` one key for all trials'
      ) from error

  def run(
    self,
    state: TrainState,
    hyper: Hyper,
    batches: Batches,
    rng: Array,
    num_steps: int,
    *,
    start: int = 0,
    steps_per_dispatch: int | None = None,
  ) -> tuple[TrainState, dict[str, np.ndarray]]:
    """Every trial takes its next steps.

    Args:
      state: stacked; it stays valid.
      hyper: name -> [T].
      batches: `i -> batch`, the same for all trials, or T such functions.
      rng: root key of all trials, or keys [T].
      num_steps: how many.
      start: index of the first batch.
      steps_per_dispatch: steps of one program; all of them by default.

    Returns:
      The new stacked state and each step's metrics, name -> [T, num_steps].

    Raises:
      UsageError: if lengths differ or a hyper-parameter is not read.
    """
    size = _check_run(state, hyper, batches, rng, num_steps)
    limit = num_steps if steps_per_dispatch is None else steps_per_dispatch
    if limit < 1:
      raise UsageError(f'steps_per_dispatch={limit}; give at least 1')
    program = self._shared if callable(batches) else self._own
    values, rngs = as_arrays(hyper), jnp.broadcast_to(rng, (size,))
    frozen, moving, parts = state.frozen, state.replace(frozen={}), []
    source = chunks(
      _together(batches), start, start + num_steps, lambda _: limit
    )
    for _, chunk in source:
      moving, metrics = program(moving, values, rngs, frozen, chunk)
      parts.append(metrics)
    joined = jax.tree.map(lambda *x: np.concatenate(x, 1), *parts)
    return moving.replace(frozen=frozen), joined

  def _chunk(self, moving, hyper, rng, frozen, batches):
    self.traces += 1
    watched = Watched(hyper)
    state, metrics = adapt(
      self.factory(watched),
      moving.replace(frozen=frozen),
      lambda i: jax.tree.map(lambda x: x[i], batches),
      rng,
      num_steps=jax.tree.leaves(batches)[0].shape[0],
    )
    watched.require_read()
    return state.replace(frozen={}), metrics


def validation(
  trials: Trials,
  loss_fn: LossFn,
  batches: Sequence[Batch],
  monitor: str = 'accuracy',
) -> Score:
  """Scores trials by a loss or one of its metrics, without dropout.

    sum_b w_b m_b / sum_b w_b   over the batches b, negated for '-m'

  Args:
    trials: whose learner runs the model, and in which way.
    loss_fn: its `Aux` reports the metric and the weight.
    batches: validation data, see `data.eval_batches`.
    monitor: a metric, higher is better, or '-loss' (see `fit`).

  Raises:
    UsageError: if there are no batches or no such metric.
  """
  if not batches:
    raise UsageError('no validation batches; give at least one')
  chosen = Monitor(monitor)

  def measure(moving, hyper, rng, frozen, batch):
    del rng
    state = moving.replace(frozen=frozen)
    with trials.factory(Watched(hyper)).using(state) as params:
      loss, aux = loss_fn(params, state.model_state, batch, None)
    return {'loss': loss, **aux.metrics}, aux.weight

  program = trials.way(measure, None)

  def score(state, hyper):
    size = num_trials(hyper)
    args = (state.replace(frozen={}), as_arrays(hyper), keys(range(size)))
    total, units = np.zeros(size), np.zeros(size)
    for batch in batches:
      metrics, weight = program(*args, state.frozen, dict(batch))
      weight = np.asarray(weight, np.float64)
      means = {name: np.asarray(x, np.float64) for name, x in metrics.items()}
      signed = np.array(
        [
          chosen.value({name: x[k] for name, x in means.items()})
          for k in range(size)
        ]
      )
      total, units = total + weight * signed, units + weight
    return total / units

  return score


def _together(batches: Batches) -> Callable[[int], Batch]:
  if callable(batches):
    return batches
  return lambda i: jax.tree.map(
    lambda *parts: np.stack(parts), *(dict(each(i)) for each in batches)
  )


def _check_keys(rng: Array, size: int) -> None:
  if not jnp.issubdtype(rng.dtype, jax.dtypes.prng_key):
    raise UsageError(
      f'rng is {rng.dtype}{list(rng.shape)}; give jax.random.key(seed) or '
      'search.keys(seeds)'
    )
  if rng.shape not in ((), (size,)):
    raise UsageError(
      f'{rng.shape[0]} keys for {size} trials; give one key, or one for each'
    )


def _check_run(state, hyper, batches, rng, num_steps) -> int:
  size = num_trials(hyper)
  _check_keys(rng, size)
  if state.step.shape != (size,):
    raise UsageError(
      f'hyper has {size} values and the state {list(state.step.shape)} '
      'trials; make it with `init` of the same hyper'
    )
  if not callable(batches) and len(batches) != size:
    raise UsageError(
      f'{len(batches)} functions of batches for {size} trials; give one for '
      'all, or one for each'
    )
  if num_steps < 1:
    raise UsageError(f'num_steps={num_steps}; give at least 1')
  return size
