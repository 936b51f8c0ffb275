"""Several seeds, or orders of the tasks, as one learner with a leading axis.

  single = finetune(loss, adam(1e-3), penalty=ewc(100.0))
  learner = over_seeds(single, 5)
  roots = jax.vmap(jax.random.key)(jnp.arange(5))
  state = learner.init(jax.vmap(start)(roots), roots)
  batches = abreast([data.batches(columns, 16, seed) for seed in range(5)])
  fitted = fit(learner, state, [Stage('task', batches, 500)], roots)
  fourth = one_seed(fitted.state, 3)

Seed k goes through what a run of its own with the same key and batches goes
through, to rounding: a product of stacked matrices may be another kernel.
Whether it is faster is a matter of size (`experiments/benchmarks/seeds.py`). On
two CPU cores 64-32-10 with batches of 16 gained 1.7x, and with EWC 1.9x, but
nothing with replay; networks of split digits' and of split MNIST's size tied
or lost (2026-11-26, BUILD.md). Run those one after the other, as the
experiments do.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fmeta import tree
from fmeta.errors import UsageError
from fmeta.types import Aux, Batch, Learner, TrainState


def over_seeds(
  learner: Learner,
  number: int,
  *,
  shared: Sequence[str] = (),
  batch_axis: int | None = 0,
) -> Learner:
  """A learner of `number` runs side by side, each as `learner` takes it.

  What changes during a run has a leading axis of seeds: the trainable leaves,
  the state of the optimiser, of the model and of the penalty, the memory. The
  number of steps is common, and so is a frozen leaf that `shared` names; it
  is not copied, neither in the state nor in a step. `params` of the state are
  stacked, shared leaves with them.

  The methods take what the learner's take, stacked [number, ...]:

  - `init`: parameters but for the shared ones, a root key of each seed, and
    the model state.
  - `step` and `gradient`: the batch and the root keys. Metrics are means over
    seeds, so that one diverged seed stops a run; `seed_<k>/loss` is seed k's.
    Outputs are stacked, the weight is the sum.
  - `begin_task` and `end_task`: batches and keys; `forward` as for one.

  `fmeta.train.fit` takes it with the keys [number] as `rng`. Its `after_stage`
  and `evaluate` then get stacked parameters and model state; patience and the
  best evaluation are those of the seeds together. A row of the matrix is flat:
  give seed 0's accuracies, then seed 1's; `matrices` takes them apart.

  Args:
    learner: of one seed, with its memory, if any, inside.
    number: seeds.
    shared: patterns of the parameters that all seeds start from; `init` takes
      these without the axis. They get it where they are trainable.
    batch_axis: 0, each seed has rows of its own; None, all see the same.

  Raises:
    UsageError: if there is no seed, `batch_axis` is neither, what is stacked
      has another length, a pattern matches nothing, or what seeds are to share
      differs between them.
  """
  _check(number, batch_axis)

  def axes(frozen):
    fixed = tree.map_with_name(lambda n, _: _axis(n, shared), frozen)
    return TrainState(None, 0, fixed, 0, 0, 0, 0, 0)  # pyright: ignore

  def mapped(fun, state, *args, where=()):
    return jax.vmap(fun, (axes(state.frozen), *where))(state, *args)

  def init(params, rng, model_state=None):
    tree.check_patterns(shared, tree.names(params))
    own = tree.map_with_name(lambda n, _: _axis(n, shared), params)
    _check_stacked(number, (params, rng, model_state), (own, 0, 0))
    first = _first((params, rng, model_state), (own, 0, 0))
    made = jax.eval_shape(learner.init, *first)
    start = jax.vmap(learner.init, (own, 0, 0), axes(made.frozen))
    return _alike(start, shared, params, rng, model_state)

  def step(state, batch, rng):
    _check_stacked(number, (batch, rng), (batch_axis, 0))
    fixed = axes(state.frozen)
    state, aux = jax.vmap(learner.step, (fixed, batch_axis, 0), (fixed, 0))(
      state, batch, rng
    )
    return state, _summary(aux, number)

  def params(state):
    return mapped(learner.params, state)

  def between(act):
    def acted(state, forward, batches, rng):
      _check_stacked(number, (list(batches), rng), (batch_axis, 0))
      fixed = axes(state.frozen)
      each = jax.vmap(
        lambda state, batches, rng: act(state, forward, batches, rng),
        (fixed, batch_axis, 0),
        fixed,
      )
      return _alike(each, shared, state, list(batches), rng)

    return acted

  def gradient(state, batch, rng):
    return mapped(learner.gradient, state, batch, rng, where=(batch_axis, 0))

  return Learner(
    init=init,
    step=step,
    params=params,
    # Merged: adapters enter the activations of one model, not of several.
    using=lambda state: nullcontext(params(state)),
    end_task=between(learner.end_task),
    gradient=gradient,
    begin_task=between(learner.begin_task),
  )


def one_seed(
  state: TrainState, seed: int, shared: Sequence[str] = ()
) -> TrainState:
  """Seed number `seed` of a stacked state, as its own learner holds it.

  Args:
    state: of an `over_seeds` learner.
    seed: 0 <= seed < number.
    shared: as given to `over_seeds`; such frozen leaves are not copied.
  """

  def taken(name, leaf):
    return leaf if _axis(name, shared) is None else leaf[seed]

  frozen = tree.map_with_name(taken, state.frozen)
  moving = state.replace(step=(), frozen={})
  moving = jax.tree.map(lambda x: x[seed], moving)
  return moving.replace(step=state.step, frozen=frozen)


def abreast(
  batches: Sequence[Callable[[int], Batch]],
) -> Callable[[int], Batch]:
  """`i -> batch` of batch i of every seed, stacked [number, ...].

  Args:
    batches: a function of each seed; an order of tasks or rows is theirs. All
      give the same shapes.
  """

  def stacked(i):
    parts = [dict(each(i)) for each in batches]
    return jax.tree.map(lambda *xs: np.stack(xs), *parts)

  return stacked


def matrices(
  rows: Sequence[Sequence[float]], number: int
) -> list[list[list[float]]]:
  """The matrix of each seed from one with flat rows, seed after seed.

  Raises:
    UsageError: if a row has no equal share for each seed.
  """
  for index, row in enumerate(rows):
    if len(row) % number:
      raise UsageError(
        f'row {index} has {len(row)} accuracies for {number} seeds; give as '
        'many of each seed, seed after seed'
      )
  parts = [np.reshape(row, (number, -1)).tolist() for row in rows]
  return [[part[seed] for part in parts] for seed in range(number)]


def _alike(fun: Callable, shared: Sequence[str], *args: Any) -> TrainState:
  """`fun(*args)` of seeds that share frozen leaves, and go on sharing them."""
  try:
    return fun(*args)
  except ValueError as error:
    if 'out_axes' not in str(error):
      raise
    raise UsageError(
      f'a frozen leaf that {list(shared)} names differs between seeds; take it '
      'out of `shared` and give `init` one of each seed'
    ) from error


def _axis(name: str, shared: Sequence[str]) -> int | None:
  patterns = [(pattern, None) for pattern in shared]
  return 0 if tree.first_match(name, patterns) is None else None


def _summary(aux: Aux, number: int) -> Aux:
  """Means over seeds, and the loss of each."""
  metrics = {name: value.mean(0) for name, value in aux.metrics.items()}
  each = aux.metrics['loss']
  metrics |= {f'seed_{k}/loss': each[k] for k in range(number)}
  return aux._replace(metrics=metrics, weight=aux.weight.sum(0))


def _first(args: Any, axes: Any) -> Any:
  """The first seed's arguments."""
  return _with_axes(
    lambda axis, leaf: leaf if axis is None else leaf[0], axes, args
  )


def _with_axes(fun: Callable, axes: Any, args: Any) -> Any:
  return jax.tree.map(
    lambda axis, part: jax.tree.map(lambda leaf: fun(axis, leaf), part),
    axes,
    args,
    is_leaf=lambda x: x is None,
  )


def _check(number: int, batch_axis: int | None) -> None:
  if number < 1:
    raise UsageError(f'over_seeds of {number} seeds; give at least 1')
  if batch_axis not in (0, None):
    raise UsageError(
      f'batch_axis={batch_axis!r}; give 0, a batch of each seed, or None, one '
      'batch for all'
    )


def _check_stacked(number: int, args: Any, axes: Any) -> None:
  def check(axis, leaf):
    if axis == 0 and jnp.shape(leaf)[:1] != (number,):
      raise UsageError(
        f'an array {list(jnp.shape(leaf))} for {number} seeds; stack '
        f'parameters, keys and batches [{number}, ...], and name parameters '
        'that all seeds start from in `shared`'
      )

  _with_axes(check, axes, args)
