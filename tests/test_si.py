"""Synaptic intelligence."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import streamed
import toys

from fmeta import adapters, losses, optim, penalty
from fmeta.learner import finetune

PARAMS = toys.three_kernels()
LOSS = losses.supervised(toys.three_layers, losses.softmax_cross_entropy)
TASKS = [[toys.batch_of(6, seed=10 * t + i) for i in range(4)] for t in (1, 2)]
# Momentum, clipping and a decay so strong that some parameters move uphill:
# updates are far from minus the gradient.
OPTIMIZER = optim.adamw(0.05, clip_norm=0.5, weight_decay=5.0)


def _by_hand(passed, tasks, xi, loss=LOSS):
  """Omega, anchor and the last task's omega from the states passed."""
  slope = jax.jit(jax.grad(lambda p, batch: loss(p, {}, batch, None)[0]))
  zeros = jax.tree.map(np.zeros_like, streamed.numbers(PARAMS))
  total, out = zeros, []
  for (path, _), batches in zip(passed, tasks, strict=True):
    points = [streamed.numbers(state.trainable) for state in path]
    omega = zeros
    for here, there, batch in zip(points, points[1:], batches, strict=False):
      omega = jax.tree.map(
        lambda w, g, p, q: w - np.asarray(g) * (q - p),
        omega,
        slope(here, batch),
        here,
        there,
      )
    total = jax.tree.map(
      lambda o, w, p, q: np.maximum(o + w / ((q - p) ** 2 + xi), 0),
      total,
      omega,
      points[0],
      points[-1],
    )
    out.append((omega, total, points[-1]))
  return out


def test_path_importance_and_anchor_are_the_sums_by_hand(x64):
  params, tasks = toys.double((PARAMS, TASKS))
  made = penalty.si(20.0, xi=0.01)
  learner = finetune(LOSS, OPTIMIZER, penalty=made)
  passed = streamed.run(learner, params, tasks, toys.three_layers)
  by_hand = _by_hand(passed, tasks, 0.01)
  for (path, after), (omega, total, anchor) in zip(
    passed, by_hand, strict=True
  ):
    before, after = path[-1].penalty_state, after.penalty_state
    close = lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-13)
    jax.tree.map(close, before['path'], omega)
    jax.tree.map(close, after['importance'], total)
    jax.tree.map(np.testing.assert_array_equal, after['anchor'], anchor)
    assert not any(np.any(x) for x in jax.tree.leaves(after['path']))
  # Some parameters moved uphill, so the maximum was needed.
  assert any(np.any(x < 0) for x in jax.tree.leaves(by_hand[0][0]))
  # The second path was bent by a penalty that is no part of its integral.
  held = passed[1][0][-1]
  pull = jax.grad(lambda p: made.value(p, p, held.penalty_state, {}, None))(
    held.trainable
  )
  assert max(np.abs(g).max() for g in jax.tree.leaves(pull)) > 0.1
  # c sum_i Omega_i (p_i - p*_i)^2, without a half.
  state = passed[-1][1].penalty_state
  moved = jax.tree.map(lambda x: x + 0.5, passed[-1][1].trainable)
  value = made.value(moved, moved, state, {}, None)
  total = sum(x.sum() for x in jax.tree.leaves(by_hand[-1][1]))
  np.testing.assert_allclose(value, 20.0 * 0.25 * total, rtol=1e-12)


@pytest.mark.parametrize('xi', [0.1, jnp.asarray(0.5)])
def test_factors_are_remembered_one_by_one(xi):
  lora = adapters.lora_merged('body/.*/kernel', rank=2, also=('head/.*',))
  learner = finetune(
    LOSS, optim.sgd(0.3), tuning=lora, penalty=penalty.si(1.0, xi)
  )
  ((path, after),) = streamed.run(learner, PARAMS, TASKS[:1], toys.three_layers)
  state = after.penalty_state
  jax.tree.map(
    np.testing.assert_array_equal, state['anchor'], path[-1].trainable
  )
  moved = jax.tree.map(
    lambda x, y: bool(np.any(x != y)), path[0].trainable, path[-1].trainable
  )
  assert all(jax.tree.leaves(moved))
  assert all(np.any(x > 0) for x in jax.tree.leaves(state['importance']))
