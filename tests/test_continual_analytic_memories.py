"""What memories must do exactly: uniform, mergeable, at rest."""

from itertools import combinations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
from scipy import stats

from fmeta import continual, losses, memory
from fmeta.memory import beside

STREAM_KEY = jax.random.key(31)
NUMBERED = {
  'x': jax.ShapeDtypeStruct((), jnp.int32),
  'label': jax.ShapeDtypeStruct((), jnp.int32),
}


def _contents(make, labels, trials=3000):
  """bool [trials, rows]: what streams of these labels leave in a memory."""
  held, size = make(), len(labels)
  rows = {'x': jnp.arange(size), 'label': jnp.asarray(labels, jnp.int32)}

  def stream(key):
    # In three batches, so that early rows can be displaced.
    filled = held.init()
    for part in jnp.split(jnp.arange(size), 3):
      batch = {name: value[part] for name, value in rows.items()}
      filled = held.insert(filled, batch, jnp.ones(len(part)), key)
    return filled['rows']['x']

  keys = jax.random.split(STREAM_KEY, trials)
  chosen = np.asarray(jax.jit(jax.vmap(stream))(keys))
  return np.any(chosen[:, :, None] == np.arange(size), axis=1)


def _uniform_p_value(inside, capacity, order):
  """Of the counts of all `order`-subsets, if all contents were equally likely.

  With d the counts minus their mean and C their covariance in one trial,
  d' (trials C)^+ d is chi-square with rank(C) degrees of freedom.
  """
  size = inside.shape[1]
  groups = list(combinations(range(size), order))

  def indicators(sets):
    return np.stack([sets[:, list(group)].all(1) for group in groups], 1)

  possible = np.zeros((0, size), bool)
  for content in combinations(range(size), capacity):
    row = np.isin(np.arange(size), content)
    possible = np.concatenate([possible, row[None]])
  equal = indicators(possible).astype(float)
  covariance = np.cov(equal.T, bias=True)
  gap = indicators(inside).sum(0) - len(inside) * equal.mean(0)
  inverse = np.linalg.pinv(covariance, rcond=1e-9, hermitian=True)
  statistic = gap @ inverse @ gap / len(inside)
  return stats.chi2.sf(statistic, np.linalg.matrix_rank(covariance, 1e-9))


@pytest.mark.parametrize('order', [1, 2])
def test_reservoir_inclusion_is_uniform_for_rows_and_for_pairs(order):
  inside = _contents(lambda: memory.reservoir(4, NUMBERED), [0] * 9)
  assert np.all(inside.sum(1) == 4)
  assert 0.001 < _uniform_p_value(inside, 4, order) < 0.999


@pytest.mark.parametrize('order', [1, 2])
def test_class_balanced_inclusion_is_uniform_within_a_class(order):
  # Class 0 has 6 rows, class 1 has 3; each gets 3 of the 6 slots.
  labels = [0, 0, 1, 0, 0, 1, 0, 1, 0]
  inside = _contents(lambda: memory.class_balanced(6, NUMBERED), labels)
  common = inside[:, np.asarray(labels) == 0]
  assert np.all(common.sum(1) == 3) and np.all(inside.sum(1) == 6)
  assert 0.001 < _uniform_p_value(common, 3, order) < 0.999


def test_the_chi_square_sees_what_is_not_uniform():
  random = np.random.default_rng(0)
  contents = [random.permutation(9)[:4] for _ in range(3000)]
  fair = np.stack([np.isin(np.arange(9), c) for c in contents])
  assert 0.001 < _uniform_p_value(fair, 4, 1) < 0.999
  late = fair[fair[:, 8] | (random.random(3000) < 0.5)]
  assert _uniform_p_value(late, 4, 1) < 1e-6
  # Four neighbours on a circle: uniform row by row, but not in pairs.
  windows = np.isin(np.arange(9), np.arange(4))
  windows = np.stack([np.roll(windows, k) for k in random.integers(0, 9, 3000)])
  assert _uniform_p_value(windows, 4, 1) > 0.001
  assert _uniform_p_value(windows, 4, 2) < 1e-6


def test_a_memory_is_the_same_in_batches_and_row_by_row():
  labels = jnp.arange(30) ** 2 % 7
  for make, merge in (
    (memory.reservoir, memory.merge),
    (memory.class_balanced, memory.merge_balanced),
  ):
    held, found = make(8, NUMBERED), []
    insert = jax.jit(held.insert)
    canonical = jax.jit(lambda filled, merge=merge: merge([filled], 8))
    for size in (1, 6):
      filled = held.init()
      for start in range(0, 30, size):
        x = jnp.arange(start, start + size)
        rows = {'x': x, 'label': labels[x]}
        filled = insert(filled, rows, jnp.ones(size), STREAM_KEY)
      found.append(canonical(filled))
    jax.tree.map(np.testing.assert_array_equal, found[0], found[1])


def _remembered(params, rows=8):
  """A batch beside rows whose logits are the model's own."""
  past = toys.batch_of(rows, seed=5)
  outputs = toys.three_layers(params, {}, past, None)[0]
  batch = toys.batch_of(6)
  return beside(batch, {**past, 'outputs': outputs}, jnp.ones(rows))


def test_der_at_the_logits_it_remembers_has_exactly_the_plain_gradient():
  params, ce = toys.three_kernels(), losses.softmax_cross_entropy
  batch = _remembered(params)
  terms = [
    jax.grad(continual.der(toys.three_layers, ce, alpha), has_aux=True)
    for alpha in (0.0, 1e6)
  ]
  without, within = (grad(params, {}, batch, None)[0] for grad in terms)
  jax.tree.map(np.testing.assert_array_equal, without, within)
  # Not so a step away.
  moved = jax.tree.map(lambda x: x + 0.1, params)
  without, within = (grad(moved, {}, batch, None)[0] for grad in terms)
  gap = jax.tree.map(lambda x, y: float(jnp.abs(x - y).max()), without, within)
  assert all(x > 1 for x in jax.tree.leaves(gap))


def test_der_plus_plus_at_the_logits_it_remembers_adds_a_cross_entropy(x64):
  # A linear model: dCE/dW = x' (softmax(xW) - onehot) / rows.
  def linear(params, model_state, batch, rng):
    return batch['x'] @ params['w'], model_state

  random = np.random.default_rng(3)
  params = {'w': jnp.asarray(random.normal(size=(6, 3)))}
  own, past = toys.double((toys.batch_of(5), toys.batch_of(8, seed=2)))
  outputs = linear(params, {}, past, None)[0]
  batch = beside(own, {**past, 'outputs': outputs}, jnp.ones(8))
  loss_fn = continual.der_plus_plus(
    linear, losses.softmax_cross_entropy, alpha=1e6, beta=0.7
  )
  found = jax.grad(loss_fn, has_aux=True)(params, {}, batch, None)[0]['w']

  def by_hand(rows):
    x, label = np.asarray(rows['x']), np.asarray(rows['label'])
    scores = np.exp(x @ np.asarray(params['w']))
    probability = scores / scores.sum(1, keepdims=True)
    return x.T @ (probability - np.eye(3)[label]) / len(x)

  odd = jax.tree.map(lambda x: x[1::2], past)
  np.testing.assert_allclose(
    found, by_hand(own) + 0.7 * by_hand(odd), rtol=1e-12
  )
