"""The range test finds where a quadratic starts to diverge."""

import jax
import numpy as np
import pytest
import search_toys as toys

from fmeta import optim, search
from fmeta.errors import UsageError
from fmeta.learner import finetune
from fmeta.search.lr_range import smooth
from fmeta.testing import assert_same
from fmeta.types import Aux

RNG = jax.random.key(0)
SHARP = 4.0
RAMP = {'low': 1e-3, 'high': 10.0, 'num_steps': 60, 'smoothing': 0.0}


def sharp(params, model_state, batch, rng):
  del batch, rng
  value = SHARP / 2 * (params['x'] ** 2).sum()
  return value, Aux(model_state, {}, jax.numpy.ones(()))


def learner_of(hyper):
  return finetune(sharp, optim.sgd(hyper['rate']))


def ramp(**options):
  state = learner_of({'rate': 0.0}).init(toys.PARAMS, RNG)
  return search.range_test(
    learner_of, state, toys.still, RNG, **{**RAMP, **options}
  )


@pytest.fixture(scope='module')
def found():
  return ramp()


def test_the_loss_is_smallest_where_gradient_descent_starts_to_diverge(found):
  # Descent on a/2 x^2 diverges beyond 2 / a; 1 / a is the best rate.
  lowest = int(found.losses.argmin())
  assert found.rates[lowest - 1] <= 2 / SHARP < found.rates[lowest]
  np.testing.assert_allclose(found.suggestion, found.rates[lowest] / 10)
  factor = found.rates[1] / found.rates[0]
  assert 0.2 / SHARP <= found.suggestion <= 0.2 / SHARP * factor
  assert found.diverged and len(found.rates) < 60


def test_the_losses_are_those_of_the_ramp_by_hand(found):
  rates = 1e-3 * (10 / 1e-3) ** (np.arange(60) / 59)
  np.testing.assert_allclose(found.rates, rates[: len(found.rates)], rtol=1e-5)
  x = np.array([1.0, -2.0, 0.5])
  for rate, loss in zip(found.rates, found.losses, strict=True):
    np.testing.assert_allclose(loss, SHARP / 2 * (x**2).sum(), rtol=1e-5)
    x = x - rate * SHARP * x


def test_it_stops_at_the_first_loss_above_four_times_the_best(found):
  assert (found.losses <= 4 * np.minimum.accumulate(found.losses)).all()
  longer = ramp(stop=1e6)
  after = longer.losses[len(found.losses)]
  assert after > 4 * found.losses.min()


def test_the_result_does_not_depend_on_the_dispatch(found):
  other = ramp(steps_per_dispatch=7)
  np.testing.assert_allclose(other.losses, found.losses, rtol=1e-6)
  assert other.suggestion == found.suggestion


def test_the_callers_state_stays_as_it_is():
  learner = toys.injected()
  state = learner.init(toys.PARAMS, RNG)
  before = jax.tree.map(lambda x: np.array(x, copy=True), state)
  found = search.range_test(
    learner, state, toys.batches, RNG, low=1e-3, high=0.1, num_steps=4
  )
  assert_same(before, jax.tree.map(np.asarray, state), 'state')
  assert not found.diverged and len(found.losses) == 4


def test_smoothing_is_the_weighted_mean_of_the_past():
  losses = np.random.default_rng(0).normal(size=12)
  for n in range(1, 13):
    weights = 0.9 ** np.arange(n)[::-1]
    expected = (weights * losses[:n]).sum() / weights.sum()
    np.testing.assert_allclose(smooth(losses, 0.9)[n - 1], expected)


def test_the_picture_marks_the_suggestion_and_says_it_in_words(found):
  shown = search.figure(found)
  assert shown.png.startswith(b'\x89PNG')
  assert f'Suggested rate {found.suggestion:.2g}' in shown.alt
  assert 'where it diverges' in shown.alt


BAD = {
  'ramp': (lambda: ramp(low=1.0, high=0.1), '0 < low < high'),
  'steps': (lambda: ramp(num_steps=1), 'num_steps=1'),
  'smoothing': (lambda: ramp(smoothing=1.0), 'smoothing=1.0'),
  'unread': (
    lambda: ramp(hyper={'decay': 0.1}),
    "nothing in the learner reads hyper-parameter 'decay'",
  ),
  'at once': (
    lambda: search.range_test(
      toys.plain_of,
      toys.plain_of({'rate': 0.0}).init(toys.PARAMS, RNG),
      lambda i: {'c': np.full(3, np.nan, 'f')},
      RNG,
    ),
    'the loss is nan before the first step',
  ),
}


@pytest.mark.parametrize('name', BAD)
def test_bad_input_is_told_in_one_line(name):
  call, words = BAD[name]
  with pytest.raises(UsageError) as caught:
    call()
  assert words in str(caught.value) and '\n' not in str(caught.value)
