"""A stream of tasks taken by a learner, with everything that it passed."""

import jax
import numpy as np

from fmeta import losses

KEY = jax.random.key(11)


def linear(params, model_state, batch, rng):
  """A `Forward`: x @ kernel."""
  return batch['x'] @ params['kernel'], model_state


def half_squares(forward=linear):
  """Mean over rows of the sum of squares / 2: unit-variance Gaussian NLL."""

  def criterion(outputs, batch):
    return 0.5 * ((outputs - batch['target']) ** 2).sum(-1), {}

  return losses.supervised(forward, criterion)


def run(learner, params, tasks, forward=linear):
  """Each task a list of batches, a step each; consolidated on all of them.

  Returns `[(states before each step and after the last, state after the
  task's end)]` by task; one compiled step.
  """
  step = jax.jit(lambda state, batch: learner.step(state, batch, KEY)[0])
  state, passed = learner.init(params, KEY), []
  for batches in tasks:
    path = [state]
    for batch in batches:
      path.append(step(path[-1], batch))
    state = learner.end_task(path[-1], forward, batches, KEY)
    passed.append((path, state))
  return passed


def numbers(arrays):
  return jax.tree.map(np.asarray, arrays)
