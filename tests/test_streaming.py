"""Streaming classifiers against numpy, scipy and scikit-learn."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.discriminant_analysis
import sklearn.linear_model

from fmeta import baselines
from fmeta.continual import streaming
from fmeta.errors import UsageError

CLASSES, DIM, SIZE = 4, 5, 12
KEY = jax.random.key(5)
MAKE = {
  'euclid': lambda: streaming.nearest_mean_euclid(CLASSES, DIM),
  'cosine': lambda: streaming.nearest_mean_cosine(CLASSES, DIM),
  'simple_cil': lambda: streaming.simple_cil(CLASSES, DIM),
  'slda': lambda: streaming.slda(CLASSES, DIM, 0.1),
  'ridge': lambda: streaming.ridge(CLASSES, DIM, 0.3),
  'ranpac': lambda: streaming.ranpac(CLASSES, DIM, SIZE, KEY, 0.3),
}
all_of_them = pytest.mark.parametrize('name', MAKE)


def rows(n=40, seed=0, classes=CLASSES):
  """Balanced classes with a common covariance that is no multiple of I."""
  random = np.random.default_rng(seed)
  label = np.arange(n) % classes
  mix = np.random.default_rng(9).normal(size=(DIM, DIM)) + np.eye(DIM)
  centres = np.random.default_rng(8).normal(size=(CLASSES, DIM))
  return centres[label] * 2 + random.normal(size=(n, DIM)) @ mix, label


def learned(classifier, features, label, weight=None):
  return classifier.update(classifier.init(), features, label, weight=weight)


def test_nearest_means_equal_the_baselines_on_all_rows_at_once(x64):
  (features, label), (queries, _) = rows(), rows(seed=1)
  for name, rule in [
    ('euclid', baselines.nearest_mean_euclid),
    ('cosine', baselines.nearest_mean_cosine),
  ]:
    found = MAKE[name]().scores(learned(MAKE[name](), features, label), queries)
    expected = rule(*map(jnp.asarray, (features, label, queries)), CLASSES)
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)


def test_simple_cil_is_the_cosine_to_the_means_of_raw_rows(x64):
  (features, label), (queries, _) = rows(), rows(seed=1)
  means = np.stack([features[label == c].mean(0) for c in range(CLASSES)])
  lengths = np.linalg.norm(queries, axis=1)[:, None]
  expected = queries @ means.T / lengths / np.linalg.norm(means, axis=1)
  made = MAKE['simple_cil']()
  found = made.scores(learned(made, features, label), queries)
  np.testing.assert_allclose(found, expected, rtol=1e-12)
  cosine = MAKE['cosine']()
  other = cosine.scores(learned(cosine, features, label), queries)
  assert np.abs(found - other).max() > 1e-3
  unit = baselines.unit_length(jnp.asarray(features))
  same = [
    made.scores(learned(made, unit, label), queries)
    for made in (MAKE['simple_cil'](), cosine)
  ]
  np.testing.assert_allclose(*same, rtol=1e-12)


def within(features, label):
  """Pooled covariance by the definition: rows minus their class's mean."""
  means = np.stack([features[label == c].mean(0) for c in range(CLASSES)])
  rest = features - means[label]
  return means, rest.T @ rest / len(features)


def test_slda_is_the_formula_with_numpys_inverse(x64):
  (features, label), (queries, _) = rows(37), rows(seed=1)
  means, covariance = within(features, label)
  made = MAKE['slda']()
  state = learned(made, features, label)
  np.testing.assert_allclose(
    streaming.within_covariance(state), covariance, rtol=1e-11, atol=1e-12
  )
  metric = np.linalg.inv(0.9 * covariance + 0.1 * np.eye(DIM))
  expected = queries @ metric @ means.T
  expected -= 0.5 * np.einsum('ci,ij,cj->c', means, metric, means)
  found = made.scores(state, queries)
  np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-10)


def test_slda_equals_scikit_learn_where_its_shrinkage_target_is_one(x64):
  # Theirs shrinks towards (trace / D) I: rows are scaled so that this is I.
  # Theirs adds the log prior: classes are of one size.
  (features, label), (queries, _) = rows(), rows(seed=1)
  scale = np.sqrt(np.trace(within(features, label)[1]) / DIM)
  features, queries = features / scale, queries / scale
  theirs = sklearn.discriminant_analysis.LinearDiscriminantAnalysis(
    solver='lsqr', shrinkage=0.1
  ).fit(features, label)
  made = MAKE['slda']()
  found = made.scores(learned(made, features, label), queries)
  expected = theirs.decision_function(queries) - np.log(1 / CLASSES)
  np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-10)


def test_slda_answers_do_not_depend_on_the_origin_and_nearest_cosine_does(x64):
  (features, label), (queries, _) = rows(), rows(seed=1)
  shift = 3 * np.ones(DIM)

  def probabilities(made):
    scores = made.scores(learned(made, features, label), queries)
    return jax.nn.softmax(scores)

  for name, same in [('slda', True), ('cosine', False)]:
    made = MAKE[name]()
    moved = streaming.transformed(made, lambda x: x - shift)
    gap = jnp.abs(probabilities(made) - probabilities(moved)).max()
    assert (gap < 1e-11) == same


def test_slda_has_finite_scores_with_fewer_rows_than_features():
  features, label = rows(3)
  made = streaming.slda(CLASSES, DIM, 1e-4)
  scores = made.scores(learned(made, 100 + features, label), 100 + features)
  assert np.isfinite(scores[:, :3]).all()
  assert np.isneginf(scores[:, 3]).all()


def test_a_variance_that_rounding_makes_negative_counts_as_zero():
  made = streaming.slda(2, 2, 1e-4)
  state = {
    'count': jnp.ones(2),
    'sum': jnp.asarray([[0.0, 1.0], [0.0, -1.0]]),
    'second': jnp.diag(jnp.asarray([0.0, 1.998])),
  }
  assert streaming.within_covariance(state)[1, 1] < -5e-4
  kernel = made.solve(state)['kernel']
  np.testing.assert_allclose(kernel, [[0, 0], [1e4, -1e4]], rtol=1e-6)


def one_hot(label):
  return np.eye(CLASSES)[label]


def test_ridge_and_ranpac_equal_scikit_learn(x64):
  (features, label), (queries, _) = rows(), rows(seed=1)
  weights = np.asarray(jax.random.normal(KEY, (DIM, SIZE)))
  for name, transform in [
    ('ridge', lambda x: x),
    ('ranpac', lambda x: np.maximum(x @ weights, 0)),
  ]:
    theirs = sklearn.linear_model.Ridge(alpha=0.3, fit_intercept=False)
    theirs.fit(transform(features), one_hot(label))
    made = MAKE[name]()
    found = made.scores(learned(made, features, label), queries)
    expected = theirs.predict(transform(queries))
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-10)


def test_the_strength_has_the_least_error_on_held_out_rows(x64):
  features, label = rows(60)
  features += np.random.default_rng(3).normal(0, 4, features.shape)
  make = lambda s: streaming.ranpac(CLASSES, DIM, 60, KEY, s)
  part = learned(make(1.0), features[:48], label[:48])
  weight = np.ones(12)
  weight[-2:] = 0
  held = np.where(weight[:, None] > 0, features[48:], np.nan)
  strength, errors = streaming.choose_strength(
    make, part, held, label[48:], weight=weight
  )
  weights = np.asarray(jax.random.normal(KEY, (DIM, 60)))
  hidden = np.maximum(features @ weights, 0)
  expected = []
  for alpha in streaming.STRENGTHS:
    theirs = sklearn.linear_model.Ridge(alpha=alpha, fit_intercept=False)
    theirs.fit(hidden[:48], one_hot(label[:48]))
    gaps = theirs.predict(hidden[48:58]) - one_hot(label[48:58])
    expected.append((gaps**2).sum(1).mean())
  # From 1e-3 on: 48 rows of 60 features leave G singular, and at 1e-8 the two
  # solvers agree to six digits only.
  np.testing.assert_allclose(errors[5:], expected[5:], rtol=1e-8)
  np.testing.assert_allclose(errors[:5], expected[:5], rtol=1e-4)
  best = int(np.argmin(expected))
  assert 0 < best < len(expected) - 1
  assert strength == streaming.STRENGTHS[best]


def test_a_strength_that_cannot_be_solved_is_not_chosen():
  features, label = rows(8)
  make = lambda s: streaming.ranpac(CLASSES, DIM, 40, KEY, s)
  part = learned(make(1.0), 1e3 * features, label)
  strength, errors = streaming.choose_strength(
    make, part, features, label, strengths=(1e-8, 1e4)
  )
  assert np.isposinf(errors[0]) and np.isfinite(errors[1])
  assert strength == 1e4


@all_of_them
def test_unseen_classes_are_never_answered(name):
  features, label = rows(40, classes=2)
  made = MAKE[name]()
  scores = made.scores(learned(made, features, 3 - label), -features)
  assert set(np.asarray(scores.argmax(1))) <= {2, 3}
  assert np.isneginf(scores[:, :2]).all() and np.isfinite(scores[:, 2:]).all()
  empty = made.scores(made.init(), jnp.asarray(features))
  assert np.isneginf(empty).all()


@all_of_them
def test_padding_and_foreign_labels_count_for_nothing(name):
  features, label = rows(12)
  made = MAKE[name]()
  expected = learned(made, features, label)
  padded = np.concatenate([features, np.full((2, DIM), np.nan), features[:2]])
  labels = np.concatenate([label, [0, 1], [-1, CLASSES]])
  weight = np.concatenate([np.ones(12), np.zeros(2), np.ones(2)])
  found = learned(made, padded, labels, weight)
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-5),
    found,
    expected,
  )


@all_of_them
def test_a_row_of_weight_two_is_a_row_twice(name):
  features, label = rows(12)
  made = MAKE[name]()
  weight = np.where(np.arange(12) < 3, 2.0, 1.0)
  twice = [np.concatenate([x, x[:3]]) for x in (features, label)]
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5),
    learned(made, features, label, weight),
    learned(made, *twice),
  )


@functools.cache
def compiled(name):
  """Scores by one scan of batches [seeds, num, B, ...], vmapped over seeds."""
  made = MAKE[name]()

  def learn(batches, queries):
    state, _ = jax.lax.scan(
      lambda state, batch: (made.update(state, *batch), None),
      made.init(),
      batches,
    )
    return made.scores(state, queries)

  return jax.jit(jax.vmap(learn, (0, None)))


@all_of_them
def test_scanned_and_vmapped_is_one_call_per_seed(name):
  queries = jnp.asarray(rows(seed=7)[0], jnp.float32)
  seeds = [rows(40, seed) for seed in range(2)]
  batches = jax.tree.map(
    lambda *x: jnp.stack(x).reshape(2, 5, 8, *x[0].shape[1:]), *seeds
  )
  found = compiled(name)(batches, queries)
  for k, (features, label) in enumerate(seeds):
    made = MAKE[name]()
    expected = made.scores(learned(made, features, label), queries)
    # Sums in another order, then a solve of condition number 1e2 or so.
    np.testing.assert_allclose(found[k], expected, rtol=2e-4, atol=2e-4)


@all_of_them
def test_states_are_plain_dicts_that_add_up(name, x64):
  (features, label), (queries, _) = rows(30), rows(seed=1)
  made = MAKE[name]()
  parts = [learned(made, features[k::3], label[k::3]) for k in range(3)]
  merged = jax.tree.map(lambda *x: sum(x), *parts)
  whole = learned(made, features, label)
  assert type(whole) is dict
  assert all(isinstance(leaf, jax.Array) for leaf in whole.values())
  restored = {key: np.asarray(value) for key, value in whole.items()}
  np.testing.assert_array_equal(
    made.scores(restored, queries), made.scores(whole, queries)
  )
  np.testing.assert_allclose(
    made.scores(merged, queries), made.scores(whole, queries), rtol=1e-9
  )


def test_half_precision_features_are_summed_in_single_precision():
  made = MAKE['ridge']()
  features = jnp.ones((1001, DIM), jnp.bfloat16)
  state = learned(made, features, jnp.zeros(1001, jnp.int32))
  # bfloat16 has eight bits and no 1001.
  assert state['sum'].dtype == jnp.float32
  np.testing.assert_array_equal(state['sum'][0], np.full(DIM, 1001.0))
  np.testing.assert_array_equal(state['second'], np.full((DIM, DIM), 1001.0))


def test_the_strengths_may_be_traced():
  features, label = map(jnp.asarray, rows())
  for factory in (streaming.slda, streaming.ridge):

    @jax.jit
    def scores(strength, factory=factory):
      made = factory(CLASSES, DIM, strength)
      return made.scores(learned(made, features, label), features)

    made = factory(CLASSES, DIM, 0.5)
    expected = made.scores(learned(made, features, label), features)
    np.testing.assert_allclose(scores(0.5), expected, rtol=1e-4, atol=1e-4)
    assert np.abs(scores(0.9) - expected).max() > 1e-3


def test_concatenated_features_stand_side_by_side():
  embed = lambda params, batch: batch['x'] * params
  both = streaming.concatenated(embed)((2.0, 3.0), {'x': jnp.ones((2, 4))})
  np.testing.assert_array_equal(both, [[2.0] * 4 + [3.0] * 4] * 2)


@pytest.mark.parametrize(
  'call, message',
  [
    (lambda: streaming.slda(3, 4, 0.0), 'shrinkage=0.0; give one in'),
    (lambda: streaming.slda(3, 4, 1.5), 'shrinkage=1.5'),
    (lambda: streaming.ridge(3, 4, 0), 'strength=0; give a positive'),
    (lambda: streaming.simple_cil(0, 4), '0 classes of 4 features'),
    (
      lambda: learned(MAKE['slda'](), np.ones((2, 3)), np.zeros(2, int)),
      r'features of shape \(2, 3\); give \[B, 5\]',
    ),
  ],
)
def test_bad_input_is_refused_in_one_line(call, message):
  with pytest.raises(UsageError, match=message):
    call()
