"""Three ways to run T trials: side by side, in turn, from the host.

They give the same numbers. Which is fastest depends on the model and the
device: side by side fills a device that one small model leaves idle, and
loses where a vmapped operation has a slow kernel. `compare` measures it.

A way turns `one(moving, hyper, rng, frozen, batches)`, a pure function of one
trial, into a function of T of them; `frozen` is shared, and `batches` are
shared (`axis=None`) or have a trial axis at `axis`.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fmeta.errors import UsageError
from fmeta.search.hyper import Factory, Hyper
from fmeta.types import Array, Learner, TrainState

One = Callable[..., Any]
Way = Callable[[One, int | None], Callable[..., Any]]


def vmapped(one: One, axis: int | None) -> Callable[..., Any]:
  """All trials side by side in one program."""
  return jax.jit(jax.vmap(one, (0, 0, 0, None, axis)))


def mapped(one: One, axis: int | None) -> Callable[..., Any]:
  """One trial after the other in one program (`jax.lax.map`)."""

  def shared(moving, hyper, rng, frozen, batches):
    return jax.lax.map(lambda x: one(*x, frozen, batches), (moving, hyper, rng))

  def own(moving, hyper, rng, frozen, batches):
    batches = jax.tree.map(lambda x: jnp.moveaxis(x, axis or 0, 0), batches)
    return jax.lax.map(
      lambda x: one(*x[:3], frozen, x[3]), (moving, hyper, rng, batches)
    )

  return jax.jit(shared if axis is None else own)


def looped(one: One, axis: int | None) -> Callable[..., Any]:
  """One trial after the other, each a call of the same program."""
  program = jax.jit(one)

  def run(moving, hyper, rng, frozen, batches):
    done = []
    for k in range(len(rng)):
      mine = jax.tree.map(lambda x, k=k: x[k], (moving, hyper, rng))
      own = batches
      if axis is not None:
        own = jax.tree.map(lambda x, k=k: x.take(k, axis), batches)
      done.append(program(*mine, frozen, own))
    return jax.tree.map(lambda *parts: jnp.stack(parts), *done)

  return run


class Comparison(NamedTuple):
  """What `compare` measured.

  Attributes:
    ways: in the order of `seconds`.
    seconds: [ways, repeats], without compilation.
  """

  ways: Sequence[Way]
  seconds: np.ndarray

  @property
  def fastest(self) -> Way:
    """The way with the smallest median."""
    return self.ways[int(np.median(self.seconds, 1).argmin())]

  def ratio(self, way: Way, to: Way) -> float:
    """Median over repeats of seconds(to) / seconds(way): how often faster."""
    of, than = self.ways.index(way), self.ways.index(to)
    return float(np.median(self.seconds[than] / self.seconds[of]))


def compare(
  learner: Learner | Factory,
  state: TrainState,
  hyper: Hyper,
  batches: Any,
  rng: Array,
  *,
  num_steps: int = 5,
  repeats: int = 5,
  ways: Sequence[Way] = (vmapped, mapped, looped),
) -> Comparison:
  """Times the ways on the trials themselves, interleaved.

  Every repeat runs each way once, starting with another one each time, so
  that a machine's drift meets all alike.

  Args:
    learner: as for `Trials`.
    state: stacked, from `Trials.init`; it stays valid.
    hyper: name -> [T].
    batches: as for `Trials.run`.
    rng: as for `Trials.run`.
    num_steps: steps per measurement, in one dispatch.
    repeats: measurements of each way (5: untuned).
    ways: what is compared.

  Raises:
    UsageError: if there is nothing to time.
  """
  from fmeta.search.trials import Trials

  if repeats < 1 or not ways:
    raise UsageError(
      f'{repeats} repeats of {len(ways)} ways; give at least one of each'
    )
  all_trials = [Trials(learner, way) for way in ways]

  def seconds_of(trials):
    began = time.perf_counter()
    done = trials.run(state, hyper, batches, rng, num_steps)
    jax.block_until_ready(done)
    return time.perf_counter() - began

  for trials in all_trials:
    seconds_of(trials)  # compiles
  seconds = np.zeros((len(ways), repeats))
  for repeat in range(repeats):
    for turn in range(len(ways)):
      index = (repeat + turn) % len(ways)
      seconds[index, repeat] = seconds_of(all_trials[index])
  return Comparison(tuple(ways), seconds)
