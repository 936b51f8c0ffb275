import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmeta import optim

# The rates of steps 0, 1, ... by hand.
BY_HAND = {
  'constant': (
    functools.partial(optim.warmup_constant, warmup=0.3),
    8.0,
    10,
    [2, 4, 6, 8, 8, 8, 8, 8, 8, 8, 8],
  ),
  'cosine': (
    functools.partial(optim.warmup_cosine, warmup=0.2, final=0.1),
    1.0,
    6,
    # w = 1; then 0.1 + 0.9 (1 + cos(pi t)) / 2 for t = 0, 1/5, ..., 1
    [0.5, *(0.55 + 0.45 * np.cos(np.pi * np.arange(6) / 5)), 0.1, 0.1],
  ),
  'polynomial': (
    functools.partial(
      optim.warmup_polynomial, warmup=0.2, power=2.0, final=0.2
    ),
    10.0,
    5,
    [5, 10, 2 + 8 * 9 / 16, 2 + 8 * 4 / 16, 2 + 8 / 16, 2, 2],
  ),
  'slanted': (
    functools.partial(optim.slanted_triangular, cut_frac=0.2, ratio=5.0),
    10.0,
    10,
    # cut = 2: p = 0, 1/2, then 1 - (i - 2) / 8
    [2 + 8 * p for p in (0, 0.5, *(1 - np.arange(9) / 8), 0)],
  ),
  'one cycle': (
    functools.partial(optim.one_cycle, rise=0.4, start=0.2, final=0.01),
    10.0,
    10,
    # through (0, 2), (3, 10), (6, 2), (9, 0.1)
    [2, 14 / 3, 22 / 3, 10, 22 / 3, 14 / 3, 2, 4.1 / 3, 2.2 / 3, 0.1, 0.1],
  ),
}


def _rates(schedule, num_steps):
  return jax.jit(jax.vmap(schedule))(jnp.arange(num_steps))


@pytest.mark.parametrize('name', BY_HAND)
def test_schedule_by_hand_with_traced_peak_and_length(name):
  make, peak, num_steps, expected = BY_HAND[name]
  steps = jnp.arange(len(expected))

  def rates(peak, num_steps):
    return jax.vmap(make(peak, num_steps))(steps)

  found = jax.jit(rates)(peak, num_steps)
  np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_inverse_sqrt_by_hand():
  rates = jax.jit(
    lambda w: jax.vmap(optim.inverse_sqrt(6.0, w))(jnp.arange(16))
  )
  found = rates(4)
  np.testing.assert_allclose(found[:4], [1.5, 3.0, 4.5, 6.0], rtol=1e-6)
  np.testing.assert_allclose(found[15], 3.0, rtol=1e-6)
  np.testing.assert_allclose(found[8], 4.0, rtol=1e-6)


def test_a_polynomial_of_power_one_is_linear():
  linear = _rates(optim.warmup_linear(3.0, 12, 0.25), 12)
  power = _rates(optim.warmup_polynomial(3.0, 12, 0.25, power=1.0), 12)
  np.testing.assert_allclose(power, linear, rtol=1e-6)


def test_slanted_triangular_is_the_papers_at_the_papers_numbers():
  rates = _rates(optim.slanted_triangular(0.01, 1000), 1001)
  found = [rates[i] for i in (0, 100, 550, 1000)]
  expected = [0.01 / 32, 0.01, 0.01 * (1 + 0.5 * 31) / 32, 0.01 / 32]
  np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize('num_steps', [1, 5, 15])
def test_a_short_slanted_triangle_stays_above_its_floor(num_steps):
  # floor(15 * 0.1) = 1: by the formula alone p ends below zero.
  rates = _rates(optim.slanted_triangular(1.0, num_steps), num_steps)
  assert np.all(rates >= 1 / 32 - 1e-7) and np.all(rates <= 1)


@pytest.mark.oracle
def test_one_cycle_is_torchs_of_three_phases():
  import torch

  parameter = torch.nn.Parameter(torch.zeros(1))
  optimizer = torch.optim.SGD([parameter], lr=1.0)
  peer = torch.optim.lr_scheduler.OneCycleLR(
    optimizer, 0.7, 50, three_phase=True, anneal_strategy='linear'
  )
  expected = []
  for _ in range(50):
    expected.append(peer.get_last_lr()[0])
    optimizer.step()
    peer.step() if len(expected) < 50 else None
  found = _rates(optim.one_cycle(0.7, 50), 50)
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-7)
