import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.spatial.distance
import sklearn.neighbors

from fmeta import baselines, evaluate
from fmeta.errors import UsageError

RULES = [baselines.nearest_mean_cosine, baselines.nearest_mean_euclid]


def _embeddings(n=60, dim=8, classes=4, seed=0):
  rng = np.random.default_rng(seed)
  labels = np.arange(n) % classes
  centres = rng.normal(size=(classes, dim))
  rows = centres[labels] + rng.normal(size=(n, dim))
  return rows.astype(np.float32), labels


def test_majority_predicts_the_most_frequent_training_class():
  found = baselines.majority([2, 0, 2, 1], num_test=3)
  np.testing.assert_array_equal(found.predictions, [2, 2, 2])
  np.testing.assert_array_equal(found.correct([2, 0, 2]), [1, 0, 1])
  assert found.setting == 'always class 2'


def test_class_means_by_hand():
  means, counts = baselines.class_means(
    jnp.array([[1.0, 0.0], [3.0, 2.0], [5.0, 5.0]]), jnp.array([0, 0, 2]), 3
  )
  np.testing.assert_array_equal(means, [[2, 1], [0, 0], [5, 5]])
  np.testing.assert_array_equal(counts, [2, 0, 1])


def test_euclid_scores_are_minus_squared_distances_to_the_means():
  support, labels = _embeddings()
  queries, _ = _embeddings(seed=1)
  scores = baselines.nearest_mean_euclid(
    jnp.asarray(support), jnp.asarray(labels), jnp.asarray(queries), 4
  )
  means = np.stack([support[labels == c].mean(0) for c in range(4)])
  expected = scipy.spatial.distance.cdist(queries, means, 'sqeuclidean')
  np.testing.assert_allclose(-scores, expected, rtol=1e-5, atol=1e-5)


def test_cosine_scores_are_those_of_scipy(x64):
  support, labels = _embeddings()
  queries, _ = _embeddings(seed=1)
  support, queries = support.astype(float), queries.astype(float)
  scores = baselines.nearest_mean_cosine(
    jnp.asarray(support), jnp.asarray(labels), jnp.asarray(queries), 4
  )
  unit = support / np.linalg.norm(support, axis=1, keepdims=True)
  means = np.stack([unit[labels == c].mean(0) for c in range(4)])
  expected = 1 - scipy.spatial.distance.cdist(queries, means, 'cosine')
  np.testing.assert_allclose(scores, expected, rtol=1e-12, atol=1e-14)


def test_euclid_predictions_equal_scikit_learn():
  support, labels = _embeddings()
  queries, _ = _embeddings(seed=2)
  found = baselines.nearest_mean(
    baselines.nearest_mean_euclid, support, labels, queries, 4
  )
  theirs = sklearn.neighbors.NearestCentroid().fit(support, labels)
  np.testing.assert_array_equal(found.predictions, theirs.predict(queries))
  assert found.num_parameters == 4 * 8


def test_cosine_ignores_lengths_and_euclid_does_not():
  support = jnp.array([[1.0, 0.0], [10.0, 10.0]])
  labels, queries = jnp.array([0, 1]), jnp.array([[1.0, 0.9]])
  cosine, euclid = (rule(support, labels, queries, 2) for rule in RULES)
  assert cosine.argmax() == 1 and euclid.argmax() == 0
  scaled = baselines.nearest_mean_cosine(7 * support, labels, queries, 2)
  np.testing.assert_allclose(scaled, cosine, rtol=1e-6)


@pytest.mark.parametrize('rule', RULES)
def test_a_class_without_examples_is_never_predicted(rule):
  support, labels = _embeddings(classes=3)
  # Class 3 has no examples; its zero mean would be nearest to a zero query.
  queries = jnp.zeros((2, 8))
  scores = rule(jnp.asarray(support), jnp.asarray(labels), queries, 4)
  assert np.isneginf(scores[:, 3]).all()
  assert np.isfinite(scores[:, :3]).all()


@pytest.mark.parametrize('rule', RULES)
def test_episodes_give_what_each_task_gives_alone(rule):
  def episode(index):
    parts = {}
    for name, seed in (('support', index), ('query', 100 + index)):
      rows, labels = _embeddings(n=24, seed=seed)
      parts[name] = {
        'x': rows.reshape(2, 12, 8),
        'label': labels.reshape(2, 12).astype(np.int32),
      }
    return parts

  embed = lambda params, batch: batch['x'] * params
  predict = baselines.nearest_mean_episodes(embed, rule, ways=4)
  params = jnp.float32(2)
  scores = jax.jit(predict)(params, episode(0), None)
  assert scores.shape == (2, 12, 4)
  for task in range(2):
    support, query = (
      jax.tree.map(lambda x: x[task], episode(0)[name])  # noqa: B023
      for name in ('support', 'query')
    )
    alone = rule(
      2 * jnp.asarray(support['x']),
      jnp.asarray(support['label']),
      2 * jnp.asarray(query['x']),
      4,
    )
    np.testing.assert_allclose(scores[task], alone, rtol=1e-5, atol=1e-5)
  accuracies = evaluate.evaluate_episodes(predict, params, episode, num=4)
  assert accuracies[0] == np.mean(
    scores[0].argmax(-1) == episode(0)['query']['label'][0]
  )


@pytest.mark.parametrize('rule', RULES)
def test_rows_of_weight_zero_are_no_support_in_episodes(rule):
  rows, labels = _embeddings(n=24)
  weight = (np.arange(12) < 8).astype(np.float32)
  part = {'x': rows[None, :12], 'label': labels[None, :12].astype(np.int32)}
  query = {'x': rows[None, 12:], 'label': labels[None, 12:].astype(np.int32)}
  predict = baselines.nearest_mean_episodes(
    lambda params, batch: batch['x'], rule, ways=4
  )
  padded = {'support': {**part, 'weight': weight[None]}, 'query': query}
  alone = {'support': {k: v[:, :8] for k, v in part.items()}, 'query': query}
  np.testing.assert_allclose(
    predict({}, padded, None), predict({}, alone, None), rtol=1e-5
  )


def _texts(n, seed):
  rng = np.random.default_rng(seed)
  words = [['red', 'blue'], ['two', 'three'], ['cat', 'dog']]
  labels = rng.integers(0, 3, n)
  texts = [
    ' '.join([*rng.choice(words[y], 2), *rng.choice(['of', 'the', 'is'], 3)])
    for y in labels
  ]
  return texts, labels


def test_tfidf_svm_separates_separable_texts():
  test, labels = _texts(30, seed=2)
  found = baselines.tfidf_svm(_texts(60, 0), _texts(30, 1), test)
  assert found.correct(labels).mean() == 1
  assert len(found.tried) == 6 and found.setting in found.tried
  assert found.num_parameters % 3 == 0 and found.seconds > 0


def test_tfidf_svm_chooses_the_smaller_strength_of_a_tie():
  found = baselines.tfidf_svm(
    _texts(60, 0), _texts(30, 1), _texts(5, 2)[0], strengths=(10.0, 1.0)
  )
  assert found.tried == {'C=1': 1.0, 'C=10': 1.0}
  assert found.setting == 'C=1'


def test_the_best_validation_accuracy_decides_the_strength():
  texts, labels = _texts(200, 0)
  noisy = np.where(np.random.default_rng(3).random(200) < 0.3, 0, labels)
  found = baselines.tfidf_svm(
    (texts, noisy), _texts(50, 1), texts[:3], strengths=(1e-4, 1.0)
  )
  assert found.tried[found.setting] == max(found.tried.values())
  assert found.tried['C=0.0001'] < found.tried['C=1']


def test_empty_input_is_named():
  data = _texts(10, 0)
  with pytest.raises(UsageError, match="split 'valid' has no texts"):
    baselines.tfidf_svm(data, ([], []), ['x'])
  with pytest.raises(UsageError, match='strengths is empty'):
    baselines.tfidf_svm(data, data, ['x'], strengths=())
  with pytest.raises(UsageError, match='no training labels'):
    baselines.majority([], 3)
  rows, labels = _embeddings()
  with pytest.raises(UsageError, match='not all in 0..2'):
    baselines.nearest_mean(RULES[0], rows, labels, rows, num_classes=3)
