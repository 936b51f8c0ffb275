"""Several steps per call of the device, without changing any of them.

Consecutive batches of equal shapes are stacked and scanned by `adapt` inside
one jitted program. Moving leaves are donated; frozen ones are an argument of
their own, so they are neither copied nor carried.
"""

import dataclasses
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import closing
from types import MappingProxyType
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from fmeta.data import ROW, prefetch
from fmeta.learner import adapt
from fmeta.train.flops import product_flops
from fmeta.train.stages import Diverged
from fmeta.types import Array, Batch, Learner, Params, TrainState

Signature = tuple  # (tree structure, shapes and dtypes) of a batch


def signature(batch: Batch) -> Signature:
  """What decides whether two batches can share a program."""
  leaves, structure = jax.tree.flatten(batch)
  arrays = [np.asarray(leaf) for leaf in leaves]
  return structure, tuple((x.shape, x.dtype.str) for x in arrays)


def chunks(
  batches: Callable[[int], Batch],
  start: int,
  stop: int,
  limit: Callable[[int], int],
) -> Generator[tuple[int, Batch], None, None]:
  """Yields (n, n consecutive batches stacked [n, ...]), read ahead by Grain.

  Args:
    batches: `i -> batch`, pure.
    start: first index.
    stop: one past the last index.
    limit: `index -> n`, how many batches the chunk from `index` may hold; a
      change of shapes ends it earlier.
  """
  held, index = [], start
  # Closed by hand if the reader stops early: it has a thread.
  with closing(cast(Generator, prefetch(batches, start, stop))) as source:
    for batch in source:
      batch = jax.tree.map(np.asarray, dict(batch))
      if held and signature(batch) != signature(held[0]):
        yield len(held), _stack(held)
        index, held = index + len(held), []
      held.append(batch)
      if len(held) == limit(index):
        yield len(held), _stack(held)
        index, held = index + len(held), []
  if held:
    yield len(held), _stack(held)


def _stack(held: list[Batch]) -> Batch:
  if len(held) == 1:
    return jax.tree.map(lambda x: x[None], held[0])
  return jax.tree.map(lambda *xs: np.stack(xs), *held)


def _layout(leaf) -> tuple:
  return leaf.shape, leaf.dtype.name, getattr(leaf, 'sharding', None)


def filled(batch: Any, columns: Mapping[str, Array]) -> Any:
  """Every `row` [...] in a batch becomes those rows [..., ...] of the columns.

  What stands beside a `row`, such as the labels of an episode, stays.
  """
  if not columns or not isinstance(batch, Mapping):
    return batch
  if ROW not in batch:
    return {key: filled(value, columns) for key, value in batch.items()}
  taken = {name: column[batch[ROW]] for name, column in columns.items()}
  return {**taken, **{k: v for k, v in batch.items() if k != ROW}}


class Program:
  """Compiled chunks of `learner.step`, one per (length, batch shapes).

  Attributes:
    traces: how many chunks were traced and compiled.
    compile_seconds: host time spent doing so.
    flops_per_step: XLA's count for one step, plus the matrix products and
      convolutions in the repetitions of its loops (MAML's inner steps), whose
      body XLA counts once. None before the first chunk.
    peak_bytes: arguments, outputs and temporaries of the largest chunk.
  """

  # What `Resident` keeps on the device.
  resident: Mapping[str, Array] = MappingProxyType({})

  def __init__(self, learner: Learner):
    self.traces = 0
    self.compile_seconds = 0.0
    self.flops_per_step: float | None = None
    self.peak_bytes: int | None = None
    self.learner = learner
    self._compiled: dict[Signature, Callable[..., Any]] = {}

  def __call__(
    self, moving: TrainState, frozen: Params, batches: Batch, rng: Array
  ) -> tuple[TrainState, dict[str, Array]]:
    """Steps through the stacked batches.

    Args:
      moving: the state without its frozen leaves; donated.
      frozen: the frozen leaves.
      batches: stacked [steps, ...] arrays.
      rng: root key.

    Returns:
      The new moving state and the metrics [steps] of each step.
    """
    # As host data the key belongs to no device, so any mesh of any number of
    # processes may read it.
    impl = jax.random.key_impl(rng)
    data = np.asarray(jax.random.key_data(rng))
    args = moving, frozen, batches, data, dict(self.resident)
    leaves, structure = jax.tree.flatten(args)
    key = structure, impl, tuple(map(_layout, leaves))
    if key not in self._compiled:
      self._compiled[key] = self._compile(impl, *args)
    return self._compiled[key](*args)

  def _compile(self, impl, moving, frozen, batches, key, resident):
    began = time.perf_counter()
    num_steps = jax.tree.leaves(batches)[0].shape[0]

    def run(moving, frozen, batches, key, resident):
      self.traces += 1
      state, metrics = self._steps(
        dataclasses.replace(moving, frozen=frozen),
        lambda i: filled(jax.tree.map(lambda x: x[i], batches), resident),
        jax.random.wrap_key_data(key, impl=impl),
        num_steps,
      )
      return dataclasses.replace(state, frozen={}), metrics

    # The next call must find the state where this one found it.
    where = jax.tree.map(lambda x: x.sharding, moving)
    # Metrics are scalars per step, replicated like the step's number.
    jitted = jax.jit(run, donate_argnums=0, out_shardings=(where, where.step))
    traced = jitted.trace(moving, frozen, batches, key, resident)
    compiled = traced.lower().compile()
    self._measure(compiled, traced.jaxpr, num_steps)
    self.compile_seconds += time.perf_counter() - began
    return compiled

  def _steps(self, state, batches, rng, num_steps):
    return adapt(self.learner, state, batches, rng, num_steps=num_steps)

  def _flops(self, counted: float, jaxpr: Any, num_steps: int) -> float:
    """FLOPs of a step; XLA counted each loop once, that over steps too."""
    whole = product_flops(jaxpr, repeat=True) / num_steps
    return counted + whole - product_flops(jaxpr, repeat=False)

  def _measure(self, compiled, jaxpr: Any, num_steps: int) -> None:
    costs = compiled.cost_analysis() or {}
    if self.flops_per_step is None and 'flops' in costs:
      self.flops_per_step = self._flops(costs['flops'], jaxpr, num_steps)
    memory = compiled.memory_analysis()
    if memory is not None:
      peak = (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        + memory.temp_size_in_bytes
        - memory.alias_size_in_bytes
      )
      self.peak_bytes = max(peak, self.peak_bytes or 0)


class Unrolled(Program):
  """A `Program` whose steps follow each other without a loop around them.

  For models that XLA compiles badly inside one: a step of ResNet-20 on CPU
  takes 0.26 s of CPU time here and 3.8 s in a dispatch of one step of
  `Program`, although that loop is gone from its final code (jax 0.10.2,
  2026-11-24). Compile time grows with the steps of a dispatch, and results may
  depend on their number in the last digits.
  """

  def _steps(self, state, batches, rng, num_steps):
    history = []
    for i in range(num_steps):
      state, aux = self.learner.step(state, batches(i), rng)
      history.append(dict(aux.metrics))
    return state, jax.tree.map(lambda *xs: jnp.stack(xs), *history)

  def _flops(self, counted: float, jaxpr: Any, num_steps: int) -> float:
    whole = product_flops(jaxpr, repeat=True)
    return (counted + whole - product_flops(jaxpr, repeat=False)) / num_steps


def own(leaves: Any) -> Any:
  """A copy: `fit` donates it, and a buffer can be donated only once."""
  return jax.tree.map(lambda x: jnp.array(x, copy=True), strong(leaves))


def strong(leaves: Any) -> Any:
  """Strongly typed arrays, as every step returns them."""
  return jax.tree.map(
    lambda x: jax.lax.convert_element_type(x, jnp.asarray(x).dtype), leaves
  )


def require_finite(
  first: int, fetched: Mapping[str, np.ndarray], last_good: Callable[[], str]
) -> None:
  """Refuses metrics of the steps after `first` that are not finite.

  Raises:
    Diverged: naming the step, and where to continue from.
  """
  bad = [
    # The earliest, and one of several seeds before their mean.
    (int(np.isfinite(column).argmin()), '/' not in name, name)
    for name, column in fetched.items()
    if name.split('/')[-1] in ('loss', 'update_norm')
    and not np.isfinite(column).all()
  ]
  if bad:
    index, _, name = min(bad)
    raise Diverged(
      f'{name} is {fetched[name][index]} at step {first + index + 1}; '
      f'{last_good()}; lower the learning rate or clip gradients'
    )
