"""The one update rule.

`finetune` builds it, `adapt` scans it, `rehearse` feeds it from a memory.
Plain training jits `Learner.step`, the inner loop of MAML scans it under a
gradient, and a continual stream repeats it: nothing else in fmeta updates
parameters.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fmeta import through as ways
from fmeta.errors import UsageError
from fmeta.gradients import plain
from fmeta.memory import append
from fmeta.memory.ranked import check_rehearsed
from fmeta.optim.guard import guard
from fmeta.penalty import no_penalty, require_penalty
from fmeta.tuning import full
from fmeta.types import (
  Array,
  Aux,
  Batch,
  Learner,
  LossFn,
  Memory,
  Penalty,
  TrainState,
  Tuning,
  ValueAndGrad,
)

# Streams of randomness within one step; folded into the step's key.
LOSS, PENALTY, SAMPLE = range(3)
# Folded into the root key, hence a number that no step has.
INSERT = 2**32 - 1


def finetune(
  loss_fn: LossFn,
  optimizer: optax.GradientTransformation,
  *,
  tuning: Tuning | None = None,
  penalty: Penalty | None = None,
  value_and_grad: ValueAndGrad = plain,
) -> Learner:
  """A learner that moves parameters against a loss.

  One step computes, for trainable leaves t and frozen leaves f,

    g = grad_t loss(merge(t, f)) + grad_t penalty(t),
    t <- t + optimizer(direct(g), t).

  Args:
    loss_fn: `(params, model_state, batch, rng) -> (scalar, Aux)`.
    optimizer: an optax transformation; it sees trainable leaves only, and
      the arguments `value` (the loss), `obj_fn` (the loss as a function of the
      trainable leaves) and `model_state` (as the batch leaves it) if it takes
      them. Where the step itself is
      differentiated, one without a derivative is refused.
    tuning: what moves; everything by default.
    penalty: what the parameters remember; nothing by default.
    value_and_grad: how the loss is differentiated, see `fmeta.gradients`.

  Raises:
    UsageError: for a penalty that is none, such as a list of them.
  """
  tuning = full() if tuning is None else tuning
  penalty = require_penalty(no_penalty() if penalty is None else penalty)
  optimizer = optax.with_extra_args_support(optimizer)
  guarded = guard(optimizer)

  def objective(trainable, frozen, model_state, batch, rng):
    with tuning.intercept(trainable, frozen) as params:
      return loss_fn(params, model_state, batch, rng)

  def penalty_value(trainable, state, batch, rng):
    params = tuning.merge(trainable, state.frozen)
    return penalty.value(trainable, params, state.penalty_state, batch, rng)

  def init(params, rng, model_state=None):
    trainable, frozen = tuning.init(params, rng)
    params = tuning.merge(trainable, frozen)
    return TrainState(
      step=jnp.zeros((), jnp.int32),
      trainable=trainable,
      frozen=frozen,
      # Copied: some keep the start, and a buffer cannot be donated twice.
      opt_state=jax.tree.map(jnp.copy, optimizer.init(trainable)),
      model_state={} if model_state is None else model_state,
      penalty_state=penalty.init(trainable, params),
      memory={},
    )

  def inputs(state, batch, rng):
    rng = jax.random.fold_in(rng, state.step)
    key = jax.random.fold_in(rng, LOSS)
    given = state.frozen, state.model_state, batch, key
    return given, (state, batch, jax.random.fold_in(rng, PENALTY))

  def slopes(state, given, remembered):
    data = value_and_grad(objective)(state.trainable, *given)
    held = jax.value_and_grad(penalty_value)(state.trainable, *remembered)
    grads = jax.tree.map(jnp.add, data[1], held[1])
    return data, held[0], penalty.direct(grads, state.penalty_state)

  def step(state, batch, rng):
    given, remembered = inputs(state, batch, rng)
    data, penalty_loss, grads = slopes(state, given, remembered)
    (loss, aux), data_grads = data

    def total(trainable):  # for optimisers that need curvature
      data = objective(trainable, *given)[0]
      return data + penalty_value(trainable, *remembered)

    updates, opt_state = optimizer.update(
      guarded(grads),
      state.opt_state,
      state.trainable,
      value=loss + penalty_loss,
      obj_fn=total,
      model_state=aux.model_state,
    )
    metrics = {
      'loss': loss,
      **aux.metrics,
      'penalty': penalty_loss,
      'grad_norm': optax.tree.norm(grads),
      'update_norm': optax.tree.norm(updates),
    }
    state = state.replace(
      step=state.step + 1,
      trainable=optax.apply_updates(state.trainable, updates),
      opt_state=opt_state,
      model_state=tuning.keep(
        state.model_state, aux.model_state, state.trainable, state.frozen
      ),
      penalty_state=penalty.observe(
        state.penalty_state, state.trainable, data_grads, updates
      ),
    )
    return state, aux._replace(metrics=metrics)

  def end_task(state, forward, batches, rng):
    return state.replace(
      penalty_state=penalty.consolidate(
        state.penalty_state,
        state.trainable,
        tuning.merge(state.trainable, state.frozen),
        state.model_state,
        forward,
        batches,
        rng,
      )
    )

  return Learner(
    init=init,
    step=step,
    params=lambda state: tuning.merge(state.trainable, state.frozen),
    using=lambda state: tuning.intercept(state.trainable, state.frozen),
    end_task=end_task,
    gradient=lambda state, *given: slopes(state, *inputs(state, *given))[2],
  )


def rehearse(
  learner: Learner,
  memory: Memory,
  size: int,
  *,
  mix: Callable[[Batch, Batch, Array], Batch] = append,
) -> Learner:
  """The same learner, fed from a memory as well.

  Each step samples `size` rows, mixes them into the batch, takes the
  learner's step and then inserts the batch's own rows with their outputs
  (Chaudhry et al. 2019, https://arxiv.org/abs/1902.10486, algorithm 1), none
  of them if the loss is NaN.

  Args:
    learner: any learner.
    memory: for example `reservoir(...)`; it lives in `TrainState.memory`.
    size: remembered rows per step.
    mix: `(batch, rows, valid) -> batch`; `append` for any loss, `beside` for
      one that reads `memory_*` keys: another would never see those rows.

  Raises:
    UsageError: for a size below 1, or a memory that is none.
  """
  check_rehearsed(memory, size)

  def init(params, rng, model_state=None):
    state = learner.init(params, rng, model_state)
    return state.replace(memory=memory.init())

  def mixed(state, batch, rng):
    key = jax.random.fold_in(rng, state.step)
    rows, valid = memory.sample(
      state.memory, size, jax.random.fold_in(key, SAMPLE)
    )
    return mix(batch, rows, valid)

  def step(state, batch, rng):
    count = jax.tree.leaves(batch)[0].shape[0]
    held = state.memory
    state, aux = learner.step(state, mixed(state, batch, rng), rng)
    own = jax.tree.map(lambda x: x[:count], aux.outputs)
    weight = batch.get('weight', jnp.ones(count, jnp.float32))
    # A NaN's rows are not kept. Asking the loss also puts the insertion after
    # the reading, or XLA copies the whole memory at every step (2026-11-26).
    weight = jnp.where(jnp.isnan(aux.metrics['loss']), 0, weight)
    # The root key: a row's fate depends on how many came before, not on how
    # they were cut into batches.
    held = memory.insert(
      held,
      {**batch, 'outputs': own},
      weight,
      jax.random.fold_in(rng, INSERT),
    )
    return state.replace(memory=held), aux._replace(outputs=own)

  def gradient(state, batch, rng):
    return learner.gradient(state, mixed(state, batch, rng), rng)

  def end_task(state, forward, batches, rng):
    state = learner.end_task(state, forward, batches, rng)
    return state.replace(memory=memory.end_task(state.memory))

  return learner._replace(
    init=init, step=step, gradient=gradient, end_task=end_task
  )


def adapt(
  learner: Learner,
  state: TrainState,
  batches: Callable[[Array], Batch],
  rng: Array,
  *,
  num_steps: int,
  every: Callable[[TrainState, Aux], Any] = lambda state, aux: aux.metrics,
  through: ways.Through = ways.plain,
) -> tuple[TrainState, Any]:
  """Scans `learner.step`: the inner loop, or a chunk of plain training.

  Args:
    learner: any learner.
    state: where to start.
    batches: `i -> batch` for the i-th step from here; a constant function
      for a support set, an indexing one for minibatches or a stream.
    rng: root key, as for `learner.step`.
    num_steps: static number of steps.
    every: what to record after each step; metrics by default.
    through: how a derivative passes through the loop, one of
      `fmeta.through`; it changes memory and time, and what a derivative is
      only for those that say so.

  Returns:
    The last state, and what `every` gave, stacked [num_steps, ...].

  Raises:
    UsageError: if `num_steps` counts nothing or `through` is no `Through`.
  """
  if not isinstance(num_steps, int | np.integer) or num_steps < 0:
    raise UsageError(
      f'num_steps {num_steps!r} is no number of steps; give 0, 1, 2, ...'
    )
  frozen = state.frozen  # constant: kept out of the scan's carry

  def body(carry, index):
    state, aux = learner.step(carry.replace(frozen=frozen), batches(index), rng)
    return state.replace(frozen={}), every(state, aux)

  def gradient(carry):
    # The batch of the last step; methods that ask expect a constant one.
    batch = batches(jnp.asarray(num_steps - 1))
    return learner.gradient(carry.replace(frozen=frozen), batch, rng)

  loop = ways.Loop(body, state.replace(frozen={}), num_steps, gradient)
  last, history = ways.passed(through, loop)
  return last.replace(frozen=frozen), history
