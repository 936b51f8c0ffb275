"""T trials in one program are T runs, whichever way they are run."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toys

from fmeta import optim, penalty, search, tuning
from fmeta.errors import UsageError
from fmeta.learner import finetune
from fmeta.search.hyper import Watched
from fmeta.testing import assert_close, assert_same

LOSS, PARAMS, BATCH, FORWARD = toys.problem(dropout=0.2)
LITTLE, SMALL, _, SMALL_FORWARD = toys.problem(sizes=(4,))
SURGERY = tuning.select('body/layer_1/.*', 'head/.*')
PROBE = tuning.select('head/.*')
WAYS = [search.vmapped, search.mapped, search.looped]
SIZE = 16


def learner_of(hyper):
  rates = (('head/.*', hyper['head']), ('.*', 1.0))
  return finetune(
    LOSS,
    optim.adamw(hyper['rate'], weight_decay=hyper['decay'], multipliers=rates),
    tuning=SURGERY,
    penalty=penalty.l2_sp(hyper['strength']),
  )


def small(hyper):
  return finetune(LITTLE, optim.sgd(hyper['rate']), tuning=PROBE)


HYPER = search.log_uniform(
  0,
  SIZE,
  rate=(1e-4, 1e-1),
  decay=(1e-3, 1.0),
  head=(0.5, 20.0),
  strength=(1e-2, 1.0),
)
FOUR = {'rate': np.geomspace(0.01, 0.3, 4)}


def batches(i):
  return jax.tree.map(np.asarray, toys.batch_of(8, seed=i))


def shifted(k):
  return lambda i: batches(100 * k + i)


@pytest.fixture(scope='module')
def sequential():
  """Every trial alone, one hand-written loop each: states after 1 and 20."""

  @jax.jit
  def step(hyper, state, batch, rng):
    return learner_of(hyper).step(state, batch, rng)

  found = {1: [], 20: []}
  for k in range(SIZE):
    mine = {name: values[k] for name, values in HYPER.items()}
    state = learner_of(mine).init(PARAMS, jax.random.key(k))
    for i in range(20):
      state, aux = step(mine, state, batches(i), jax.random.key(k))
      if i + 1 in found:
        found[i + 1].append((state, aux.metrics['loss']))
  return found


def test_sixteen_trials_in_one_trace_are_sixteen_runs(sequential):
  rngs = search.keys(range(SIZE))
  trials = search.Trials(learner_of)
  first = trials.init(PARAMS, HYPER, rngs)
  state, _ = trials.run(first, HYPER, batches, rngs, 1)
  assert trials.traces == 1
  last, metrics = trials.run(
    state, HYPER, batches, rngs, 19, start=1, steps_per_dispatch=1
  )
  assert trials.traces == 1
  assert metrics['loss'].shape == (SIZE, 19)
  for k in range(SIZE):
    after_one, _ = sequential[1][k]
    after_twenty, loss = sequential[20][k]
    assert_close(after_one, search.one(state, k), f'trial {k}', 1e-5)
    assert_close(after_twenty, search.one(last, k), f'trial {k}', 1e-4)
    np.testing.assert_allclose(metrics['loss'][k, -1], loss, rtol=1e-4)
  # The trials are sixteen different runs, not one sixteen times.
  kernels = np.asarray(last.trainable['head']['kernel'])
  assert len(np.unique(kernels.reshape(SIZE, -1), axis=0)) == SIZE


@pytest.fixture(scope='module')
def trials():
  """One program that most tests share: T = 4, three steps."""
  return search.Trials(small)


def started(trials):
  return trials.init(SMALL, FOUR, jax.random.key(0))


@pytest.mark.parametrize('own', [False, True], ids=['shared', 'own batches'])
def test_the_three_ways_give_the_same_runs_with_one_trace_each(own):
  rngs = search.keys([3, 1, 4, 1])
  source = [shifted(k) for k in range(4)] if own else batches
  found = []
  for way in WAYS:
    trials = search.Trials(small, way)
    found.append(trials.run(started(trials), FOUR, source, rngs, 3))
    assert trials.traces == 1
  # In turn and from the host it is the same scan of the same step.
  for state, metrics in found[1:]:
    assert_close(found[0][0], state, 'ways', 1e-6)
    np.testing.assert_allclose(metrics['loss'], found[0][1]['loss'], rtol=1e-6)
  assert len(np.unique(found[0][1]['loss'][:, 0])) == (4 if own else 1)


def test_a_trial_with_its_own_batches_is_the_run_on_them(trials):
  source = [shifted(k) for k in range(4)]
  rng = jax.random.key(0)
  state, _ = trials.run(started(trials), FOUR, source, rng, 3)
  alone = small({'rate': FOUR['rate'][2]})
  step, mine = jax.jit(alone.step), alone.init(SMALL, rng)
  for i in range(3):
    mine, _ = step(mine, shifted(2)(i), rng)
  assert_close(mine, search.one(state, 2), 'own batches', 1e-5)


def test_frozen_leaves_are_shared_and_untouched(trials):
  state = started(trials)
  kernel = SMALL['body']['layer_0']['kernel']
  held = state.frozen['body']['layer_0']['kernel']
  assert held.unsafe_buffer_pointer() == kernel.unsafe_buffer_pointer()
  assert state.trainable['head']['kernel'].shape[0] == 4
  after, _ = trials.run(state, FOUR, batches, jax.random.key(0), 3)
  assert after.frozen is state.frozen


def test_rates_in_the_optimizers_state_are_trials_as_well(trials):
  learner = finetune(
    LITTLE, optax.inject_hyperparams(optim.sgd)(rate=0.0), tuning=PROBE
  )
  rng = jax.random.key(0)
  by_state = search.Trials(learner)
  state = by_state.init(SMALL, FOUR, rng)
  np.testing.assert_array_equal(
    state.opt_state.hyperparams['rate'], np.float32(FOUR['rate'])
  )
  found, _ = by_state.run(state, FOUR, batches, rng, 3)
  assert by_state.traces == 1
  expected, _ = trials.run(started(trials), FOUR, batches, rng, 3)
  assert_close(expected.trainable, found.trainable, 'injected', 1e-6)


def test_fresh_heads_differ_by_the_trials_key(trials):
  def fresh(key):
    kernel = jax.random.normal(key, SMALL['head']['kernel'].shape)
    return {**SMALL, 'head': {**SMALL['head'], 'kernel': kernel}}

  state = trials.init(fresh, FOUR, search.keys([5, 6, 7, 8]))
  expected = fresh(jax.random.key(6))['head']['kernel']
  np.testing.assert_array_equal(state.trainable['head']['kernel'][1], expected)


def test_a_diverged_trial_leaves_the_others_alone(trials):
  rng, start = jax.random.key(0), started(trials)
  wild = {'rate': np.array([np.inf, *FOUR['rate'][1:]])}
  expected, _ = trials.run(start, FOUR, batches, rng, 3)
  found, metrics = trials.run(start, wild, batches, rng, 3)
  assert not np.isfinite(metrics['loss'][0, 1])
  rest = [1, 2, 3]
  assert_same(search.take(expected, rest), search.take(found, rest), 'others')


def test_the_score_is_the_weighted_mean_of_a_metric_per_trial(trials):
  rng = jax.random.key(0)
  state, _ = trials.run(started(trials), FOUR, batches, rng, 3)
  held_out = [
    toys.batch_of(8, seed=50, weight=[1] * 8),
    toys.batch_of(8, seed=51, weight=[1] * 3 + [0] * 5),
  ]
  accuracy = search.validation(trials, LITTLE, held_out)(state, FOUR)
  losses = search.validation(trials, LITTLE, held_out, '-loss')(state, FOUR)
  x = np.concatenate([held_out[0]['x'], held_out[1]['x'][:3]])
  label = np.concatenate([held_out[0]['label'], held_out[1]['label'][:3]])
  for k in range(4):
    params = small({'rate': 0.0}).params(search.one(state, k))
    logits, _ = SMALL_FORWARD(params, {}, {'x': x}, None)
    shares = jax.nn.log_softmax(logits)[np.arange(11), label]
    np.testing.assert_allclose(-losses[k], -shares.mean(), rtol=1e-5)
    right = (np.asarray(logits).argmax(-1) == label).mean()
    np.testing.assert_allclose(accuracy[k], right, rtol=1e-6)


def test_grid_and_random_values_are_what_was_asked():
  tried = search.grid(rate=[1.0, 2.0], decay=[0.1, 0.2, 0.3])
  assert tried['rate'].tolist() == [1, 1, 1, 2, 2, 2]
  np.testing.assert_allclose(tried['decay'], [0.1, 0.2, 0.3] * 2)
  few = search.log_uniform(3, 4, rate=(1e-3, 1.0))
  many = search.log_uniform(3, 2000, rate=(1e-3, 1.0))
  np.testing.assert_array_equal(many['rate'][:4], few['rate'])
  tenths = np.log10(many['rate'])
  assert tenths.min() >= -3 and tenths.max() <= 0
  # Uniform in the logarithm: mean -1.5, standard deviation 3 / sqrt(12).
  np.testing.assert_allclose(tenths.mean(), -1.5, atol=0.08)
  np.testing.assert_allclose(tenths.std(), 3 / 12**0.5, rtol=0.05)


def test_the_fastest_way_has_the_smallest_median():
  seconds = np.array([[9.0, 1.0, 1.2], [2.0, 2.0, 2.0], [4.0, 4.0, 3.0]])
  found = search.Comparison(tuple(WAYS), seconds)
  assert found.fastest is search.vmapped
  # 4 / 9, 4 / 1, 3 / 1.2: paired, repeat by repeat.
  assert found.ratio(search.vmapped, to=search.looped) == 2.5


def test_comparing_the_ways_times_each_of_them(trials):
  found = search.compare(
    small,
    started(trials),
    FOUR,
    batches,
    jax.random.key(0),
    num_steps=1,
    repeats=2,
    ways=WAYS[1:],
  )
  assert found.seconds.shape == (2, 2) and (found.seconds > 0).all()


def _trials(hyper=FOUR, source=batches, rng=None, learner=small, steps=1):
  trials = search.Trials(learner)
  state = trials.init(SMALL, FOUR, jax.random.key(0))
  rng = jax.random.key(0) if rng is None else rng
  return trials.run(state, hyper, source, rng, steps)


def _noisy(params, rng):
  # Like a random projection that is not trained.
  noise = jax.random.normal(rng, (2,))
  moving, still = PROBE.init(params, rng)
  return moving, {**still, 'noise': noise}


BAD = {
  'empty': (lambda: _trials({}), 'no hyper-parameters to search'),
  'scalar': (lambda: _trials({'rate': 0.1}), 'is one number'),
  'lengths': (
    lambda: _trials({'rate': [0.1] * 4, 'decay': [0.1] * 3}),
    "{'rate': 4, 'decay': 3} values",
  ),
  'other T': (lambda: _trials({'rate': [0.1] * 3}), 'the state [4] trials'),
  'unread': (
    lambda: _trials({**FOUR, 'rte': [0.1] * 4}),
    "nothing in the learner reads hyper-parameter 'rte'; it reads ['rate']",
  ),
  'missing': (
    lambda: _trials({'rat': [0.1] * 4}),
    "reads hyper-parameter 'rate', which the trials do not set; did you mean",
  ),
  'keys': (lambda: _trials(rng=search.keys([1, 2])), '2 keys for 4 trials'),
  'old key': (lambda: _trials(rng=jnp.zeros(2, jnp.uint32)), 'rng is uint32'),
  'batches': (lambda: _trials(source=[batches]), '1 functions of batches'),
  'steps': (lambda: _trials(steps=0), 'num_steps=0'),
  'injected': (
    lambda: search.Trials(
      finetune(LITTLE, optax.inject_hyperparams(optim.sgd)(rate=0.0))
    ).init(SMALL, {'rte': [0.1]}, jax.random.key(0)),
    "no hyper-parameter 'rte'; did you mean 'rate'?",
  ),
  'frozen': (
    lambda: search.Trials(
      lambda hyper: finetune(
        LITTLE, optim.sgd(hyper['rate']), tuning=PROBE._replace(init=_noisy)
      )
    ).init(SMALL, FOUR, search.keys(range(4))),
    'one key for all trials',
  ),
  'no grid': (lambda: search.grid(rate=[]), "'rate' has no values"),
  'range': (lambda: search.log_uniform(0, 2, rate=(0, 1)), '0 < low <= high'),
  'no validation': (
    lambda: search.validation(search.Trials(small), LITTLE, []),
    'no validation batches',
  ),
}


@pytest.mark.parametrize('name', BAD)
def test_bad_input_is_told_in_one_line(name):
  call, words = BAD[name]
  with pytest.raises(UsageError) as caught:
    call()
  assert words in str(caught.value)
  assert '\n' not in str(caught.value)


def test_names_passed_on_as_keywords_count_as_read():
  watched = Watched({'rate': 1.0, 'momentum': 0.9})
  assert dict(**watched) == {'rate': 1.0, 'momentum': 0.9}
  watched.require_read()
