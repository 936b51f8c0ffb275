"""Early stopping against a search through the whole history."""

import math

import numpy as np
import pytest

from fmeta.train.stopping import Best, Monitor


def brute_force(values, patience, min_delta):
  """(step that is best, evaluation that stops or None), from the definition.

  An evaluation improves if it is larger by more than `min_delta` than the
  last one that did; training stops at the first evaluation that is the last
  of `patience` in a row without improvement.
  """
  improved = []
  for k, value in enumerate(values):
    last = values[improved[-1]] if improved else -math.inf
    bar = last + min_delta if improved else last
    if not math.isnan(value) and value > bar:
      improved.append(k)
    window = range(k - patience + 1, k + 1)
    if window.start >= 0 and not set(window) & set(improved):
      return (improved[-1] if improved else None), k
  return (improved[-1] if improved else None), None


def run(values, monitor):
  best = Best()
  for k, value in enumerate(values):
    value = monitor.value({monitor.name.removeprefix('-'): value})
    best.update(monitor, value, step=k)
    if best.exhausted(monitor):
      return best.step, k
  return best.step, None


@pytest.mark.parametrize('name', ['score', '-score'])
@pytest.mark.parametrize('min_delta', [0.0, 0.25])
@pytest.mark.parametrize('patience', [1, 2, 4])
def test_stopping_is_its_definition(name, min_delta, patience):
  random = np.random.default_rng([patience, int(min_delta * 4), len(name)])
  stopped = 0
  for _ in range(300):
    # A coarse grid, so that ties and jumps of exactly min_delta occur.
    values = random.integers(0, 8, random.integers(1, 15)) / 8
    values[random.random(len(values)) < 0.1] = math.nan
    seen = -values if name.startswith('-') else values
    monitor = Monitor(name, patience, min_delta)
    found = run(seen.tolist(), monitor)
    assert found == brute_force(values.tolist(), patience, min_delta)
    stopped += found[1] is not None
  assert 20 < stopped <= 300


def test_without_patience_nothing_stops_and_the_best_is_the_first_maximum():
  values = [0.1, 0.7, math.nan, 0.7, 0.2]
  assert run(values, Monitor('score')) == (1, None)
