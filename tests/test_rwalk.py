"""Riemannian walk."""

import jax
import numpy as np
import pytest
import streamed
import toys

from fmeta import UsageError, losses, optim, penalty
from fmeta.learner import finetune

PARAMS = toys.three_kernels()
LOSS = losses.supervised(toys.three_layers, losses.softmax_cross_entropy)
# Seven steps: with intervals of three the last has one step, and the next
# task's first interval begins anew.
TASKS = [[toys.batch_of(6, seed=10 * t + i) for i in range(7)] for t in (1, 2)]


def _flat(arrays):
  leaves = jax.tree.leaves(streamed.numbers(arrays))
  return np.concatenate([x.ravel() for x in leaves])


def _by_hand(passed, tasks, alpha, every, eps):
  """(F + s) of each task, on one long vector."""
  slope = jax.jit(jax.grad(lambda p, batch: LOSS(p, {}, batch, None)[0]))
  fisher = score = None
  out = []
  for (path, _), batches in zip(passed, tasks, strict=True):
    points = np.stack([_flat(state.trainable) for state in path])
    grads = np.stack(
      [
        _flat(slope(state.trainable, batch))
        for state, batch in zip(path, batches, strict=False)
      ]
    )
    gained = np.zeros(points.shape[1])
    for start in range(0, len(batches), every):
      stop = min(start + every, len(batches))
      new = (grads[start:stop] ** 2).mean(0)
      fisher = new if fisher is None else alpha * new + (1 - alpha) * fisher
      drop = -(grads[start:stop] * np.diff(points[start : stop + 1], axis=0))
      distance = fisher * (points[stop] - points[start]) ** 2 / 2
      gained += np.maximum(drop.sum(0), 0) / (distance + eps)
    score = gained if score is None else (score + gained) / 2
    out.append(fisher / fisher.max() + score / score.max())
  return out


@pytest.mark.parametrize('every', [1, 3])
def test_fisher_and_scores_are_those_of_the_equations(every, x64):
  params, tasks = toys.double((PARAMS, TASKS))
  made = penalty.rwalk(0.7, alpha=0.6, every=every, eps=1e-2)
  learner = finetune(LOSS, optim.adamw(0.03), penalty=made)
  passed = streamed.run(learner, params, tasks, toys.three_layers)
  by_hand = _by_hand(passed, tasks, 0.6, every, 1e-2)
  for (path, after), weights in zip(passed, by_hand, strict=True):
    state = after.penalty_state
    np.testing.assert_allclose(_flat(state['importance']), weights, rtol=1e-9)
    np.testing.assert_array_equal(
      _flat(state['anchor']), _flat(path[-1].trainable)
    )
    moved = jax.tree.map(lambda x: x + 0.5, after.trainable)
    np.testing.assert_allclose(
      made.value(moved, moved, state, {}, None),
      0.7 * 0.25 * weights.sum(),
      rtol=1e-9,
    )


def test_a_task_of_no_steps_leaves_the_fisher_alone():
  learner = finetune(LOSS, optim.sgd(0.1), penalty=penalty.rwalk(1.0, every=2))
  first, second = streamed.run(
    learner, PARAMS, [TASKS[0][:3], []], toys.three_layers
  )
  before, after = first[1].penalty_state, second[1].penalty_state
  jax.tree.map(np.testing.assert_array_equal, before['fisher'], after['fisher'])
  assert after['intervals'] == before['intervals'] == 2


def test_an_interval_of_no_steps_is_refused():
  with pytest.raises(UsageError, match='every=0; give at least 1 step'):
    penalty.rwalk(1.0, every=0)
