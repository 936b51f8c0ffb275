"""OML on streams of characters, small, through the job machinery."""

import jax
import numpy as np
import pytest
from characters import drawn_characters
from test_experiments_continual import execute

import fmeta
from experiments.continual import omniglot_oml, online_streams
from fmeta import baselines, data, optim, scores
from fmeta.errors import UsageError
from fmeta.workdir import Context


def small(**more):
  return omniglot_oml.Config(**{**omniglot_oml.SMALL, **more})


@pytest.fixture(scope='module')
def columns():
  return online_streams.numbered(drawn_characters()['background'])


def test_every_body_is_tested_in_both_orders(
  tmp_path, drawn, capsys, monkeypatch
):
  made = omniglot_oml.Bench.bodies
  seen = {}

  def bodies(bench):
    seen['bench'], seen['bodies'] = bench, made(bench)
    return seen['bodies']

  monkeypatch.setattr(omniglot_oml.Bench, 'bodies', bodies)
  result = execute(omniglot_oml, tmp_path / 'run')
  every = result['metrics']
  numbers = {k: v for k, v in every.items() if 'validation' not in k}
  rates = [k for k in every if k.startswith('OML, shuffled, 5, validation')]
  assert [key.rpartition(' ')[2] for key in rates] == ['0.01', '0.1']
  ways = [*omniglot_oml.ORDERS, omniglot_oml.MEAN]
  assert set(numbers) == {
    f'{body}, {way}, {n}'
    for body in omniglot_oml.BODIES
    for way in ways
    for n in omniglot_oml.SMALL['classes']
  }
  assert all(0 <= value <= 1 for value in every.values())
  kept = scores.load(tmp_path / 'run')
  for key, value in numbers.items():
    assert len(kept[key].values) == 10
    assert kept[key].mean.mean == pytest.approx(value)
    low, high = result['ci95'][key]
    assert low <= value <= high
  assert (tmp_path / 'run' / 'classes.png').read_bytes()[1:4] == b'PNG'
  shown = capsys.readouterr().out
  assert '5 classes one by one, OML minus pre-trained longer: ' in shown
  assert len(result['data_sha256']) == 64
  # Training has moved every body, and each elsewhere.
  leaves = [jax.tree.leaves(p['body']) for p in seen['bodies'].values()]
  for k, first in enumerate(leaves):
    for other in leaves[k + 1 :]:
      pairs = zip(first, other, strict=True)
      assert any((a != b).any() for a, b in pairs)
  # As many images by classification as OML has seen, rounded up.
  images = 2 * (2 * 3 + 4)
  assert seen['bench'].fits['pre-trained longer'].steps == -(-images // 8)


def test_a_training_stream_is_one_class_after_the_other(columns):
  source = online_streams.TrainingStreams(columns, 2, 3, 5, 2, seed=1)
  batch = source(4)
  label = batch['support']['label']
  assert batch['support']['image'].shape == (2, 6, 28, 28, 1)
  assert batch['query']['label'].shape == (2, 11)
  for task in range(2):
    assert (label[task] == np.repeat(label[task, ::3], 3)).all()
    assert len(set(label[task])) == 2
    images = batch['support']['image'][task].reshape(6, -1)
    assert len(np.unique(images, axis=0)) == 6
    # The query begins with the stream.
    for key in ('label', 'image'):
      np.testing.assert_array_equal(
        batch['query'][key][task, :6], batch['support'][key][task]
      )
  # Rows and labels belong together.
  for image, one in zip(
    batch['query']['image'][0], batch['query']['label'][0], strict=True
  ):
    (at,) = np.flatnonzero((columns['image'] == image).all((1, 2, 3)))
    assert columns['label'][at] == one
  again = source(4)['query']['label']
  np.testing.assert_array_equal(again, batch['query']['label'])
  assert (source(5)['query']['label'] != batch['query']['label']).any()


def test_a_meta_batch_is_a_cut_of_one_list_of_streams(columns):
  pair = online_streams.TrainingStreams(columns, 2, 3, 5, 2, seed=1)(1)
  single = online_streams.TrainingStreams(columns, 2, 3, 5, 1, seed=1)
  for task in range(2):
    np.testing.assert_array_equal(
      pair['query']['label'][task], single(2 + task)['query']['label'][0]
    )


def test_a_test_stream_asks_for_other_drawings_of_its_classes(columns):
  make = lambda n, **how: online_streams.test_streams(
    columns, n, 4, 3, 10, 0, **how
  )
  trials = make(6)
  support, query = trials
  assert support['row'].shape == (10, 24) and query['row'].shape == (10, 18)
  for k in range(10):
    assert not set(support['row'][k]) & set(query['row'][k])
    known = columns['label'][support['row'][k]]
    asked = columns['label'][query['row'][k]]
    assert len(set(known)) == 6
    name = dict(zip(support['label'][k], known, strict=True))
    assert [name[label] for label in query['label'][k]] == list(asked)
    assert (np.diff(support['label'][k]) >= 0).all()
  assert len({tuple(row) for row in support['row']}) == 10
  # Fewer classes are the first of them; shuffled, the same rows elsewhere.
  np.testing.assert_array_equal(make(2).support['row'], support['row'][:, :8])
  mixed = make(6, shuffled=True)
  assert (mixed.support['row'] != support['row']).any(1).all()
  for part in ('row', 'label'):
    np.testing.assert_array_equal(
      np.sort(mixed.support[part]), np.sort(support[part])
    )
  np.testing.assert_array_equal(mixed.query['row'], query['row'])


def test_too_few_characters_or_drawings_are_one_line(tmp_path, drawn):
  with pytest.raises(UsageError, match='11 classes of 2 . 2 drawings; there'):
    omniglot_oml.run(small(classes=(11,)), Context(tmp_path))
  with pytest.raises(UsageError, match='2 classes of 19 . 2 drawings'):
    omniglot_oml.run(small(classes=(2,), shots=19), Context(tmp_path))


@pytest.mark.parametrize(
  ('changes', 'said'),
  [
    ({'rates': ()}, 'config.rates is empty'),
    ({'classes': ()}, 'config.classes is empty'),
    ({'classes': (5, 0)}, r'config.classes is \(5, 0\)'),
    ({'draws': 0}, 'config.draws is 0'),
    ({'remember': -1}, 'config.remember is -1'),
    ({'meta_iterations': 0}, 'config.meta_iterations is 0'),
    ({'inner_lr': 0.0}, 'config.inner_lr is 0.0'),
  ],
)
def test_sizes_that_mean_nothing_are_one_line(tmp_path, changes, said):
  with pytest.raises(UsageError, match=said):
    omniglot_oml.run(small(**changes), Context(tmp_path))


def test_online_accuracy_is_a_loop_of_steps(columns):
  trials = online_streams.test_streams(columns, 3, 2, 2, 2, 0)
  random = np.random.default_rng(0)
  known = columns['image'].reshape(len(columns['label']), -1)
  known = (known @ random.normal(size=(784, 12)) / 28).astype(np.float32)
  found = online_streams.online_accuracy(trials, known, 0.1)
  learner = fmeta.finetune(online_streams.HEAD_LOSS, optim.sgd(0.1))
  step = jax.jit(learner.step)
  for k in range(2):
    head = {'kernel': np.zeros((12, 3)), 'bias': np.zeros(3)}
    head = jax.tree.map(lambda x: jax.numpy.asarray(x, 'float32'), head)
    state = learner.init({'head': head}, jax.random.key(0))
    for row, label in zip(
      trials.support['row'][k], trials.support['label'][k], strict=True
    ):
      batch = {'x': known[row][None], 'label': np.array([label])}
      state, _ = step(state, batch, jax.random.key(0))
    head = jax.tree.map(np.asarray, state.trainable['head'])
    logits = known[trials.query['row'][k]] @ head['kernel'] + head['bias']
    right = np.asarray(logits).argmax(-1) == trials.query['label'][k]
    assert found[k] == pytest.approx(right.mean())
  near = online_streams.nearest_mean_accuracy(trials, known)
  for k in range(2):
    part = [getattr(trials, name) for name in ('support', 'query')]
    scored = baselines.nearest_mean_cosine(
      known[part[0]['row'][k]], part[0]['label'][k], known[part[1]['row'][k]], 3
    )
    right = np.asarray(scored).argmax(-1) == part[1]['label'][k]
    assert near[k] == pytest.approx(right.mean())


def test_features_are_of_every_image_in_order(columns):
  encoder = online_streams.Encoder(8, 16)
  part = data.take(columns, slice(0, 7))
  body = encoder.init(jax.random.key(0), part['image'])['params']
  found = online_streams.features(
    online_streams.embedding(encoder), {'body': body}, part
  )
  expected = encoder.apply({'params': body}, part['image'])
  assert found.shape == (7, 16) and found.any()
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
