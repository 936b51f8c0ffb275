"""A stream of tasks inside one episode, consolidated between them."""

import jax
import jax.numpy as jnp

from fmeta import through, tree
from fmeta.errors import UsageError
from fmeta.learner import adapt
from fmeta.meta import (
  ADAPT,
  INIT,
  QUERY,
  Inner,
  Over,
  batches_of,
  inner_learner,
  per_task,
)
from fmeta.types import Aux, Forward, LossFn, Params

# Another stream of randomness within one episode.
END = QUERY + 1


def boundaries_loss(
  inner: Inner,
  loss_fn: LossFn,
  forward: Forward,
  num_steps: int,
  *,
  batch_size: int | None = None,
  over: Over = jax.vmap,
  through: through.Through = through.plain,
) -> LossFn:
  """The query loss after a stream of tasks, each of which has an end.

    s_0 = init(p),  s_t = end_task(adapt(s_{t-1}, task_t)),
    L(p) = mean_episode loss(s_T, query)

  `learner.end_task` runs inside the trace, so what a penalty or a memory does
  at a boundary is differentiated with the rest: an EWC strength, an anchor, a
  start or rates under which little is forgotten can be learned. With one task
  and no penalty it is `episode_loss`. (The last task is consolidated as well,
  which changes no loss.)

  Args:
    inner: as for `episode_loss`.
    loss_fn: the loss on the query set.
    forward: what a penalty consolidates with, such as logits for a Fisher.
    num_steps: inner steps on each task.
    batch_size: as for `episode_loss`, within a task.
    over: how episodes are mapped.
    through: how each task's inner loop is differentiated.

  Returns:
    A `LossFn` of `{'support': [episodes, tasks, rows, ...], 'query':
    [episodes, rows, ...]}`; its unit of weight is an episode and its outputs
    are the query outputs. Model state is an input only.

  Raises:
    UsageError: when traced, if a task's end changes frozen leaves (`fold`).
  """

  def loss(params, model_state, batch, rng):
    def one(episode, key):
      learner, start = inner_learner(inner, params)
      state = learner.init(start, jax.random.key(INIT), model_state)
      steps, ends = (jax.random.fold_in(key, k) for k in (ADAPT, END))
      frozen = state.frozen  # constant: kept out of the scan's carry

      def task(state, support):
        state, _ = adapt(
          learner,
          state.replace(frozen=frozen),
          batches_of(support, batch_size),
          steps,
          num_steps=num_steps,
          every=lambda state, aux: None,
          through=through,
        )
        end = jax.random.fold_in(ends, state.step)
        state = learner.end_task(state, forward, [support], end)
        _require_same(frozen, state.frozen)
        return state.replace(frozen={}), None

      begun = state.replace(frozen={})
      last = jax.lax.scan(task, begun, episode['support'])[0]
      state = last.replace(frozen=frozen)
      asked = None if rng is None else jax.random.fold_in(key, QUERY)
      with learner.using(state) as adapted:
        value, aux = loss_fn(
          adapted, state.model_state, episode['query'], asked
        )
      return value, dict(aux.metrics), aux.outputs

    values, metrics, outputs = per_task(one, over, batch, rng)
    weight = jnp.asarray(values.shape[0], values.dtype)
    metrics = jax.tree.map(jnp.mean, metrics)
    return values.mean(), Aux(model_state, metrics, weight, outputs)

  return loss


def _require_same(frozen: Params, after: Params) -> None:
  leaves = jax.tree.leaves(frozen), jax.tree.leaves(after)
  for name, old, new in zip(tree.names(frozen), *leaves, strict=True):
    if new is not old:  # an unchanged leaf is handed on
      raise UsageError(
        f"a task's end changes {name!r}, which is frozen and a constant of the "
        'stream inside an episode; use a learner that does not fold'
      )
