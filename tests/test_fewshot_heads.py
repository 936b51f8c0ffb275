"""Heads against a few lines of numpy, padding, and their gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from fmeta import baselines, fewshot, losses, optim, tuning
from fmeta.errors import UsageError
from fmeta.learner import finetune
from fmeta.testing import check_gradient

WAYS, WIDTH = 4, 3
# Class 2 is absent.
LABELS = np.array([0, 3, 1, 0, 3, 3, 1])
RELATION = fewshot.relation_init(jax.random.key(3), WIDTH, hidden=5)
HEADS = {
  'prototypes': fewshot.prototypes,
  'cosine_prototypes': fewshot.cosine_prototypes(5.0),
  'nearest_mean': baselines.nearest_mean_cosine,
  'matching': fewshot.matching(2.0),
  'ridge': fewshot.ridge(0.7, 3.0),
  'relation': fewshot.relation(RELATION),
}


@functools.cache
def task(width=WIDTH):
  random = np.random.default_rng(0)
  return random.normal(size=(7, width)), random.normal(size=(4, width))


def unit(rows):
  return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def means(rows):
  present = sorted(set(LABELS.tolist()))
  return present, np.stack([rows[LABELS == k].mean(0) for k in present])


def softmax(scores):
  exponents = np.exp(scores - scores.max(-1, keepdims=True))
  return exponents / exponents.sum(-1, keepdims=True)


def run(head, support, queries, ways=WAYS, weight=None, labels=LABELS):
  arrays = jnp.asarray(support), jnp.asarray(labels), jnp.asarray(queries)
  weight = None if weight is None else jnp.asarray(weight)
  return np.asarray(head(*arrays, ways, weight))


def test_prototypes_give_the_softmax_of_squared_distances(x64):
  support, queries = task()
  present, centres = means(support)
  distance = ((queries[:, None] - centres[None]) ** 2).sum(-1)
  logits = run(fewshot.prototypes, support, queries)
  assert np.all(np.isneginf(logits[:, 2]))
  found = softmax(logits)
  np.testing.assert_allclose(found[:, present], softmax(-distance), rtol=1e-12)
  np.testing.assert_allclose(logits[:, present], -distance, rtol=1e-12)


def test_prototypes_are_a_linear_head_of_2c_and_minus_c_squared(x64):
  support, queries = task()
  present, centres = means(support)
  linear = queries @ (2 * centres.T) - (centres**2).sum(-1)
  logits = run(fewshot.prototypes, support, queries)[:, present]
  # The same up to |q|^2, which all classes share.
  difference = linear - logits
  np.testing.assert_allclose(
    difference, (queries**2).sum(-1)[:, None].repeat(3, 1), rtol=1e-12
  )


def test_cosine_prototypes_are_scaled_cosines_with_the_means(x64):
  support, queries = task()
  present, centres = means(support)
  found = run(fewshot.cosine_prototypes(5.0), support, queries)
  expected = 5 * unit(queries) @ unit(centres).T
  np.testing.assert_allclose(found[:, present], expected, rtol=1e-12)


def test_matching_is_attention_over_the_support_rows(x64):
  support, queries = task()
  attention = softmax(2.0 * unit(queries) @ unit(support).T)
  expected = attention @ np.eye(WAYS)[LABELS]
  found = np.exp(run(fewshot.matching(2.0), support, queries))
  np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-15)
  np.testing.assert_allclose(found.sum(-1), 1, rtol=1e-12)


@pytest.mark.parametrize('width', [3, 11])  # 7 rows: primal, then dual
def test_ridge_is_the_primal_and_the_dual_solution(width, x64):
  support, queries = task(width)
  x = np.concatenate([support, np.ones((7, 1))], 1)
  asked = np.concatenate([queries, np.ones((4, 1))], 1)
  y, identity = np.eye(WAYS)[LABELS], np.eye
  primal = np.linalg.solve(x.T @ x + 0.7 * identity(width + 1), x.T @ y)
  dual = x.T @ np.linalg.solve(x @ x.T + 0.7 * identity(7), y)
  found = run(fewshot.ridge(0.7, 3.0), support, queries)
  assert np.all(np.isneginf(found[:, 2]))
  for weights in (primal, dual):
    expected = 3.0 * asked @ weights
    np.testing.assert_allclose(
      found[:, [0, 1, 3]], expected[:, [0, 1, 3]], rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize('width', [3, 11])
def test_a_weight_multiplies_a_row_s_squared_error_in_ridge(width, x64):
  support, queries = task(width)
  weight = np.array([0.5, 2, 1, 0, 1, 3, 0.1])
  x = np.concatenate([support, np.ones((7, 1))], 1)
  asked = np.concatenate([queries, np.ones((4, 1))], 1)
  left = x.T * weight
  solved = np.linalg.solve(
    left @ x + 0.7 * np.eye(width + 1), left @ np.eye(WAYS)[LABELS]
  )
  found = run(fewshot.ridge(0.7, 1.0), support, queries, weight=weight)
  expected = (asked @ solved)[:, [0, 1, 3]]
  np.testing.assert_allclose(found[:, [0, 1, 3]], expected, atol=1e-12)


def test_learned_ridge_starts_where_its_init_says(x64):
  support, queries = task()
  hyper = fewshot.ridge_init(0.7, 3.0)
  found = run(fewshot.learned_ridge().head_of(hyper), support, queries)
  expected = run(fewshot.ridge(0.7, 3.0), support, queries)
  np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_relation_compares_every_query_with_every_sum(x64):
  support, queries = task()
  params = toys.double(RELATION)
  hidden, score = params['hidden'], params['score']
  found = run(fewshot.relation(params), support, queries)
  for k in (0, 1, 3):
    total = support[LABELS == k].sum(0)
    for q, query in enumerate(queries):
      pair = np.concatenate([total, query])
      active = np.maximum(pair @ hidden['kernel'] + hidden['bias'], 0)
      expected = active @ score['kernel'] + score['bias']
      np.testing.assert_allclose(found[q, k], expected[0], rtol=1e-12)


def test_relation_error_is_the_squared_error_of_the_sigmoids(x64):
  logits = jnp.asarray([[0.3, -1.0, -jnp.inf], [2.0, 0.5, -jnp.inf]])
  error, metrics = fewshot.relation_error(
    logits, {'label': jnp.asarray([1, 0])}
  )
  sigmoid = 1 / (1 + np.exp(-np.asarray(logits)[:, :2]))
  target = np.array([[0, 1], [1, 0]])
  np.testing.assert_allclose(error, ((sigmoid - target) ** 2).sum(-1), 1e-12)
  np.testing.assert_array_equal(metrics['accuracy'], [0, 1])


def test_the_cosine_classifier_ignores_lengths(x64):
  random = np.random.default_rng(2)
  x, body = random.normal(size=(5, 4)), random.normal(size=(4, 3))
  kernel = random.normal(size=(3, 6))

  def embed(params, model_state, batch, rng):
    assert set(params) == {'body'}
    return batch['x'] @ params['body'], model_state

  forward = fewshot.cosine_classifier(embed, 10.0)

  def logits(scale):
    params = {'body': body * scale, 'head': {'kernel': kernel * scale**2}}
    params = jax.tree.map(jnp.asarray, params)
    return forward(params, {}, {'x': jnp.asarray(x)}, None)[0]

  expected = 10 * unit(x @ body) @ unit(kernel.T).T
  np.testing.assert_allclose(logits(1.0), expected, rtol=1e-12)
  np.testing.assert_allclose(logits(7.0), expected, rtol=1e-12)


def test_a_step_of_the_cosine_head_is_its_gradient_by_hand(x64):
  # l_k = s u v_k, v_k = w_k / |w_k|: dl_k/dw_k = s (u - l_k v_k / s) / |w_k|.
  random = np.random.default_rng(3)
  x, w = random.normal(size=(5, 3)), random.normal(size=(3, 4))
  labels, scale, rate = np.array([0, 3, 1, 1, 2]), 10.0, 0.5
  rows, vectors = unit(x), unit(w.T)
  cosines = rows @ vectors.T
  slopes = (softmax(scale * cosines) - np.eye(4)[labels]) / len(x)
  grads = slopes.T @ rows - (slopes * cosines).sum(0)[:, None] * vectors
  expected = w - rate * scale * grads.T / np.linalg.norm(w, axis=0)

  forward = fewshot.cosine_classifier(
    lambda params, model_state, batch, rng: (batch['x'], model_state), scale
  )
  learner = finetune(
    losses.supervised(forward, losses.softmax_cross_entropy),
    optim.sgd(rate),
    tuning=tuning.select('head/.*'),
  )
  params, batch = {'head': {'kernel': w}}, {'x': x, 'label': labels}
  params, batch = jax.tree.map(jnp.asarray, (params, batch))
  state = learner.init(params, jax.random.key(0))
  state, _ = jax.jit(learner.step)(state, batch, jax.random.key(0))
  found = state.trainable['head']['kernel']
  np.testing.assert_allclose(found, expected, rtol=1e-12)


@pytest.mark.parametrize('name', HEADS)
def test_padding_rows_and_absent_classes_change_nothing(name, x64):
  support, queries = task()
  kept = LABELS != 3  # leaves classes 0 and 1
  small = run(HEADS[name], support[kept], queries, ways=2, labels=LABELS[kept])
  wide = run(HEADS[name], support, queries, ways=6, weight=kept)
  np.testing.assert_allclose(wide[:, :2], small, rtol=1e-12, atol=1e-12)
  assert np.all(np.isneginf(wide[:, 2:]))


@pytest.mark.parametrize(
  'name, width', [*((name, WIDTH) for name in HEADS), ('ridge', 11)]
)
def test_gradients_agree_with_central_differences(name, width, x64):
  support, queries = map(jnp.asarray, task(width))
  weight = jnp.asarray([1.0, 1, 1, 1, 0, 1, 1])
  batch = {'label': jnp.asarray([0, 1, 3, 3])}
  params = {'support': support, 'queries': queries}
  head_of = lambda hyper: HEADS[name]
  if name == 'ridge':
    params['hyper'] = fewshot.ridge_init(0.7, 3.0)
    head_of = fewshot.learned_ridge().head_of
  if name == 'relation':
    params['hyper'], head_of = RELATION, fewshot.relation
  params = jax.tree.map(lambda x: jnp.asarray(x, 'float64'), params)

  def objective(params):
    head = head_of(params.get('hyper'))
    logits = head(
      params['support'], jnp.asarray(LABELS), params['queries'], WAYS, weight
    )
    return losses.softmax_cross_entropy(logits, batch)[0].mean()

  grads = check_gradient(objective, params)
  assert np.any(grads['support'] != 0) and np.any(grads['queries'] != 0)
  # Padding takes no part.
  assert not np.any(np.asarray(grads['support'])[4])
  if name == 'ridge':
    assert all(slope != 0 for slope in grads['hyper'].values())


def test_arrays_that_are_no_task_are_refused():
  support, queries = task()
  for wrong in (
    (support[None], LABELS, queries, None),
    (support, LABELS[1:], queries, None),
    (support, LABELS, queries[:, 1:], None),
    (support, LABELS, queries, np.ones(3)),
  ):
    with pytest.raises(UsageError, match='are no task; give'):
      fewshot.prototypes(*wrong[:3], WAYS, wrong[3])


def test_a_strength_that_is_not_positive_is_refused():
  for make in (lambda s: fewshot.ridge(s, 1.0), fewshot.ridge_init):
    with pytest.raises(UsageError, match='strength 0.0 is not positive'):
      make(0.0)
