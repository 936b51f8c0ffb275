"""A task's end: its factors become part of the kernels, new ones are born."""

import jax

from fmeta import tree
from fmeta.errors import UsageError
from fmeta.retune import carried_slots, parameter_of
from fmeta.types import Array, Learner, TrainState

# Folded into the key of a task's end: a number of no step, penalty or memory.
BIRTH = 2**32 - 2


def fold(learner: Learner) -> Learner:
  """The same learner, with new factors for each task.

  At a task's end, once the learner's own `end_task` is done,

    W <- W + (alpha / rank) A B,   A, B <- born anew,

  which leaves the model's function as it is. So it is for any tuning that
  merges (`dora`, `ia3`, ...): what it adds to the parameters is merged, and
  it is made anew from there, by a key that depends on the step. Optimiser
  slots of what is born start afresh, those of other leaves (a head) go on. A
  count that both share (Adam's) would be wrong for one of them: give
  `adamw_per_leaf`.

  Penalties go on: those on merged values (`ewc`, `l2_sp`, `mas`, `lwf`) see
  no change. Let a stage end its task: `train.Stage(..., ends_task=True)`.

  Args:
    learner: any; `rehearse(fold(learner), ...)` and `fold(rehearse(...))`
      are the same.

  Raises:
    UsageError: at `init`, if the tuning adds nothing that merges, a penalty
      remembers factors themselves (`si`, `rwalk`), or leaves that are born and
      others share a count.
  """

  def folded(state: TrainState, rng: Array) -> TrainState:
    params = learner.params(state)
    fresh = learner.init(params, rng, state.model_state)
    going_on = set(tree.names(state.trainable)) - _added(learner, state)
    return state.replace(
      trainable=fresh.trainable,
      frozen=fresh.frozen,
      opt_state=carried_slots(state.opt_state, going_on, fresh),
    )

  def init(params, rng, model_state=None):
    state = learner.init(params, rng, model_state)
    _check(learner, state)
    jax.eval_shape(folded, state, rng)  # before anything is trained
    return state

  def end_task(state, forward, batches, rng):
    state = learner.end_task(state, forward, batches, rng)
    key = jax.random.fold_in(jax.random.fold_in(rng, BIRTH), state.step)
    return folded(state, key)

  return learner._replace(init=init, end_task=end_task)


def _added(learner: Learner, state: TrainState) -> set[str]:
  """Names of the trainable leaves that a merge leaves out."""
  full = tree.names(jax.eval_shape(learner.params, state))
  return set(tree.names(state.trainable)) - set(full)


def _check(learner: Learner, state: TrainState) -> None:
  added = _added(learner, state)
  if not added:
    raise UsageError(
      'fold merges what a tuning adds to kernels, and this one trains only '
      f'parameters of the model, such as {tree.names(state.trainable)[0]!r}; '
      'use lora or another that merges'
    )
  for name in tree.names(state.penalty_state):
    factor = parameter_of(name, added)
    if factor is not None:
      raise UsageError(
        f"the penalty remembers {factor!r}, which is born anew at a task's "
        'end; use one on merged values, such as ewc, l2_sp or mas'
      )
