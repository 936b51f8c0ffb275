"""Halving keeps the best, and what it keeps is what it would have been."""

import jax
import numpy as np
import pytest
import search_toys as toys

from fmeta import search
from fmeta.errors import UsageError
from fmeta.search.halving import num_steps
from fmeta.testing import assert_close, assert_same
from fmeta.train import Diverged

RNG = jax.random.key(0)
HYPER = {
  'rate': np.array([3.0, 0.01, 0.4, 0.05, 9.0, 0.1, 0.2, 0.02, 0.7], 'f'),
  'momentum': np.linspace(0.0, 0.4, 9, dtype='f'),
}
PLAN = search.rungs(9, 18)


@pytest.fixture(scope='module')
def trials():
  return search.Trials(toys.learner_of)


@pytest.fixture(scope='module')
def score(trials):
  held_out = [{'c': np.zeros(3, np.float32)}]
  return search.validation(trials, toys.loss, held_out, '-loss')


def halve(trials, score, **options):
  state = trials.init(toys.PARAMS, HYPER, RNG)
  return search.halving(
    trials, state, HYPER, toys.batches, RNG, score, PLAN, **options
  )


@pytest.fixture(scope='module')
def found(trials, score):
  before = trials.traces
  found = halve(trials, score)
  return found, trials.traces - before


def alone(k, stop):
  rate, momentum = float(HYPER['rate'][k]), float(HYPER['momentum'][k])
  return toys.Alone().run(rate, momentum, toys.batches, 0, stop)


def value_of(k, stop):
  x = alone(k, stop).x
  return -0.5 * np.sum(toys.CURVATURE * x**2)


def test_halving_keeps_those_that_are_best_by_hand(found):
  found, _ = found
  assert [tuple(rung) for rung in PLAN] == [(9, 2), (3, 6), (1, 18)]
  alive = range(9)
  for rung, (count, steps) in zip(found.rungs, PLAN, strict=True):
    assert len(rung['trials']) == count and rung['steps'] == steps
    best = sorted(alive, key=lambda k: -value_of(k, rung['steps']))
    assert rung['trials'] == sorted(alive)
    expected = [value_of(k, steps) for k in rung['trials']]
    np.testing.assert_allclose(rung['scores'], expected, rtol=1e-4)
    alive = best[: max(1, count // 3)]
  assert found.best == found.rungs[-1]['trials'][0]


def test_the_survivor_is_its_own_sequential_run(found):
  found, _ = found
  mine = alone(found.best, 18)
  np.testing.assert_allclose(found.state.trainable['x'], mine.x, rtol=2e-5)
  assert found.state.step == 18


def test_each_rung_is_traced_once(found):
  assert found[1] == len(PLAN)


def test_eight_trials_on_eight_devices_are_those_of_one():
  trials = search.Trials(toys.plain_of)
  hyper, rngs = {'rate': np.geomspace(0.01, 0.5, 8)}, search.keys(range(8))
  state = trials.init(toys.PARAMS, hyper, rngs)
  expected, _ = trials.run(state, hyper, toys.batches, rngs, 3)
  auto = jax.sharding.AxisType.Auto
  mesh = jax.make_mesh((8,), ('data',), axis_types=(auto,))
  spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('data'))
  found, _ = trials.run(
    jax.device_put(state, spread), hyper, toys.batches, rngs, 3
  )
  assert len(found.trainable['x'].sharding.device_set) == 8
  assert_close(expected, found, '8 devices = 1', 1e-5)


def test_a_plan_follows_algorithm_one_of_hyperband():
  def pairs(plan):
    return [tuple(rung) for rung in plan]

  # Li et al. 2018, table 1: R = 81, eta = 3.
  plans = search.brackets(81)
  assert pairs(plans[0]) == [(81, 1), (27, 3), (9, 9), (3, 27), (1, 81)]
  assert pairs(plans[1]) == [(34, 3), (11, 9), (3, 27), (1, 81)]
  assert pairs(plans[2]) == [(15, 9), (5, 27), (1, 81)]
  assert pairs(plans[3]) == [(8, 27), (2, 81)]
  assert pairs(plans[4]) == [(5, 81)]
  assert pairs(search.rungs(16, 100, eta=4)) == [(16, 6), (4, 25), (1, 100)]
  assert pairs(search.rungs(16, 100, eta=4, depth=0)) == [(16, 100)]
  # 16 x 6 + 4 x 19 + 1 x 75: a survivor's first steps are not paid again.
  assert num_steps(search.rungs(16, 100, eta=4)) == 247
  assert pairs(search.brackets(90, unit=10, eta=3)[0])[0] == (9, 10)


def test_hyperband_returns_the_best_bracket(trials, score):
  def start(bracket, size):
    hyper = search.log_uniform(bracket, size, rate=(1e-3, 0.5))
    hyper['momentum'] = np.zeros(size, 'f')
    return trials.init(toys.PARAMS, hyper, RNG), hyper, RNG

  plans = search.brackets(4, eta=2)
  best, found = search.hyperband(trials, start, toys.batches, score, plans)
  assert [len(each.rungs) for each in found] == [3, 2, 1]
  assert found[best].score == max(each.score for each in found)
  # The last bracket is random search: nobody is stopped early.
  rates = start(2, plans[2][0].trials)[1]['rate']
  by_hand = [
    toys.Alone().run(float(rate), 0.0, toys.batches, 0, 4).x for rate in rates
  ]
  losses = [0.5 * np.sum(toys.CURVATURE * x**2) for x in by_hand]
  assert found[2].best == int(np.argmin(losses))


def test_a_resumed_search_repeats_no_rung_and_is_bitwise_the_same(
  trials, score, found, tmp_path
):
  whole, _ = found
  scored = []

  def dies(state, hyper):
    scored.append(len(hyper['rate']))
    if len(scored) == 2:
      raise KeyboardInterrupt
    return score(state, hyper)

  ledger = search.Ledger(tmp_path / 'ledger')
  with pytest.raises(KeyboardInterrupt):
    halve(trials, dies, ledger=ledger)
  again = halve(trials, dies, ledger=ledger)
  # Nine trials once; the rung of three was not finished; one.
  assert scored == [9, 3, 3, 1]
  assert again.rungs == whole.rungs and again.best == whole.best
  assert_same(whole.state, again.state, 'resumed')
  assert halve(trials, dies, ledger=ledger).rungs == whole.rungs
  assert len(scored) == 4
  with pytest.raises(UsageError, match="another 'hyper'.*another folder"):
    other = {**HYPER, 'rate': HYPER['rate'] / 2}
    state = trials.init(toys.PARAMS, other, RNG)
    search.halving(
      trials, state, other, toys.batches, RNG, score, PLAN, ledger=ledger
    )


def test_diverged_trials_come_last_and_only_they_are_dropped(trials):
  def score(state, hyper):
    values = np.arange(len(hyper['rate']), dtype=float)
    values[1:][-1:] = np.nan  # the last, unless it is alone
    return values

  found = halve(trials, score)
  assert found.rungs[0]['scores'] == [*range(8), None]
  assert found.rungs[1]['trials'] == [5, 6, 7]
  assert found.rungs[2]['trials'] == [6]


def test_a_search_in_which_all_diverge_says_so(trials):
  with pytest.raises(Diverged, match='all 9 trials diverged by step 2'):
    halve(trials, lambda state, hyper: np.full(9, np.nan))


BAD = {
  'plan': (
    lambda t, s: search.halving(
      t, None, HYPER, toys.batches, RNG, s, search.rungs(3, 9)
    ),
    'starts with 3 trials and hyper has 9',
  ),
  'growing': (
    lambda t, s: search.halving(
      t, None, HYPER, toys.batches, RNG, s, [PLAN[0], PLAN[0]]
    ),
    'steps have to',
  ),
  'depth': (lambda t, s: search.rungs(9, 9, depth=3), 'give 0..2'),
  'eta': (lambda t, s: search.rungs(9, 9, eta=1), 'eta=1'),
  'unit': (lambda t, s: search.brackets(9, unit=10), 'unit=10'),
}


@pytest.mark.parametrize('name', BAD)
def test_bad_input_is_told_in_one_line(name, trials, score):
  call, words = BAD[name]
  with pytest.raises(UsageError) as caught:
    call(trials, score)
  assert words in str(caught.value) and '\n' not in str(caught.value)


def test_a_ledger_gives_back_arrays_bitwise_and_refuses_others(tmp_path):
  ledger = search.Ledger(tmp_path)
  arrays = {
    'half': np.array([1.5, -2.0], jax.numpy.bfloat16),
    'step': np.array(3, np.int32),
  }
  ledger.once_with_arrays('a', lambda: ({'n': 1}, arrays), arrays)
  result, found = ledger.once_with_arrays('a', lambda: 1 / 0, arrays)
  assert result == {'n': 1}
  assert_same(arrays, jax.tree.map(np.asarray, found), 'ledger')
  with pytest.raises(UsageError, match="'step' is int32"):
    ledger.once_with_arrays('a', lambda: 1 / 0, {'half': arrays['half']})
  (tmp_path / 'b.json').write_text('{')
  with pytest.raises(UsageError, match='delete it to run it again'):
    ledger.once('b', lambda: 1)
  with pytest.raises(UsageError, match='cannot make the ledger'):
    search.Ledger(tmp_path / 'a.json' / 'inside')
