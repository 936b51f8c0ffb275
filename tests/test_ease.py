"""EASE's answers against its paper's equations in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
from eased import (
  ALPHA,
  ANSWER,
  CLASSES,
  DIM,
  EMBED,
  KEY,
  LEARNER,
  PARAMS,
  complement_by_hand,
  cosine,
  filled,
  fit,
  logits_by_hand,
  queries,
  remembered,
  stages,
  streamed,
)

from fmeta import continual, tree
from fmeta.continual import streaming
from fmeta.continual.ease import complement, completed, ensemble, means


def test_the_complement_is_the_papers_sum():
  rng = np.random.default_rng(0)
  old, new, moved = (
    rng.normal(size=(n, d)) for n, d in ((3, 5), (2, 5), (2, 4))
  )
  sims = np.array([[cosine(a, b) for b in new] for a in old])
  for temperature in (1.0, 0.2):
    np.testing.assert_allclose(
      complement(sims, moved, None, temperature),
      complement_by_hand(old, new, moved, temperature),
      rtol=1e-6,
    )


def test_a_copy_of_a_new_class_gets_its_prototype_in_the_sharp_limit():
  rng = np.random.default_rng(1)
  own = rng.normal(size=(3, 4, 6))  # [T, C, D]
  own[0, 0], rows = own[0, 2], np.zeros((3, 4))
  rows[[0, 1, 1, 2], [0, 1, 2, 3]] = 5
  sharp = completed(jnp.asarray(own), jnp.asarray(rows), 1e-3)
  np.testing.assert_allclose(sharp[1, 0], own[1, 2], rtol=1e-6)
  soft = completed(jnp.asarray(own), jnp.asarray(rows))
  assert np.abs(soft[1, 0] - own[1, 2]).max() > 0.1
  # A task of one class is all there is to be like.
  np.testing.assert_allclose(soft[2, :3], np.tile(own[2, 3], (3, 1)), rtol=1e-6)


def test_missing_prototypes_equal_loops_over_pairs_of_tasks():
  groups = ((4, 0), (1, 2, 6), (3,), (5, 7))
  rng = np.random.default_rng(2)
  own, rows, found = np.zeros((5, 9, 4)), np.zeros((5, 9)), {}
  for task, group in enumerate(groups):
    for c in group:
      rows[task, c] = 3
      own[: task + 1, c] = rng.normal(size=(task + 1, 4))
      found |= {(c, s): own[s, c] for s in range(task + 1)}
  made = completed(jnp.asarray(own), jnp.asarray(rows))
  expected = np.zeros_like(own)
  for (c, s), value in filled(found, groups, len(groups)).items():
    expected[s, c] = value
  np.testing.assert_allclose(made, expected, rtol=1e-5, atol=1e-6)


def test_logits_after_each_task_equal_the_papers_equations():
  ended, trained = streamed()
  for k, state in enumerate(ended):
    found, _ = ANSWER(LEARNER.params(state), {}, queries(), None)
    expected = logits_by_hand(trained[: k + 1], queries()['x'])
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert np.isfinite(expected).any(0).sum() == (2, 4, 5)[k]


def test_one_task_is_the_nearest_prototype_by_cosine():
  ended, trained = streamed()
  params = tree.combine(PARAMS, jax.tree.map(jnp.asarray, trained[0]))
  simple = streaming.simple_cil(CLASSES, DIM)
  sums = simple.init()
  for rows in remembered(0):
    features, _ = EMBED(params, {}, rows, None)
    sums = simple.update(sums, features, rows['label'], rows['weight'])
  expected = simple.scores(sums, EMBED(params, {}, queries(), None)[0])
  found, _ = ANSWER(LEARNER.params(ended[0]), {}, queries(), None)
  np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


def test_before_the_first_end_no_class_is_known():
  state = LEARNER.init(PARAMS, KEY)
  found, _ = ANSWER(LEARNER.params(state), {}, queries(), None)
  assert np.all(np.isneginf(found))


def test_order_of_queries_does_not_matter():
  params = LEARNER.params(streamed()[0][-1])
  order = np.random.default_rng(4).permutation(7)
  both, _ = ANSWER(params, {}, queries(), None)
  turned, _ = ANSWER(params, {}, {'x': queries()['x'][order]}, None)
  np.testing.assert_allclose(turned, both[order], rtol=1e-6, atol=1e-6)


def test_sums_do_not_depend_on_how_rows_are_cut():
  state = LEARNER.init(PARAMS, KEY)
  ended = LEARNER.end_task(state, EMBED, remembered(0), KEY)
  rows = jax.tree.map(lambda *x: np.concatenate(x)[::-1], *remembered(0))
  cut = [jax.tree.map(lambda x, k=k: x[k : k + 4], rows) for k in (12, 0, 8, 4)]
  other = LEARNER.end_task(state, EMBED, cut, KEY)
  for name in ('sum', 'rows'):
    np.testing.assert_allclose(
      other.frozen['ease'][name],
      ended.frozen['ease'][name],
      rtol=1e-6,
      atol=1e-6,
    )
  assert ended.frozen['ease']['rows'][0].sum() == 14


def test_other_data_in_task_three_change_nothing_from_before():
  kept = []

  def after_stage(params, model_state, stage):
    kept.append(jax.tree.map(np.array, params['ease']))
    return [
      float(x) for x in ANSWER(params, model_state, queries(), None)[0][0]
    ]

  one = fit(after_stage=after_stage)
  two = fit(stream=stages((0.0, 0.0, 1.0)), after_stage=after_stage)
  assert one.matrix[:2] == two.matrix[:2] and one.matrix[2] != two.matrix[2]
  first, second = kept[2], kept[5]
  for name in ('sum', 'rows'):
    old = (slice(None, 2), slice(None, 4))  # of tasks one and two
    np.testing.assert_array_equal(first[name][old], second[name][old])
  assert np.any(first['sum'][:, 5] != second['sum'][:, 5])


def test_a_class_that_comes_again_is_of_both_tasks():
  rows = np.array([[2.0, 0.0], [1.0, 3.0]])
  features = np.random.default_rng(5).normal(size=(2, 4, 3))
  prototypes = np.random.default_rng(6).normal(size=(2, 2, 3))
  found = ensemble(features, prototypes, jnp.asarray(rows), ALPHA)
  weight = [[1.0, ALPHA], [1.0, 1.0]]
  expected = [
    [
      sum(
        weight[s][c] * cosine(features[s, b], prototypes[s, c]) for s in (0, 1)
      )
      for c in (0, 1)
    ]
    for b in range(4)
  ]
  np.testing.assert_allclose(found, expected, rtol=1e-6)
  made = completed(jnp.asarray(prototypes), jnp.asarray(rows))
  np.testing.assert_array_equal(made, prototypes.astype(np.float32))
  # The first subspace saw the rows of both tasks.
  counts = np.array([[3.0, 3.0], [1.0, 3.0]])[:, :, None]
  found = means(jnp.asarray(counts * prototypes), jnp.asarray(rows))
  np.testing.assert_allclose(found, prototypes, rtol=1e-6)


def test_alpha_and_temperature_may_be_traced():
  params = LEARNER.params(streamed()[0][-1])

  def answer(alpha, temperature):
    forward = continual.ease_forward(EMBED, alpha, temperature)
    return forward(params, {}, queries(), None)[0]

  pairs = jnp.array([0.0, 0.1, 1.0]), jnp.array([1.0, 0.5, 0.1])
  many = jax.jit(jax.vmap(answer))(*pairs)
  for k in range(3):
    np.testing.assert_allclose(
      many[k],
      answer(float(pairs[0][k]), float(pairs[1][k])),
      rtol=1e-5,
      atol=1e-6,
    )
  assert np.abs(many[0] - many[1])[:, :4].max() > 1e-2
