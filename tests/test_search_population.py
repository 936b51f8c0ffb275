"""A population's members are the schedules that it recorded."""

import jax
import numpy as np
import pytest
import search_toys as toys

from fmeta import search
from fmeta.errors import UsageError
from fmeta.search.population import explored, sources
from fmeta.testing import assert_same

SIZE, INTERVAL, ROUNDS = 10, 3, 4
RNG = jax.random.key(0)
HYPER = {
  'rate': np.geomspace(0.01, 0.6, SIZE).astype('f'),
  'momentum': np.linspace(0.1, 0.8, SIZE, dtype='f'),
}
EXPLORATION = search.Exploration({'rate': (0.02, 0.5)}, seed=1)


def shifted(k):
  return lambda i: toys.batches(1000 * k + i)


SOURCE = [shifted(k) for k in range(SIZE)]


@pytest.fixture(scope='module')
def trials():
  return search.Trials(toys.learner_of)


@pytest.fixture(scope='module')
def score(trials):
  held_out = [{'c': np.zeros(3, np.float32)}]
  return search.validation(trials, toys.loss, held_out, '-loss')


def train(trials, score, **options):
  state = trials.init(toys.PARAMS, HYPER, RNG)
  return search.population(
    trials,
    state,
    HYPER,
    SOURCE,
    RNG,
    score,
    EXPLORATION,
    interval=INTERVAL,
    num_rounds=ROUNDS,
    **options,
  )


@pytest.fixture(scope='module')
def found(trials, score):
  return train(trials, score)


def test_replaying_the_recorded_schedule_gives_the_same_state(found):
  path = search.lineage(found.rounds, found.best)
  assert len(path) == ROUNDS and path[-1][0] == found.best
  mine = toys.Alone()
  for index, (slot, hyper) in enumerate(path):
    mine.run(
      float(hyper['rate']),
      float(hyper['momentum']),
      SOURCE[slot],
      index * INTERVAL,
      (index + 1) * INTERVAL,
    )
  np.testing.assert_allclose(found.state.trainable['x'], mine.x, rtol=1e-5)
  # The velocity came along with the weights.
  velocity = jax.tree.leaves(found.state.opt_state)
  assert any(np.allclose(leaf, mine.v, rtol=1e-4) for leaf in velocity)
  assert found.state.step == ROUNDS * INTERVAL


def test_every_slot_can_be_replayed_and_some_changed_hands(found, trials):
  copied = 0
  for slot in range(SIZE):
    path = search.lineage(found.rounds, slot)
    copied += any(where != slot for where, _ in path)
    mine = toys.Alone()
    for index, (where, hyper) in enumerate(path):
      start = index * INTERVAL
      rate, momentum = float(hyper['rate']), float(hyper['momentum'])
      mine.run(rate, momentum, SOURCE[where], start, start + INTERVAL)
    score = -0.5 * np.sum(toys.CURVATURE * mine.x**2)
    np.testing.assert_allclose(
      found.rounds[-1]['scores'][slot], score, rtol=1e-4
    )
  assert copied >= 2
  # One number of trials, one number of steps: one program.
  assert trials.traces == 1


def test_the_worst_fifth_takes_from_the_best_fifth_and_is_perturbed(found):
  for index, (now, after) in enumerate(
    zip(found.rounds, found.rounds[1:], strict=False)
  ):
    order = np.argsort(-np.array(now['scores']))
    for slot in range(SIZE):
      source = now['source'][slot]
      old, new = now['hyper']['rate'][source], after['hyper']['rate'][slot]
      if slot in order[-2:]:
        assert source in order[:2]
        ends = [np.clip(old * f, 0.02, 0.5) for f in (0.8, 1.2)]
        np.testing.assert_allclose(min(abs(new - end) for end in ends), 0)
      else:
        assert source == slot and new == old
      momentum = now['hyper']['momentum'][source]
      assert after['hyper']['momentum'][slot] == momentum, index


def test_draws_are_uniform_and_a_function_of_seed_and_round():
  scores = list(range(SIZE))
  drawn, ups = [], []
  for index in range(300):
    source = sources(scores, EXPLORATION, index)
    assert source == sources(scores, EXPLORATION, index)
    assert source[2:] == list(range(2, SIZE))
    drawn += source[:2]
    values = {'rate': np.full(SIZE, 0.1, 'f')}
    ups += list(explored(values, source, EXPLORATION, index)['rate'][:2] > 0.1)
  assert set(drawn) == {8, 9}
  # 600 fair coins: 4 standard deviations are 49.
  assert abs(drawn.count(9) - 300) < 49 and abs(sum(ups) - 300) < 49


def test_a_diverged_member_is_replaced_too():
  scores = [None, 3.0, None, 5.0, 4.0, None, 1.0, 2.0, 0.5, 0.7]
  source = sources(scores, EXPLORATION, 0)
  assert all(source[k] in (3, 4) for k in (0, 2, 5))
  kept = [k for k in range(SIZE) if source[k] == k]
  assert kept == [1, 3, 4, 6, 7, 8, 9]


def test_a_resumed_population_is_bitwise_the_uninterrupted_one(
  trials, score, found, tmp_path
):
  calls = []

  def dies(state, hyper):
    calls.append(0)
    if len(calls) == 3:
      raise KeyboardInterrupt
    return score(state, hyper)

  ledger = search.Ledger(tmp_path)
  with pytest.raises(KeyboardInterrupt):
    train(trials, dies, ledger=ledger)
  again = train(trials, dies, ledger=ledger)
  assert len(calls) == ROUNDS + 1
  assert_same(found.state, again.state, 'resumed')
  for one, other in zip(found.rounds, again.rounds, strict=True):
    assert one['scores'] == other['scores']
    assert one['source'] == other['source']
    np.testing.assert_array_equal(one['hyper']['rate'], other['hyper']['rate'])


def test_bounds_may_be_infinite_in_a_ledger_too(tmp_path):
  ledger = search.Ledger(tmp_path)
  open_ended = {'bounds': {'rate': [0.0, float('inf')]}}
  ledger.require('search', open_ended)
  ledger.require('search', open_ended)
  with pytest.raises(UsageError, match="another 'bounds'"):
    ledger.require('search', {'bounds': {'rate': [0.0, 1.0]}})
  assert ledger.once('nothing', lambda: None) is None
  assert ledger.once('nothing', lambda: 1) is None


def _bad(exploration=EXPLORATION, hyper=HYPER, interval=1):
  search.population(
    None, None, hyper, None, RNG, None, exploration, interval=interval,
    num_rounds=1,
  )  # fmt: skip


BAD = {
  'unknown': (
    lambda: _bad(search.Exploration({'rat': (0, 1)}, 0)),
    "no hyper-parameter 'rat' to explore; did you mean 'rate'?",
  ),
  'nothing': (lambda: _bad(search.Exploration({}, 0)), 'nothing to explore'),
  'bounds': (lambda: _bad(search.Exploration({'rate': (1, 0)}, 0)), 'low < '),
  'share': (
    lambda: _bad(search.Exploration({'rate': (0, 1)}, 0, share=0.6)),
    'share=0.6',
  ),
  'one': (lambda: _bad(hyper={'rate': [0.1]}), '1 trials, interval=1'),
  'interval': (lambda: _bad(interval=0), 'interval=0'),
}


@pytest.mark.parametrize('name', BAD)
def test_bad_input_is_told_in_one_line(name):
  call, words = BAD[name]
  with pytest.raises(UsageError) as caught:
    call()
  assert words in str(caught.value) and '\n' not in str(caught.value)
