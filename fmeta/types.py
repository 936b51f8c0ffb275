"""The shapes everything else is made of.

A model is a `Forward`, an objective is a `LossFn`, and what changes about a
fine-tuning run is one of three values handed to the step: a `Tuning` (what
moves), a `Penalty` (what parameters remember) and a `Memory` (what data
remember). All are NamedTuples of pure functions; nothing keeps state on
`self`, so every one of them can be jitted, scanned, vmapped and
differentiated.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import flax.struct
import jax

Array = jax.Array
ArrayTree = Any
Params = Any  # nested dict of arrays, as flax.linen gives it
ModelState = Any  # batch statistics and the like; {} when there are none
Batch = Mapping[str, Any]
Scalar = Array | float

# (params, model_state, batch, rng) -> (outputs, model_state). `rng=None` means
# evaluation: no dropout, running statistics, model_state returned unchanged.
Forward = Callable[
  [Params, ModelState, Batch, Array | None], tuple[Any, ModelState]
]


class Aux(NamedTuple):
  """What a loss reports beside its value.

  Attributes:
    model_state: the model's new non-parameter state.
    metrics: name -> scalar, each a mean over the same `weight` units.
    weight: how many units (examples or tokens) the loss is a mean over.
    outputs: the model's outputs, one row per example.
  """

  model_state: ModelState
  metrics: Mapping[str, Array]
  weight: Array
  outputs: Any = None


# (params, model_state, batch, rng) -> (scalar, Aux); the scalar is a mean
# over `Aux.weight` units.
LossFn = Callable[[Params, ModelState, Batch, Array | None], tuple[Array, Aux]]

# Same contract as `jax.value_and_grad(fun, has_aux=True)` for the objective
# `fun(trainable, frozen, model_state, batch, rng) -> (scalar, Aux)`.
ValueAndGrad = Callable[..., Callable[..., tuple[tuple[Array, Aux], Params]]]


class Tuning(NamedTuple):
  """What moves.

  Attributes:
    init: `(params, rng) -> (trainable, frozen)`; both are nested dicts with
      the names of the full parameters. It may add leaves (LoRA factors).
    merge: `(trainable, frozen) -> params`, the model as a `Forward` takes
      it; leaves that no parameter of the base can express (a prompt) stay.
    keep: `(old, new, trainable, frozen) -> model_state`: statistics move only
      under a trainable module.
    intercept: `(trainable, frozen) -> context manager` that yields the
      parameters to run the model with. By default `merge`'s; an adapter
      yields the base parameters and enters its activations instead.
  """

  init: Callable[[Params, Array], tuple[Params, Params]]
  merge: Callable[[Params, Params], Params]
  keep: Callable[[ModelState, ModelState, Params, Params], ModelState]
  intercept: Callable[[Params, Params], AbstractContextManager[Params]]


@contextmanager
def merged(
  merge: Callable[[Params, Params], Params], trainable: Params, frozen: Params
) -> Iterator[Params]:
  """The default `Tuning.intercept`: run the model on the merged parameters."""
  yield merge(trainable, frozen)


class Penalty(NamedTuple):
  """What the parameters remember.

  Its gradient is added to the data gradient after any accumulation.

  Attributes:
    init: `(trainable, params) -> state`.
    value: `(trainable, params, state, batch, rng) -> scalar`; `params` are
      the merged parameters.
    direct: `(grads, state) -> grads`, a projection of the total gradient.
    observe: `(state, trainable, data_grads, updates) -> state`, each step.
    consolidate: `(state, trainable, params, model_state, forward, batches,
      rng) -> state`, at a task's end, in evaluation mode.
  """

  init: Callable[[Params, Params], Any]
  value: Callable[[Params, Params, Any, Batch, Array | None], Array]
  direct: Callable[[Params, Any], Params]
  observe: Callable[[Any, Params, Params, Params], Any]
  consolidate: Callable[..., Any]


class Memory(NamedTuple):
  """What the data remember: a fixed-size pytree inside the train state.

  Attributes:
    init: `() -> memory`.
    insert: `(memory, rows, weight, rng) -> memory`; rows with zero weight are
      not inserted.
    sample: `(memory, size, rng) -> (rows, valid)`; `valid` is 0 where the
      memory is still empty.
    end_task: `memory -> memory`, at a task's end; nothing by default, and a
      task-free memory leaves it so.
  """

  init: Callable[[], Any]
  insert: Callable[[Any, Batch, Array, Array], Any]
  sample: Callable[[Any, int, Array], tuple[Batch, Array]]
  end_task: Callable[[Any], Any] = lambda memory: memory


class TrainState(flax.struct.PyTreeNode):
  """All that the next step needs.

  `dormant` alone waits for a later phase: what the penalty knows of leaves
  that are frozen now, by name (see `fmeta.retune`).
  """

  step: Array
  trainable: Params
  frozen: Params
  opt_state: Any
  model_state: ModelState
  penalty_state: Any
  memory: Any
  dormant: Any = flax.struct.field(default_factory=dict)


class Learner(NamedTuple):
  """A model being fine-tuned, as four pure functions.

  Attributes:
    init: `(params, rng, model_state=None) -> TrainState`.
    step: `(state, batch, rng) -> (state, Aux)`. `rng` is a root key that
      never changes; the step folds `state.step` into it. `Aux.metrics` gains
      `grad_norm` and `update_norm`.
    params: `state -> params`, merged.
    using: `state -> context manager` that yields the parameters to run a
      model with: adapters enter the activations instead of being merged.
    end_task: `(state, forward, batches, rng) -> state`: lets the penalty
      consolidate what the finished task has taught.
    gradient: `(state, batch, rng) -> grads`, of the data and the penalty, as
      the same step hands it to the optimiser.
    begin_task: `(state, forward, batches, rng) -> state`: looks at a task
      before its first step; nothing by default.
  """

  init: Callable[..., TrainState]
  step: Callable[[TrainState, Batch, Array], tuple[TrainState, Aux]]
  params: Callable[[TrainState], Params]
  using: Callable[[TrainState], AbstractContextManager[Params]]
  end_task: Callable[..., TrainState]
  gradient: Callable[[TrainState, Batch, Array], Params]
  begin_task: Callable[..., TrainState] = lambda state, *given: state
