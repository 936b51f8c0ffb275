"""Implicit derivatives as they are run: few solver steps, no convergence."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_through as problems
import toys
from test_through import KEY, PHI, STRENGTH, A, B, C, D, quadratic

from fmeta import optim, penalty, through, tuning
from fmeta.learner import finetune
from fmeta.meta import episode_loss
from fmeta.testing import assert_close, check_gradient

RATE = 0.3
SYSTEM = A + STRENGTH * np.eye(3)


def cg_by_hand(system, v, num_steps):
  x, rest, way = np.zeros_like(v), v, v
  for _ in range(num_steps):
    length = rest @ rest / (way @ system @ way)
    x, left = x + length * way, rest - length * system @ way
    way, rest = left + (left @ left) / (rest @ rest) * way, left
  return x


def neumann_by_hand(system, v, num_steps):
  shrink = np.eye(3) - RATE * system
  powers = [np.linalg.matrix_power(shrink, k) for k in range(num_steps + 1)]
  return RATE * sum(powers) @ v


def two_steps(form, centre):
  t = PHI
  for _ in range(2):
    t = t - RATE * (form @ (t - centre) + STRENGTH * (t - PHI))
  return t


SOLVERS = {
  'cg 1': (through.cg(1), lambda h, v: cg_by_hand(h, v, 1)),
  'cg 2': (through.cg(2), lambda h, v: cg_by_hand(h, v, 2)),
  'cg 2, damped': (
    through.cg(2, 0.7),
    lambda h, v: cg_by_hand(h + 0.7 * np.eye(3), v, 2),
  ),
  'neumann 2': (
    through.neumann(2, RATE),
    lambda h, v: neumann_by_hand(h, v, 2),
  ),
}


@pytest.mark.parametrize('name', SOLVERS)
def test_few_steps_of_loop_and_solver_are_those_by_hand(name, x64):
  solve, by_hand = SOLVERS[name]
  found = problems.implicit_gradient(solve, steps=2)
  end = two_steps(A, C)
  solved = by_hand(SYSTEM, B @ (end - D))
  np.testing.assert_allclose(
    found['model']['t'], STRENGTH * solved, rtol=1e-12, atol=1e-14
  )
  np.testing.assert_allclose(
    found['hyper']['strength'], solved @ (PHI - end), rtol=1e-12
  )


def test_tasks_side_by_side_are_solved_each_by_itself(x64):
  held = penalty.l2_sp(STRENGTH)
  inner = finetune(quadratic, optim.sgd(RATE), penalty=held)
  way = through.implicit(through.cg(2))
  loss = episode_loss(inner, quadratic, 2, through=way)
  scales = 1.0, 0.5, 2.0
  batch = {
    'support': {
      'form': jnp.stack([k * A for k in scales]),
      'at': jnp.stack([C + k for k in scales]),
    },
    'query': {
      'form': jnp.stack([B / k for k in scales]),
      'at': jnp.stack([D - k for k in scales]),
    },
  }
  grad = jax.jit(jax.grad(lambda t: loss({'t': t}, {}, batch, KEY)[0]))
  expected = [
    STRENGTH
    * cg_by_hand(
      k * A + STRENGTH * np.eye(3),
      B / k @ (two_steps(k * A, C + k) - D + k),
      2,
    )
    for k in scales
  ]
  np.testing.assert_allclose(
    grad(jnp.asarray(PHI)), np.mean(expected, 0), rtol=1e-12
  )


def test_a_converged_loop_agrees_with_central_differences(x64):
  def inner(hyper):
    held = penalty.l2_sp(hyper['strength'])
    return finetune(quadratic, optim.sgd(RATE), penalty=held)

  way = through.implicit(through.cg(3))
  loss = episode_loss(inner, quadratic, 400, through=way)
  batch = problems.quadratic_episode()
  params = {
    'model': {'t': jnp.asarray(PHI)},
    'hyper': {'strength': jnp.asarray(STRENGTH)},
  }
  grads = check_gradient(lambda p: loss(p, {}, batch, KEY)[0], params)
  assert all(np.all(x != 0) for x in jax.tree.leaves(grads))


def test_frozen_leaves_move_the_minimiser_too(x64):
  loss_fn, params, _, _ = toys.problem(sizes=(3,))
  params, batch = toys.double(params), problems.episodes()
  inner = finetune(
    loss_fn,
    optim.sgd(0.4),
    tuning=tuning.select('head/.*'),
    penalty=penalty.l2_sp(0.5),
  )

  def slope(way):
    loss = episode_loss(inner, loss_fn, 600, through=way)
    return jax.jit(jax.grad(lambda p: loss(p, {}, batch, None)[0]))(params)

  found = slope(through.implicit(through.cg(30)))
  # Conjugate gradients end where rounding errors do.
  assert_close(slope(through.plain), found, 'frozen leaves', 1e-10)
  kernel = found['body']['layer_0']['kernel']
  direct = slope(through.first_order)['body']['layer_0']['kernel']
  assert np.abs(kernel - direct).max() > 0.01 * np.abs(kernel).max()
