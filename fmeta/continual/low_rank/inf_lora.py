"""InfLoRA: a task moves kernels where inputs of earlier tasks are not."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from fmeta import tree
from fmeta.adapters.lora import A
from fmeta.continual.inputs import (
  Real,
  check_dense,
  dense_inputs,
  empty_basis,
  grown,
  new_directions,
  real_rows,
  without,
)
from fmeta.continual.low_rank.fold import fold
from fmeta.errors import UsageError
from fmeta.types import Array, Learner, Scalar, TrainState


def inf_lora(
  learner: Learner,
  num_tasks: int,
  *,
  epsilon: Scalar = 0.95,
  real: Real = real_rows,
) -> Learner:
  """Interference-free low-rank adaptation.

  Before task t, with H its inputs of a layer y = x W, one column each, and M
  an orthonormal basis of what earlier inputs span,

    A <- the first `rank` left singular vectors of H - M M'H,

  and B alone moves, from zero, so that W moves by (alpha / rank) A B: within
  the task's own inputs and nowhere earlier ones are (Liang & Li 2024,
  https://arxiv.org/abs/2404.00228, whose B_t, A_t are our A, B). At its end
  the factors are folded into W (`fold`), and M grows by the task's inputs
  until it spans

    epsilon + (1 - epsilon) t / num_tasks,   t = 0 for the first task,

  of their sum of squares, as in `gpm`. Their DualGPM stores M or its
  complement, whichever is smaller; here M lies in a state of fixed size,
  4 in^2 bytes a kernel. Columns of A beyond what H adds to M are zero. The
  released code decomposes H H' in place of H and divides A by sqrt(3).

    tuning = adapters.lora_fa('body/.*/kernel', also=('head/.*',))
    learner = continual.inf_lora(
      finetune(loss, adamw_per_leaf(1e-3), tuning=tuning), num_tasks=10
    )
    stage = train.Stage(name, batches, steps, remember=some, prepare=some)

  Args:
    learner: tuned by `lora_fa`. Until a task has begun A is zero and the
      factors rest.
    num_tasks: of the threshold; of later tasks all inputs are spanned.
    epsilon: in [0, 1]; 0.95 is that of their cifar100_inflora.json. May be
      traced.
    real: `batch -> [B] or [B, L]`, which rows, or places in them, are inputs;
      rows of positive weight by default. Give texts their `attention_mask`.

  Raises:
    UsageError: for no task; at `init` as `fold`, without a frozen A or for one
      of what is no `nn.Dense`; where a task begins or ends without batches, or
      ends without having begun.
  """
  if num_tasks < 1:
    raise UsageError(f'inf_lora of num_tasks={num_tasks}; give at least 1')
  inner = fold(learner)

  def init(params, rng, model_state=None):
    state = inner.init(params, rng, model_state)
    kernels = _kernels(state)
    zero = jnp.zeros((), jnp.int32)
    held = {
      'basis': {name: empty_basis(leaf) for name, leaf in kernels.items()},
      'begun': zero,
      'ended': jnp.copy(zero),
    }
    return _closed(_at_rest(state), held)

  def inputs(state, forward, batches):
    return dense_inputs(
      forward,
      sorted(_kernels(state)),
      inner.params(state),
      state.model_state,
      batches,
      real,
    )

  def begin_task(state, forward, batches, rng):
    batches, held = _given(batches, 'prepare'), state.penalty_state
    state = inner.begin_task(_opened(state), forward, batches, rng)
    seen = inputs(state, forward, batches)
    factors = {
      name: _leading(held['basis'][name], seen[name], leaf.shape[-1])
      for name, leaf in _factors(state).items()
    }
    # Not one more: beginning twice is beginning.
    held = {**held, 'begun': held['ended'] + 1}
    return _closed(_with_factors(state, factors), held)

  def end_task(state, forward, batches, rng):
    batches, held = _given(batches, 'remember'), state.penalty_state
    _require_begun(held)
    state = inner.end_task(_opened(state), forward, batches, rng)
    seen = inputs(state, forward, batches)
    # Beyond `num_tasks` it is above 1: all of the inputs.
    energy = epsilon + (1 - epsilon) * held['ended'] / num_tasks
    basis = {
      name: grown(old, seen[name], energy)
      for name, old in held['basis'].items()
    }
    held = {**held, 'basis': basis, 'ended': held['ended'] + 1}
    return _closed(_at_rest(state), held)

  def step(state, batch, rng):
    moved, aux = inner.step(_opened(state), batch, rng)
    return _closed(moved, state.penalty_state), aux

  return Learner(
    init=init,
    step=step,
    params=lambda state: inner.params(_opened(state)),
    using=lambda state: inner.using(_opened(state)),
    end_task=end_task,
    gradient=lambda state, *given: inner.gradient(_opened(state), *given),
    begin_task=begin_task,
  )


def _opened(state: TrainState) -> TrainState:
  """As the learner inside knows it."""
  return state.replace(penalty_state=state.penalty_state['inner'])


def _closed(state: TrainState, held: dict[str, Any]) -> TrainState:
  """With the basis around what the learner's penalty remembers."""
  return state.replace(penalty_state={**held, 'inner': state.penalty_state})


def _factors(state: TrainState) -> dict[str, Array]:
  """Kernel -> A [in, rank]."""
  return {
    name.removesuffix(A): tree.get(state.frozen, name)
    for name in tree.names(state.frozen)
    if name.endswith(A)
  }


def _kernels(state: TrainState) -> dict[str, Array]:
  """Name -> kernel [in, out] of each A."""
  names = list(_factors(state))
  if not names:
    raise UsageError(
      'inf_lora chooses the frozen factors A of lora_fa, and there is none; '
      'give the learner tuning=lora_fa(...)'
    )
  kernels = {name: tree.get(state.frozen, name) for name in names}
  for name, leaf in kernels.items():
    check_dense(name, leaf)
  return kernels


def _with_factors(state: TrainState, factors: dict[str, Array]) -> TrainState:
  def value(name, leaf):
    new = factors.get(name.removesuffix(A)) if name.endswith(A) else None
    return leaf if new is None else new.astype(leaf.dtype)

  return state.replace(frozen=tree.map_with_name(value, state.frozen))


def _at_rest(state: TrainState) -> TrainState:
  """With factors A of zero: B has no gradient, and nothing can interfere."""
  zeros = {name: jnp.zeros_like(a) for name, a in _factors(state).items()}
  return _with_factors(state, zeros)


@functools.partial(jax.jit, static_argnums=2)
def _leading(basis: Array, inputs: Array, rank: int) -> Array:
  """[n, rank]: what inputs [N, n] lead to outside of the basis."""
  left, singular, real = new_directions(basis, inputs)
  # A vector of a value near rounding is not orthogonal to the basis but by
  # a factor of the two; from the root on, once more makes it so.
  root = jnp.finfo(basis.dtype).eps ** 0.5
  real &= singular > root * singular[0]
  columns = jnp.where(real, without(basis, left), 0)[:, :rank]
  return jnp.pad(columns, ((0, 0), (0, rank - columns.shape[1])))


def _given(batches: Any, where: str) -> list:
  batches = list(batches)
  if not batches:
    raise UsageError(
      'inf_lora looks at a task before its first step and after its last; '
      f'give its stage batches to `{where}`'
    )
  return batches


def _require_begun(held: dict[str, Any]) -> None:
  # A traced count cannot be asked; A is then zero, and the factors rested.
  if not isinstance(held['begun'], Tracer) and held['begun'] <= held['ended']:
    raise UsageError(
      f'task {int(held["ended"])} ends without having begun, so its factors '
      'have learned nothing; give its stage batches to `prepare`'
    )
