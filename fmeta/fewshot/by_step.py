"""Answers after every inner step: how fast a start adapts."""

import jax
import jax.numpy as jnp

from fmeta.fewshot.episode_losses import Predict
from fmeta.learner import adapt
from fmeta.meta import (
  ADAPT,
  INIT,
  Inner,
  Over,
  inner_learner,
  per_task,
  require_parts,
)
from fmeta.types import Forward, ModelState


def predict_by_step(
  inner: Inner,
  forward: Forward,
  num_steps: int,
  *,
  model_state: ModelState | None = None,
  over: Over = jax.vmap,
) -> Predict:
  """`predict_episodes` for 0, 1, ..., `num_steps` inner steps in one loop.

  Args:
    inner: as for `predict_episodes`.
    forward: the model.
    num_steps: of the longest; more than in training shows what further steps
      do.
    model_state: where the inner learner starts; none by default.
    over: how tasks are mapped.

  Returns:
    `(params, episodes, rng) -> logits [tasks, num_steps + 1, Q, ways]`, for
    `evaluate.answer_episodes`.
  """

  def predict(params, episodes, rng):
    require_parts(episodes)

    def one(episode, key):
      learner, start = inner_learner(inner, params)

      def query(state, aux=None):
        del aux
        with learner.using(state) as adapted:
          return forward(adapted, state.model_state, episode['query'], None)[0]

      state = learner.init(start, jax.random.key(INIT), model_state)
      _, after = adapt(
        learner,
        state,
        lambda _: episode['support'],
        jax.random.fold_in(key, ADAPT),
        num_steps=num_steps,
        every=query,
      )
      return jnp.concatenate([query(state)[None], after])

    return per_task(one, over, episodes, rng)

  return predict
