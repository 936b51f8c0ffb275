"""Online EWC."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from fmeta import penalty

KEY = jax.random.key(3)
PARAMS = {'a': jnp.ones((2, 3)), 'b': jnp.zeros(4)}


def _drawn(seed):
  random = np.random.default_rng(seed)
  return {k: random.normal(size=x.shape) for k, x in PARAMS.items()}


def _stream(gamma, num_tasks, strength=3.0):
  """The penalty after some tasks, with their optima and importances."""
  optima = [_drawn(k) for k in range(num_tasks)]
  fishers = [
    {k: x**2 for k, x in _drawn(10 + t).items()} for t in range(num_tasks)
  ]
  params = toys.double(PARAMS)
  state = penalty.online_ewc(strength).init(params, params)
  for optimum, fisher in zip(optima, fishers, strict=True):
    now = jax.tree.map(jnp.asarray, optimum)
    made = penalty.online_ewc(
      strength, lambda *args, fisher=fisher: fisher, gamma
    )
    state = made.consolidate(state, now, now, {}, None, [], KEY)
  return made, state, optima, fishers


@pytest.mark.parametrize('gamma', [1.0, 0.6, 0.0])
@pytest.mark.parametrize('num_tasks', [1, 3])
def test_value_and_gradient_are_those_of_the_recursion(num_tasks, gamma, x64):
  made, state, optima, fishers = _stream(gamma, num_tasks)
  point = _drawn(99)
  value, slope = jax.value_and_grad(
    lambda p: made.value(p, p, state, {}, None)
  )(jax.tree.map(jnp.asarray, point))
  by_hand = 0.0
  for name in point:
    total = np.zeros_like(point[name])
    for fisher in fishers:
      total = gamma * total + fisher[name]
    off = point[name] - optima[-1][name]
    by_hand += 1.5 * gamma * (total * off**2).sum()
    np.testing.assert_allclose(
      slope[name], 3.0 * gamma * total * off, rtol=1e-12
    )
  np.testing.assert_allclose(value, by_hand, rtol=1e-12)


def test_of_one_task_it_is_ewc(x64):
  made, state, _, fishers = _stream(1.0, 1)
  params = toys.double(PARAMS)
  plain = penalty.ewc(3.0, lambda *args: fishers[0])
  optimum = jax.tree.map(jnp.asarray, _drawn(0))
  held = plain.consolidate(
    plain.init(params, params), optimum, optimum, {}, None, [], KEY
  )
  point = jax.tree.map(jnp.asarray, _drawn(99))
  np.testing.assert_allclose(
    made.value(point, point, state, {}, None),
    plain.value(point, point, held, {}, None),
    rtol=1e-14,
  )


def test_gamma_may_be_vmapped(x64):
  gammas = jnp.asarray([0.3, 1.0])
  point = jax.tree.map(jnp.asarray, _drawn(99))

  def value(gamma):
    made, state, _, _ = _stream(gamma, 3)
    return made.value(point, point, state, {}, None)

  found = jax.jit(jax.vmap(value))(gammas)
  np.testing.assert_allclose(found, [value(g) for g in gammas], rtol=1e-12)
