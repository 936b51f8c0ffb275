"""Continual learning against closed forms: no data, no training runs.

Each section is one method's facts; the numbers come from the equations.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmeta.continual import streaming

# Streaming classifiers

STREAMED = {
  'euclid': streaming.nearest_mean_euclid(6, 7),
  'cosine': streaming.nearest_mean_cosine(6, 7),
  'simple_cil': streaming.simple_cil(6, 7),
  'slda': streaming.slda(6, 7, 0.01),
  'ranpac': streaming.ranpac(6, 7, 20, jax.random.key(0), 0.1),
}


def _rows_of_six_classes():
  random = np.random.default_rng(4)
  label = np.repeat(np.arange(6), 15)
  centres = random.normal(size=(6, 7))
  return centres[label] + random.normal(size=(90, 7)), label


def _streamed(classifier, order, batch):
  """The state after the rows of `order`, `batch` at a time."""
  features, label = _rows_of_six_classes()
  state, update = classifier.init(), jax.jit(classifier.update)
  for part in order.reshape(-1, batch):
    state = update(state, features[part], label[part])
  return state


def _by_tasks(pairs):
  """Rows of two classes a task, in the order of `pairs`, shuffled within."""
  label = _rows_of_six_classes()[1]
  random = np.random.default_rng(sum(pairs[0]))
  return np.concatenate(
    [random.permutation(np.flatnonzero(np.isin(label, p))) for p in pairs]
  )


ORDERS = [[(0, 1), (2, 3), (4, 5)], [(5, 2), (0, 4), (1, 3)]]


@pytest.mark.parametrize('name', STREAMED)
def test_streaming_classifiers_depend_on_neither_order_nor_batches(name, x64):
  made = STREAMED[name]
  queries = np.random.default_rng(6).normal(size=(20, 7))
  expected = made.scores(_streamed(made, np.arange(90), 90), queries)
  splits = [(_by_tasks(ORDERS[0]), 9), (_by_tasks(ORDERS[1]), 30)]
  for order, batch in [*splits, (np.arange(90)[::-1], 30)]:
    found = made.scores(_streamed(made, order, batch), queries)
    # Sums of 90 terms to 1e-15 each, then a solve of condition 1e3 at most.
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize('name', ['euclid', 'simple_cil', 'slda'])
def test_streamed_sums_of_whole_numbers_are_bitwise_equal(name):
  # In float32 too: every partial sum of small whole numbers is exact.
  whole = streaming.transformed(STREAMED[name], lambda x: jnp.round(4 * x))
  one = _streamed(whole, _by_tasks(ORDERS[0]), 9)
  other = _streamed(whole, _by_tasks(ORDERS[1]), 30)
  jax.tree.map(np.testing.assert_array_equal, one, other)


def test_the_online_covariance_of_slda_depends_on_the_order():
  # Hayes & Kanan's recursion, by hand: why fmeta keeps sums instead.
  features, label = _rows_of_six_classes()

  def online(order):
    mean, count, sigma = np.zeros((6, 7)), np.zeros(6), np.zeros((7, 7))
    for t, i in enumerate(order):
      gap = features[i] - mean[label[i]]
      sigma = (t * sigma + t / (t + 1) * np.outer(gap, gap)) / (t + 1)
      count[label[i]] += 1
      mean[label[i]] += gap / count[label[i]]
    return sigma

  one, other = (online(_by_tasks(order)) for order in ORDERS)
  assert np.abs(one - other).max() > 0.05
  pooled = streaming.within_covariance(
    _streamed(STREAMED['slda'], np.arange(90), 90)
  )
  assert np.abs(one - pooled).max() > 0.05
