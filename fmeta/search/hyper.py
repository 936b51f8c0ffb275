"""Hyper-parameters of trials: named arrays with a leading trial axis.

A `Factory` is a function `hyper -> Learner` that reads its values by name.
They are traced, so whatever the learner is made of (rate, decay, layer
multipliers, a penalty's strength) can differ between trials of one program;
what is trainable cannot, as it decides the structure.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fmeta import draw
from fmeta.errors import UsageError, suggest
from fmeta.types import Learner, TrainState

Hyper = Mapping[str, Any]  # name -> values [T, ...]; of one trial: [...]
Factory = Callable[[Hyper], Learner]

# Streams of `draw.random_words`, apart from those that data are drawn from.
SAMPLE, EXPLORE = 101, 102


def num_trials(hyper: Hyper) -> int:
  """T, the common length of all hyper-parameters.

  Raises:
    UsageError: if there are none, or they differ in length.
  """
  if not hyper:
    raise UsageError(
      'no hyper-parameters to search; give at least one array of T values, '
      "for example {'rate': [1e-4, 1e-3]}"
    )
  shapes = {name: np.shape(values) for name, values in hyper.items()}
  scalars = [name for name, shape in shapes.items() if not shape]
  if scalars:
    raise UsageError(
      f'hyper-parameter {scalars[0]!r} is one number; give an array of T '
      'values, one for each trial'
    )
  lengths = {name: shape[0] for name, shape in shapes.items()}
  if len(set(lengths.values())) > 1 or 0 in lengths.values():
    raise UsageError(
      f'hyper-parameters have {lengths} values; give T >= 1 values of each'
    )
  return next(iter(lengths.values()))


def as_arrays(hyper: Hyper) -> dict[str, jax.Array]:
  """The values on the device, after `num_trials` has accepted them."""
  num_trials(hyper)
  return {name: jnp.asarray(values) for name, values in hyper.items()}


def grid(**values: Sequence[float]) -> dict[str, np.ndarray]:
  """Every combination; the last name varies fastest.

  Args:
    **values: name -> the values to try.

  Raises:
    UsageError: if there is no name, or a name has no values.
  """
  empty = [name for name, tried in values.items() if not len(tried)]
  if empty or not values:
    what = f'{empty[0]!r} has no values' if empty else 'no names were given'
    raise UsageError(f'an empty grid: {what}; give at least one value of each')
  rows = np.array(list(itertools.product(*values.values())), np.float32)
  return {name: rows[:, k] for k, name in enumerate(values)}


def log_uniform(
  seed: int, size: int, **ranges: tuple[float, float]
) -> dict[str, np.ndarray]:
  """Random search: exp of uniform draws between log(low) and log(high).

  A pure function of (seed, position of the name): a larger `size` keeps the
  first trials (Bergstra & Bengio 2012,
  https://jmlr.org/papers/v13/bergstra12a.html, for random over grid).

  Args:
    seed: of the draws.
    size: number of trials T.
    **ranges: name -> (low, high), 0 < low <= high.

  Returns:
    name -> float32 [T].

  Raises:
    UsageError: for no names, no trials or an impossible range.
  """
  if not ranges or size < 1:
    raise UsageError(
      f'{size} trials of {len(ranges)} ranges; give at least one of each'
    )
  out = {}
  for index, (name, (low, high)) in enumerate(ranges.items()):
    if not 0 < low <= high:
      raise UsageError(
        f'range ({low}, {high}) of {name!r}; give 0 < low <= high'
      )
    words = draw.random_words(seed, SAMPLE, index << 128, size)
    share = (words >> np.uint64(11)) * 2.0**-53
    values = np.exp(np.log(low) + share * np.log(high / low))
    out[name] = values.astype(np.float32)
  return out


def as_factory(learner: Learner | Factory) -> Factory:
  """A learner's own hyper-parameters, or the function that was given."""
  return injected(learner) if isinstance(learner, Learner) else learner


def injected(learner: Learner) -> Factory:
  """The learner as a function of the values in its optimiser's state.

  Its optimiser is `optax.inject_hyperparams(factory)(rate=..., ...)`; every
  step runs with the trial's values in those places.

  Raises:
    UsageError: when used with a name that the state does not have.
  """

  def factory(hyper):
    def init(params, rng, model_state=None):
      return _placed(learner.init(params, rng, model_state), hyper)

    def step(state, batch, rng):
      return learner.step(_placed(state, hyper), batch, rng)

    return learner._replace(init=init, step=step)

  return factory


def _placed(state: TrainState, hyper: Hyper) -> TrainState:
  held = {}
  for _, found in optax.tree.get_all_with_path(state.opt_state, 'hyperparams'):
    held.update(found)
  for name in hyper:
    if name not in held:
      raise UsageError(
        f'the optimiser holds no hyper-parameter {name!r}'
        f'{suggest(name, held)}; put it there with optax.inject_hyperparams'
      )
  # In the dtype it has there: a step must not change the state's types.
  values = {
    name: jnp.asarray(value, held[name].dtype) for name, value in hyper.items()
  }
  return state.replace(opt_state=optax.tree.set(state.opt_state, **values))


class Watched(Mapping[str, Any]):
  """One trial's hyper-parameters, which know whether they were read.

  A name that nothing reads would be a search over nothing.
  """

  def __init__(self, values: Hyper):
    self._values = dict(values)
    self._unread = set(values)

  def __getitem__(self, name: str) -> Any:
    """The value.

    Raises:
      UsageError: if the trials do not set it.
    """
    if name not in self._values:
      raise UsageError(
        f'the learner reads hyper-parameter {name!r}, which the trials do '
        f'not set{suggest(name, self._values)}'
      )
    self._unread.discard(name)
    return self._values[name]

  def __contains__(self, name: object) -> bool:
    return name in self._values

  def __iter__(self) -> Iterator[str]:
    return iter(self._values)

  def __len__(self) -> int:
    return len(self._values)

  def require_read(self) -> None:
    """Refuses names that were set and never read.

    Raises:
      UsageError: naming the first.
    """
    if self._unread:
      read = sorted(set(self._values) - self._unread)
      raise UsageError(
        f'nothing in the learner reads hyper-parameter '
        f'{min(self._unread)!r}; it reads {read}: rename it or leave it out'
      )
