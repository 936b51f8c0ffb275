"""The table of all intents at once: its one task, head and rows."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_experiments_intents import execute

from experiments.fewshot import all_intents, intent_methods, text_task
from fmeta import baselines
from fmeta.datasets import banking77, clinc150
from fmeta.workdir import Context

WORDS = 'card money bank pay cash fee loan rate limit code'.split()
SHOTS, TESTS = 5, 3


def columns(names, each):
  rows = [
    (f'{WORDS[(k + index) % 10]} {name} {k}', name)
    for index, name in enumerate(names)
    for k in range(each)
  ]
  return {
    'text': np.array([text for text, _ in rows], object),
    'intent': np.array([name for _, name in rows], object),
  }


@pytest.fixture
def folder(tmp_path, monkeypatch):
  """Seven intents with a file of five texts of each; nine to learn from."""
  names = [f'intent_{index}' for index in range(7)]
  splits = {'train': columns(names, 9), 'test': columns(names, TESTS)}
  others = {'train': columns([f'other_{k}' for k in range(9)], 14)}
  monkeypatch.setattr(banking77, 'load', lambda folder: splits)
  monkeypatch.setattr(clinc150, 'load', lambda folder: others)
  place = tmp_path / 'data' / 'banking77' / 'few_shot' / f'train_{SHOTS}'
  place.mkdir(parents=True)
  # Classes in turn, so that a text's place among its class is not its row.
  pairs = [(f'{name} {k}', name) for k in range(SHOTS) for name in names]
  (place / 'seq.in').write_text('\n'.join(text for text, _ in pairs) + '\n')
  (place / 'label').write_text('\n'.join(name for _, name in pairs) + '\n')
  return tmp_path / 'data'


@pytest.fixture
def bench(tmp_path, tiny_bert, folder):
  config = all_intents.Config(
    **{**all_intents.SMALL, 'model': str(tiny_bert), 'validation_folds': 2}
  )
  context = Context(tmp_path, data_dir=str(folder))
  return all_intents.Bench(config, context, all_intents.load(config, context))


def rows_of(bench, part):
  """Which texts a part of an episode holds, by their cached states."""
  known = {
    state.tobytes(): row for row, state in enumerate(bench.columns['hidden'])
  }
  return [known[state.tobytes()] for state in part['hidden'][0]]


def test_the_file_is_one_task_and_its_test_set_the_queries(bench):
  (task,) = bench.held_out('test')
  assert task['support']['label'].shape == (1, 7 * SHOTS)
  assert task['query']['label'].shape == (1, 7 * TESTS)
  for part, split in (('support', 'train'), ('query', 'test')):
    names = bench.names[bench.rows[split]]
    labels = [bench.label_of[name] for name in names]
    assert task[part]['label'][0].tolist() == labels
    np.testing.assert_array_equal(
      task[part]['hidden'][0], bench.columns['hidden'][bench.rows[split]]
    )


def test_each_validation_fold_holds_out_one_text_of_every_intent(bench):
  folds = bench.held_out('validation')
  assert len(folds) == 2
  held = []
  for task in folds:
    support, query = task['support'], task['query']
    assert sorted(query['label'][0]) == list(range(7))
    counts = np.bincount(support['label'][0])
    assert counts.tolist() == [SHOTS - 1] * 7
    rows = rows_of(bench, query)
    assert not set(rows) & set(rows_of(bench, support))
    assert set(rows) <= set(bench.rows['train'].tolist())
    held += rows
  assert len(set(held)) == 14


def test_meta_training_sees_the_other_data_set_only(bench):
  batch = bench.train_tasks(0, whole=False)(0)
  meta = bench.columns['hidden'][bench.rows['meta']]
  known = {state.tobytes() for state in meta}
  for part in batch.values():
    for state in part['hidden'].reshape(-1, *meta.shape[1:]):
      assert state.tobytes() in known
  assert all(name.startswith('clinc150: ') for name in bench.classes['train'])


def test_a_head_step_on_all_intents_is_that_of_an_episode(bench):
  # One step from a zero head moves W_k by rate / ways times (mean of class k
  # minus mean of all), so with rates in proportion the logits do not shrink.
  noise = np.random.default_rng(0).normal(size=bench.columns['hidden'].shape)
  bench.columns['hidden'] = noise.astype(np.float32)
  family = intent_methods.families_of(bench)['head']
  params = bench.for_test(family.start(0))
  assert params['model']['head']['kernel'].shape[-1] == 7
  rate = jnp.exp(params['hyper']['head']['kernel'])
  assert float(rate) == pytest.approx(bench.config.head_rate * 7 / 5)
  (task,) = bench.held_out('test')
  logits = np.asarray(family.predict(params, task))[0, 0]

  def vectors(part):
    found = bench.embed(bench.start, jax.tree.map(lambda x: x[0], task[part]))
    return np.asarray(baselines.unit_length(found))

  x, label = vectors('support'), task['support']['label'][0]
  means = np.stack([x[label == k].mean(0) for k in range(7)])
  weights = bench.config.head_rate / 5 * (means - means.mean(0))
  expected = vectors('query') @ weights.T
  np.testing.assert_allclose(
    logits - logits.mean(-1, keepdims=True),
    expected - expected.mean(-1, keepdims=True),
    # float32 sums of unit vectors times a weight of 6: 1e-5 absolute
    atol=1e-5,
  )


def test_rows_are_scored_text_by_text(tmp_path, tiny_bert, folder):
  small = {**all_intents.SMALL, 'model': tiny_bert}
  assert execute(all_intents, tmp_path / 'run', folder, **small) == 0
  result = json.loads((tmp_path / 'run' / 'result.json').read_text())
  numbers = result['metrics']
  trials = tmp_path / 'run' / 'trials' / 'banking77_all_5shot'
  rows = {path.stem: json.loads(path.read_text()) for path in trials.iterdir()}
  assert set(rows) == {'nearest class mean', *small['methods']}
  reference = np.array(rows['nearest class mean']['correct'])
  for name in small['methods']:
    correct, tried = rows[name]['correct'], rows[name]['tried']
    assert len(correct) == 7 * TESTS and set(correct) <= {0.0, 1.0}
    assert rows[name]['setting'] in tried and len(tried) == 2
    # Seven validation texts: shares of sevenths.
    assert all(math.isclose(7 * v, round(7 * v)) for v in tried.values())
    key = f'banking77_all_5shot/{name} minus nearest class mean'
    difference = np.mean(correct) - reference.mean()
    assert math.isclose(numbers[key], difference, abs_tol=1e-12)
  page = (tmp_path / 'run' / 'report.html').read_text()
  assert 'banking77, all intents, 5 texts of each' in page


def test_nearest_mean_is_that_of_the_whole_file(bench):
  noise = np.random.default_rng(1).normal(size=bench.columns['hidden'].shape)
  bench.columns['hidden'] = noise.astype(np.float32)
  (task,) = bench.held_out('test')

  def vectors(part):
    found = bench.embed(bench.start, jax.tree.map(lambda x: x[0], task[part]))
    return np.asarray(baselines.unit_length(found))

  x, label = vectors('support'), task['support']['label'][0]
  means = np.stack([x[label == k].mean(0) for k in range(7)])
  means /= np.linalg.norm(means, axis=-1, keepdims=True)
  expected = (vectors('query') @ means.T).argmax(-1) == task['query']['label'][
    0
  ]
  np.testing.assert_array_equal(text_task.nearest_mean(bench), expected)


@pytest.mark.parametrize(
  ('settings', 'words'),
  [
    ({'shots': 3}, '3 shots; there are files for 5 and 10'),
    (
      {'validation_folds': 6},
      '6 validation folds of 5 texts an intent; give 1',
    ),
    ({'methods': ('Proto-MAML',)}, 'Proto-MAML starts from a head of as many'),
    ({'folds': (1,)}, 'folds'),
  ],
)
def test_bad_settings_are_refused_in_one_line(
  settings, words, tmp_path, folder, capsys
):
  assert execute(all_intents, tmp_path / 'run', folder, **settings) == 2
  message = capsys.readouterr().err
  assert words in message and message.count('\n') == 1
