"""Soups and interpolation against sums and searches written out by hand."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from fmeta import averaging, optim, report, soups
from fmeta.errors import UsageError
from fmeta.learner import finetune
from fmeta.losses import softmax_cross_entropy, supervised

KEY = jax.random.key(12)


def tree_of(*values):
  a, b = values
  return {'m': {'a': jnp.full((2, 3), a, jnp.float32)}, 'b': jnp.float32(b)}


def point(params):
  return np.asarray([params['m']['a'][0, 0], params['b']])


def test_a_uniform_soup_is_the_mean_of_all():
  rows = np.random.default_rng(0).normal(size=(5, 2))
  found = soups.uniform_soup([tree_of(*row) for row in rows])
  np.testing.assert_allclose(point(found), rows.mean(0), rtol=1e-5, atol=1e-6)
  assert found['m']['a'].dtype == jnp.float32


@pytest.mark.parametrize('seed', range(6))
def test_a_greedy_soup_is_the_algorithm_written_out(seed):
  random = np.random.default_rng(seed)
  rows = random.normal(size=(5, 2)).astype(np.float32)
  goal = random.normal(size=2)
  if seed == 1:
    rows[3] = rows[0]  # a tie goes in: it does not get worse

  def score(row):
    # Rounded, so that ties of equal means are ties here, too.
    return float(np.round(-np.sum((row - goal) ** 2), 4))

  order = sorted(range(5), key=lambda k: (-score(rows[k]), k))
  chosen = []
  for k in order:
    with_k = score(rows[[*chosen, k]].mean(0))
    if not chosen or with_k >= score(rows[chosen].mean(0)):
      chosen.append(k)
  soup = soups.greedy_soup(
    [tree_of(*row) for row in rows], lambda p: score(point(p))
  )
  assert soup.ingredients == chosen
  np.testing.assert_allclose(
    point(soup.params), rows[chosen].mean(0), rtol=1e-5, atol=1e-6
  )
  assert soup.score >= max(score(row) for row in rows)


def test_a_score_that_is_no_number_never_goes_in():
  scores = itertools.cycle([np.nan, 0.5, 0.4, np.nan, np.nan])
  soup = soups.greedy_soup(
    [tree_of(k, k) for k in range(3)], lambda p: next(scores)
  )
  assert soup.ingredients == [1] and soup.score == 0.5


def test_interpolation_is_exact_at_both_ends():
  start, end = tree_of(0.1, 7.3), tree_of(-3.7, 0.9)
  for alpha, expected in ((0.0, start), (1.0, end)):
    found = soups.interpolate(start, end, alpha)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
  np.testing.assert_allclose(
    point(soups.interpolate(start, end, 0.25)),
    0.75 * point(start) + 0.25 * point(end),
    rtol=1e-6,
  )


def test_the_curve_is_the_evaluation_of_each_mixture():
  curve = soups.interpolation_curve(
    tree_of(0.0, 1.0),
    tree_of(1.0, 0.0),
    lambda p: {'inside': p['m']['a'][0, 0], 'outside': p['b'] ** 2},
    alphas=(0.0, 0.25, 1.0),
  )
  assert curve == [
    {'alpha': 0.0, 'inside': 0.0, 'outside': 1.0},
    {'alpha': 0.25, 'inside': 0.25, 'outside': 0.5625},
    {'alpha': 1.0, 'inside': 1.0, 'outside': 0.0},
  ]
  drawn = report.interpolation(curve, 'inside', 'outside')
  assert drawn.png.startswith(b'\x89PNG')
  assert '25.0 and 56.2 at 0.25' in drawn.alt
  for given, name, word in (
    (curve[:1], 'inside', 'at least two'),
    (curve, 'insid', "no 'insid'"),
  ):
    with pytest.raises(UsageError, match=word):
      report.interpolation(given, name, 'outside')


def test_other_architectures_and_statistics_are_refused():
  small = {'m': {'a': jnp.zeros(3)}, 'b': jnp.float32(0)}
  for other, word in (
    (small, r"'m/a': \(3,\) and \(2, 3\)"),
    ({'b': jnp.float32(0)}, "'m/a': absent"),
    ({**tree_of(0, 0), 'c': jnp.zeros(1)}, "'c'.*absent"),
  ):
    with pytest.raises(UsageError, match=word):
      soups.uniform_soup([tree_of(0, 0), other])
  held = {'params': tree_of(0, 0), 'batch_stats': {'mean': jnp.zeros(2)}}
  with pytest.raises(UsageError, match='recompute_statistics'):
    soups.interpolate(held, held, 0.5)
  with pytest.raises(UsageError, match='no candidates'):
    soups.greedy_soup([], lambda p: 0.0)
  with pytest.raises(UsageError, match='no alphas'):
    soups.interpolation_curve(tree_of(0, 0), tree_of(1, 1), dict, ())


@pytest.fixture(scope='module')
def averaged_norm():
  """An average of a net with BatchNorm, its last statistics, and the model."""
  module = toys.NormNet()
  forward = toys.forward_of(module)
  params, model_state = toys.init_of(module)
  learner = finetune(
    supervised(forward, softmax_cross_entropy),
    averaging.ema(optim.sgd(0.5), 0.5),
  )
  state = learner.init(params, KEY, model_state)
  step = jax.jit(learner.step)
  for k in range(3):
    state, _ = step(state, toys.batch_of(seed=k), KEY)
  there = averaging.averaged(state.replace(model_state={}))
  return forward, learner.params(there), state.model_state


def test_statistics_are_the_mean_over_the_batches(averaged_norm):
  forward, params, old = averaged_norm
  batches = [toys.batch_of(seed=10 + k) for k in range(3)]
  found = soups.recompute_statistics(forward, params, old, batches, KEY)
  layer = jax.tree.map(np.float64, params['body']['layer_0'])
  hidden = [
    np.float64(b['x']) @ layer['kernel'] + layer['bias'] for b in batches
  ]
  norm = found['batch_stats']['body']['norm']
  np.testing.assert_allclose(
    norm['mean'], np.mean([h.mean(0) for h in hidden], 0), rtol=1e-4, atol=1e-5
  )
  np.testing.assert_allclose(
    norm['var'], np.mean([h.var(0) for h in hidden], 0), rtol=1e-4
  )
  stale = old['batch_stats']['body']['norm']
  assert np.abs(stale['mean'] - norm['mean']).max() > 1e-2
  with pytest.raises(UsageError, match='no batches'):
    soups.recompute_statistics(forward, params, old, [], KEY)


def test_a_statistic_that_training_leaves_alone_keeps_its_value():
  def forward(params, model_state, batch, rng):
    moved = {'mean': 0.9 * model_state['mean'] + 0.1 * batch['x'].mean()}
    return None, {**model_state, **moved}

  old = {'mean': jnp.float32(5), 'fixed': jnp.float32(2), 'seen': jnp.int32(7)}
  found = soups.recompute_statistics(
    forward, {}, old, [{'x': jnp.asarray([1.0, 3.0])}], KEY
  )
  np.testing.assert_allclose(found['mean'], 2, rtol=1e-5)
  assert found['fixed'] == 2 and found['seen'] == 7
  assert found['seen'].dtype == jnp.int32
