"""L2P: each example picks its prompts by their keys."""

import jax
import jax.numpy as jnp
import numpy as np
import prompted
import pytest
from prompted import ASKED, BATCH, FORWARD, PARAMS, QUERY, ROWS

from fmeta import losses, models, optim, testing, tree
from fmeta.adapters import siblings
from fmeta.continual import prompts
from fmeta.errors import UsageError
from fmeta.learner import finetune

SIZE, LENGTH, CHOSEN, STRENGTH = 7, 2, 2, 0.7
TABLE = 'body/embeddings/word/embedding'
TUNING = prompts.l2p_tuning(size=SIZE, length=LENGTH, also=('head/.*',))
GROWN, TRAINABLE = prompted.grown(TUNING)
NEAR = prompted.near_queries([0, 1, 2, 3])
KEYS = jnp.concatenate([NEAR, -NEAR[:3]])
GROWN = siblings.grow(GROWN, {f'{TABLE}.pool_keys': KEYS})
RUN = jax.jit(prompts.l2p_forward(FORWARD, QUERY, CHOSEN))
LOSS = prompts.l2p_loss(
  FORWARD,
  QUERY,
  losses.softmax_cross_entropy,
  chosen=CHOSEN,
  strength=STRENGTH,
)
SLOPE = jax.jit(jax.value_and_grad(LOSS, has_aux=True))


def by_hand():
  """Numbers of the picked prompts [B, N], and all cosines, by numpy."""
  keys = tree.get(GROWN, f'{TABLE}.pool_keys')
  match = prompted.cosine(ASKED, keys)
  return np.argsort(-match, axis=1)[:, :CHOSEN], match


def picked_leaves():
  picked, _ = by_hand()
  pool = np.asarray(tree.get(GROWN, f'{TABLE}.pool'))
  return {f'{TABLE}.prompt': pool[picked].reshape(ROWS, CHOSEN * LENGTH, -1)}


def test_the_pool_moves_and_the_model_does_not():
  shapes = {n: tree.get(TRAINABLE, n).shape for n in tree.names(TRAINABLE)}
  assert shapes == {
    f'{TABLE}.pool': (SIZE, LENGTH, 8),
    f'{TABLE}.pool_keys': (SIZE, 8),
    'head/kernel': (8, 3),
    'head/bias': (3,),
  }
  words = np.asarray(tree.get(PARAMS, TABLE))
  for row in np.asarray(tree.get(GROWN, f'{TABLE}.pool')).reshape(-1, 8):
    assert np.any(np.all(row == words, axis=-1))


def test_examples_pick_differently():
  picked, _ = by_hand()
  assert len({tuple(sorted(row)) for row in picked}) > 1
  assert set(picked.reshape(-1)) < set(range(SIZE))  # One is never picked.


def test_each_example_runs_with_the_prompts_nearest_to_its_query():
  found, _ = RUN(GROWN, {}, BATCH, None)
  expected = prompted.alone(picked_leaves())
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_the_papers_answer_is_the_mean_of_the_prompts_states():
  module = models.BertClassifier(prompted.CONFIG, 3, pooling='prompt')
  forward = models.forward(module)
  found, _ = jax.jit(prompts.l2p_forward(forward, QUERY, CHOSEN))(
    GROWN, {}, BATCH, None
  )
  states = models.forward(prompted.MODULE, method='hidden_states')
  last = jax.jit(lambda *args: (states(*args)[0][-1], {}))
  mean = prompted.alone(picked_leaves(), last)[:, : CHOSEN * LENGTH].mean(1)
  head = PARAMS['head']
  expected = mean @ np.asarray(head['kernel']) + np.asarray(head['bias'])
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
  with pytest.raises(UsageError, match='no prompt'):
    forward(PARAMS, {}, BATCH, None)


def test_the_loss_adds_the_distances_of_the_picked_keys():
  (loss, aux), _ = SLOPE(GROWN, {}, BATCH, prompted.KEY)
  picked, match = by_hand()
  distance = (1 - np.take_along_axis(match, picked, 1)).sum(1)
  plain = prompted.cross_entropy(
    prompted.alone(picked_leaves()), BATCH['label']
  )
  expected = np.mean(plain + STRENGTH * distance)
  np.testing.assert_allclose(loss, expected, rtol=1e-5)
  np.testing.assert_allclose(
    aux.metrics['matching'], distance.mean(), rtol=1e-5
  )
  assert aux.outputs.shape == (ROWS, 3)


def test_keys_move_by_the_distances_alone():
  _, grads = SLOPE(GROWN, {}, BATCH, prompted.KEY)
  keys = np.asarray(tree.get(GROWN, f'{TABLE}.pool_keys'), np.float64)
  expected = np.zeros_like(keys)
  for query, row in zip(ASKED, by_hand()[0], strict=True):
    for k in row:
      expected[k] -= STRENGTH / ROWS * prompted.slope_of_cosine(query, keys[k])
  np.testing.assert_allclose(
    tree.get(grads, f'{TABLE}.pool_keys'), expected, rtol=1e-5, atol=1e-7
  )


def test_only_picked_prompts_and_keys_get_a_gradient():
  _, grads = SLOPE(GROWN, {}, BATCH, prompted.KEY)
  used = np.isin(np.arange(SIZE), by_hand()[0])
  assert used.any() and not used.all()
  for suffix in ('.pool', '.pool_keys'):
    size = np.abs(tree.get(grads, TABLE + suffix)).reshape(SIZE, -1).max(1)
    np.testing.assert_array_equal(size > 0, used)


def test_the_order_and_size_of_a_batch_do_not_matter():
  found = np.asarray(RUN(GROWN, {}, BATCH, None)[0])
  order = np.array([2, 0, 3, 1])
  np.testing.assert_allclose(
    RUN(GROWN, {}, prompted.shuffled(BATCH, order), None)[0],
    found[order],
    rtol=1e-6,
    atol=1e-6,
  )
  half = prompted.shuffled(BATCH, order[:2])
  np.testing.assert_allclose(
    RUN(GROWN, {}, half, None)[0], found[order[:2]], rtol=1e-6, atol=1e-6
  )


def test_padding_stays_unseen():
  other = BATCH['input_ids'] + 3 * (1 - BATCH['attention_mask'])
  np.testing.assert_allclose(
    RUN(GROWN, {}, {**BATCH, 'input_ids': other}, None)[0],
    RUN(GROWN, {}, BATCH, None)[0],
    rtol=1e-6,
  )


def test_prompts_of_length_zero_are_the_frozen_model():
  none = prompts.l2p_tuning(size=SIZE, length=0, also=('head/.*',))
  params, _ = prompted.grown(none)
  np.testing.assert_array_equal(
    RUN(params, {}, BATCH, None)[0], prompted.RUN(PARAMS, {}, BATCH, None)[0]
  )


def test_a_given_query_is_the_computed_one_and_gets_no_gradient():
  run = jax.jit(prompts.l2p_forward(FORWARD, prompts.given_query, CHOSEN))
  batch = {**BATCH, 'query': ASKED.astype(np.float32)}
  np.testing.assert_allclose(
    run(GROWN, {}, batch, None)[0], RUN(GROWN, {}, BATCH, None)[0], rtol=1e-6
  )
  loss = prompts.l2p_loss(
    FORWARD,
    prompts.given_query,
    losses.softmax_cross_entropy,
    chosen=CHOSEN,
    strength=STRENGTH,
  )

  def of_query(query):
    return loss(GROWN, {}, {**BATCH, 'query': query}, None)[0]

  slope = jax.jit(jax.grad(of_query))(jnp.asarray(batch['query']))
  np.testing.assert_array_equal(slope, np.zeros_like(slope))


def test_a_row_without_tokens_changes_no_gradient():
  more = {key: np.concatenate([x, 0 * x[:1]]) for key, x in BATCH.items()}
  more['weight'] = np.array([1, 1, 1, 1, 0], np.float32)
  (loss, _), grads = SLOPE(GROWN, {}, more, prompted.KEY)
  (expected, _), slopes = SLOPE(GROWN, {}, BATCH, prompted.KEY)
  np.testing.assert_allclose(loss, expected, rtol=1e-6)
  for name in tree.names(TRAINABLE):
    slope, found = tree.get(slopes, name), tree.get(grads, name)
    np.testing.assert_allclose(found, slope, rtol=1e-5, atol=1e-6)


def test_l2p_is_a_learner():
  learner = finetune(LOSS, optim.sgd(1e-2), tuning=TUNING)
  testing.check_learner(learner, PARAMS, BATCH)


def test_l2p_is_a_learner_as_users_compile_it(as_users):
  learner = finetune(LOSS, optim.adam(1e-2), tuning=TUNING)
  # float32 sums of four rows in another order
  testing.check_learner(learner, PARAMS, BATCH, vmap_tolerance=1e-5)


def test_bad_requests_are_refused():
  with pytest.raises(UsageError, match='chosen=8 of a pool of 7'):
    prompts.l2p_forward(FORWARD, QUERY, 8)(GROWN, {}, BATCH, None)
  with pytest.raises(UsageError, match='pool of 0'):
    prompts.l2p_tuning(size=0, length=1)
  with pytest.raises(UsageError, match='no leaf `....pool`'):
    prompts.l2p_forward(FORWARD, QUERY, 1)(PARAMS, {}, BATCH, None)
  wide = prompts.l2p_tuning(size=2, length=1, query_size=9)
  with pytest.raises(UsageError, match='query of 8 numbers and keys of 9'):
    params, _ = prompted.grown(wide)
    prompts.l2p_forward(FORWARD, QUERY, 1)(params, {}, BATCH, None)
  with pytest.raises(UsageError, match="no 'query'"):
    run = prompts.l2p_forward(FORWARD, prompts.given_query, 1)
    run(GROWN, {}, BATCH, None)
  with pytest.raises(UsageError, match='one vector per row'):
    run = prompts.l2p_forward(FORWARD, prompts.given_query, 1)
    run(GROWN, {}, {**BATCH, 'query': np.zeros(4)}, None)


def test_a_model_without_a_place_for_prompts_is_refused():
  def deaf(params, model_state, batch, rng):
    return jnp.zeros((ROWS, 3)), model_state

  # Of another shape than any prompt that has entered a model.
  tuning = prompts.l2p_tuning(size=2, length=5, also=('head/.*',))
  params, _ = prompted.grown(tuning)
  with pytest.raises(UsageError, match='never entered the model'):
    prompts.l2p_forward(deaf, QUERY, 1)(params, {}, BATCH, None)
