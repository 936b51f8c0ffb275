import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmeta import evaluate, metrics
from fmeta.errors import UsageError

CLASSES = 3


def _linear(traces=None):
  def forward(params, model_state, batch, rng):
    if traces is not None:
      traces.append(batch['x'].shape)
    assert rng is None
    return batch['x'] @ params['kernel'] + model_state['shift'], model_state

  return forward


def _problem(n=10, batch_size=4):
  rng = np.random.default_rng(0)
  x = rng.normal(size=(n, 5)).astype(np.float32)
  label = rng.integers(0, CLASSES, n).astype(np.int32)
  kernel = rng.normal(size=(5, CLASSES)).astype(np.float32)
  batches = []
  for start in range(0, n, batch_size):
    rows = np.arange(start, start + batch_size)
    batches.append(
      {
        'x': x[rows % n],
        'label': label[rows % n],
        'weight': (rows < n).astype(np.float32),
      }
    )
  return x, label, {'kernel': kernel}, {'shift': np.float32(0)}, batches


def test_padding_rows_are_dropped_and_order_is_kept():
  x, label, params, model_state, batches = _problem()
  found = evaluate.evaluate(_linear(), params, model_state, batches)
  assert found.logits.shape == (10, CLASSES)
  np.testing.assert_array_equal(found.labels, label)
  np.testing.assert_allclose(found.logits, x @ params['kernel'], rtol=1e-5)
  assert found.accuracy == np.mean((x @ params['kernel']).argmax(1) == label)
  np.testing.assert_array_equal(found.correct, found.classes == label)


def test_batches_without_weight_count_fully():
  _, _, params, model_state, batches = _problem(n=8)
  bare = [{k: b[k] for k in ('x', 'label')} for b in batches]
  with_weight = evaluate.accuracy_of(_linear(), params, model_state, batches)
  assert (
    evaluate.accuracy_of(_linear(), params, model_state, bare) == with_weight
  )


def test_one_trace_serves_all_batches_calls_and_parameters():
  _, _, params, model_state, batches = _problem()
  traces = []
  forward = _linear(traces)
  first = evaluate.evaluate(forward, params, model_state, batches)
  other = jax.tree.map(lambda leaf: -leaf, params)
  second = evaluate.evaluate(forward, other, model_state, batches)
  assert traces == [(4, 5)]
  # Were the parameters baked in, the second call would repeat the first.
  np.testing.assert_allclose(second.logits, -first.logits, rtol=1e-6)


def test_parameters_are_arguments_of_the_compiled_program():
  _, _, params, model_state, batches = _problem()
  lowered = evaluate._outputs.lower(_linear(), params, model_state, batches[0])
  # x [4, 5] and kernel [5, 3] both enter; neither is a dense constant.
  text = lowered.as_text()
  assert 'tensor<5x3xf32>' in text.split('->')[0]
  assert 'stablehlo.constant dense<"0x' not in text


def test_put_places_the_batch_on_a_mesh():
  _, _, params, model_state, batches = _problem(n=16, batch_size=8)
  mesh = jax.make_mesh(
    (8,), ('data',), axis_types=(jax.sharding.AxisType.Auto,)
  )
  sharding = jax.sharding.NamedSharding(mesh, jax.P('data'))
  seen = []

  def put(batch):
    placed = jax.device_put(batch, sharding)
    seen.append(len(placed['x'].sharding.device_set))
    return placed

  alone = evaluate.evaluate(_linear(), params, model_state, batches)
  spread = evaluate.evaluate(_linear(), params, model_state, batches, put=put)
  assert seen == [8, 8]
  np.testing.assert_allclose(spread.logits, alone.logits, rtol=1e-5)
  np.testing.assert_array_equal(spread.labels, alone.labels)


def test_probabilities_are_a_stable_softmax():
  found = evaluate.Predictions(
    np.array([[1000.0, 1000.0], [0.0, np.log(3)]]), np.array([0, 1])
  )
  np.testing.assert_allclose(
    found.probabilities, [[0.5, 0.5], [0.25, 0.75]], rtol=1e-12
  )


def test_nothing_to_evaluate_is_an_error():
  _, _, params, model_state, batches = _problem()
  empty = [dict(batches[0], weight=np.zeros(4, np.float32))]
  for nothing in ([], empty):
    with pytest.raises(UsageError, match='no examples to evaluate'):
      evaluate.evaluate(_linear(), params, model_state, nothing)


def test_outputs_that_are_not_logits_are_an_error():
  _, _, params, model_state, batches = _problem()
  scalar = lambda params, state, batch, rng: (batch['x'].sum(), state)
  with pytest.raises(UsageError, match=r'logits \[batch, classes\]'):
    evaluate.evaluate(scalar, params, model_state, batches)


def _episodes(tasks, ways=4, queries=6):
  def at(index):
    rng = np.random.default_rng(index)
    label = rng.integers(0, ways, (tasks, queries)).astype(np.int32)
    shown = np.where(rng.random((tasks, queries)) < 0.5, label, 0)
    batch = {'label': label, 'shown': shown.astype(np.int32)}
    return {'support': batch, 'query': batch}

  return at


def _read_answer(params, episode, rng):
  del rng
  return params * jax.nn.one_hot(episode['query']['shown'], 4)


def test_episode_accuracies_are_per_episode_and_cut_to_num():
  found = evaluate.evaluate_episodes(
    _read_answer, jnp.float32(1), _episodes(tasks=4), num=10
  )
  expected = []
  for index in range(3):
    query = _episodes(tasks=4)(index)['query']
    expected.extend((query['shown'] == query['label']).mean(1))
  np.testing.assert_allclose(found, expected[:10], rtol=1e-12)


def test_episode_prediction_is_traced_once():
  traces = []

  def predict(params, episode, rng):
    traces.append(1)
    return _read_answer(params, episode, rng)

  for scale in (1.0, 2.0):
    evaluate.evaluate_episodes(
      predict, jnp.float32(scale), _episodes(tasks=2), num=6
    )
  assert len(traces) == 1


def test_every_episode_batch_gets_its_own_key():
  def guess(params, episode, rng):
    shape = (*episode['query']['label'].shape, 4)
    return params * jax.random.normal(rng, shape)

  fixed = {'label': np.zeros((2, 50), np.int32)}
  run = lambda seed: evaluate.evaluate_episodes(
    guess,
    jnp.float32(1),
    lambda index: {'support': fixed, 'query': fixed},
    num=8,
    rng=jax.random.key(seed),
  )
  first = run(0)
  assert len(set(first[::2])) > 1
  np.testing.assert_array_equal(first, run(0))
  assert not np.array_equal(first, run(1))


def test_wrong_episode_shapes_and_counts_are_named():
  flat = lambda params, episode, rng: jnp.zeros((2, 4))
  with pytest.raises(UsageError, match=r'\(2, 4\) for query labels \(2, 6\)'):
    evaluate.evaluate_episodes(flat, (), _episodes(tasks=2), num=2)
  with pytest.raises(UsageError, match='num=0'):
    evaluate.evaluate_episodes(_read_answer, (), _episodes(tasks=2), num=0)


def test_summary_carries_both_ends_of_the_interval():
  values = np.array([0.2, 0.4, 0.6, 0.8])
  found = evaluate.summarize(values)
  mean, half = metrics.mean_ci95(values)
  assert found == (mean, (mean - half, mean + half), 4)
