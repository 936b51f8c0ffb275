"""Every Omniglot experiment at its small setting, through experiments.run."""

import importlib
import re

import jax
import numpy as np
import pytest
from test_experiments_fewshot import small

import fmeta
from experiments.common import Seeds
from experiments.fewshot.omniglot import (
  baseline_plus_plus,
  maml,
  measure,
  reptile,
  splits,
  task,
  weights,
)
from fmeta import compare, data, episodes, evaluate, scores, tree
from fmeta.datasets import omniglot
from fmeta.errors import UsageError
from fmeta.models import Conv4, forward
from fmeta.workdir import Context


def drawn_characters(num_classes=60, seed=0):
  """Omniglot's columns with noise around a picture per character."""
  rng = np.random.default_rng(seed)
  pictures = rng.random((num_classes, omniglot.SIDE, omniglot.SIDE, 1))
  label = np.repeat(np.arange(num_classes), 20)
  noise = 0.1 * rng.random((len(label), *pictures.shape[1:]))
  image = (0.9 * pictures[label] + noise).astype(np.float32)
  half = len(label) // 2
  label = label.astype(np.int32)
  columns = {'image': image, 'label': label, 'alphabet': label // 7}
  return {
    'background': data.take(columns, slice(0, half)),
    'evaluation': data.take(columns, slice(half, None)),
  }


@pytest.fixture
def drawn(monkeypatch):
  monkeypatch.setattr(omniglot, 'load', lambda folder: drawn_characters())


HEADS = 'protonet', 'matching', 'relation', 'r2d2', 'leo', 'pmf'
LOOPS = (
  *('maml', 'fomaml', 'reptile', 'anil', 'boil', 'imaml', 'meta_sgd'),
  *('maml_plus_plus', 'meta_curvature', 't_net', 'proto_maml'),
)


@pytest.mark.parametrize('name', [*LOOPS, *HEADS, 'baseline_plus_plus'])
def test_omniglot_runs_and_reports_three_accuracies(
  name, tmp_path, drawn, capsys
):
  result = small(f'omniglot/{name}', tmp_path / 'run')
  numbers = result['metrics']
  by_step = {key for key in numbers if '_after_' in key}
  assert set(numbers) - by_step == {
    'accuracy_transductive',
    'accuracy_support_statistics',
    'accuracy_transductive_shuffled_labels',
    *([] if name == 'relation' else ['calibration_error']),
    'episodes',
  }
  assert numbers.pop('episodes') == 20
  assert all(0 <= value <= 1 for value in numbers.values())
  assert set(result['ci95']) == set(numbers) - {'calibration_error'}
  shown = [x for x in capsys.readouterr().out.splitlines() if 'accuracy' in x]
  shown = [line for line in shown if not line.startswith('meta step')]
  assert len(shown) >= 5
  for line in shown:
    assert 'transductive' in line or 'support_statistics' in line
    assert 'episodes)' in line
  adapts = name not in HEADS
  assert bool(by_step) == adapts
  assert (tmp_path / 'run' / 'steps.png').exists() == adapts
  if name == 'maml':  # Tested after three steps.
    expected = numbers['accuracy_transductive']
    assert len(by_step) == 11
    found = numbers['accuracy_transductive_after_3']
    assert found == pytest.approx(expected, abs=0.005)
  assert (tmp_path / 'run' / 'fit' / 'metrics.jsonl').exists()
  kept = scores.load(tmp_path / 'run')
  means = {key: one.mean.mean for key, one in kept.items()}
  assert means == pytest.approx({key: numbers[key] for key in means})
  assert len(means) == 3 + len(by_step)


@pytest.mark.parametrize('name', ['maml', 'protonet'])
def test_group_norm_has_one_accuracy(name, tmp_path, drawn):
  result = small(f'omniglot/{name}', tmp_path / 'run', norm='group')
  by_step = {f'accuracy_group_after_{k}' for k in range(11)}
  assert set(result['metrics']) - by_step == {
    'accuracy_group',
    'accuracy_group_shuffled_labels',
    'calibration_error',
    'episodes',
  }


def test_accuracy_by_shots_uses_more_and_more_of_one_support(tmp_path, drawn):
  folder = tmp_path / 'run'
  result = small(
    'omniglot/protonet', folder, curve_shots=(3, 1), curve_episodes=30, shots=3
  )
  assert (folder / 'shots.png').read_bytes().startswith(b'\x89PNG')
  numbers, kept = result['metrics'], scores.load(folder)
  one, three = (kept[f'accuracy_transductive_{k}_shots'] for k in (1, 3))
  assert len(one.values) == len(three.values) == 30
  # As many shots as in the test: the same first episodes.
  tested = kept['accuracy_transductive']
  np.testing.assert_allclose(three.values[:20], tested.values)
  assert one.tested_on == three.tested_on != tested.tested_on
  assert set(result['ci95']) == {k for k in numbers if k.startswith('accuracy')}


def test_a_run_s_weights_are_tested_again_without_training(
  tmp_path, drawn, capsys
):
  first = small('omniglot/anil', tmp_path / 'first')
  kept = {'weights': tmp_path / 'first'}
  second = small('omniglot/anil', tmp_path / 'second', **kept)
  assert second['metrics'] == first['metrics'] and second['steps'] == 0
  assert not (tmp_path / 'second' / 'fit').exists()
  narrow = small(
    'omniglot/anil', tmp_path / 'third', precision='bfloat16', **kept
  )
  assert narrow['metrics'] != first['metrics']
  pair = [str(tmp_path / run) for run in ('first', 'third')]
  assert compare.main([*pair, '--rows=accuracy_transductive']) == 0
  assert 'accuracy_transductive' in capsys.readouterr().out
  like = task.start(maml.Config(filters=8, ways=6), 6)
  with pytest.raises(UsageError, match="head/bias' is float32\\[5\\] there"):
    weights.load(str(tmp_path / 'first'), like)


@pytest.mark.parametrize('name', ['maml', 'maml_plus_plus'])
def test_statistics_of_training_tasks_judge_queries_one_by_one(
  name, tmp_path, drawn
):
  module = importlib.import_module(f'experiments.fewshot.omniglot.{name}')
  config = module.Config(**{**module.SMALL, 'seed': Seeds(), 'filters': 4})
  seen = {}
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(task, 'run', lambda config, context, method: method)
    seen['method'] = module.run(config, Context(tmp_path))
  method = seen['method']
  parts = splits.load(config, Context(tmp_path))
  source = task.training_episodes(config, method, parts['train'])
  predict = method.per_step(method.params, [source(0), source(1)])
  (episode, *_) = task.held_out(config, parts['test'], 'test')
  other = jax.tree.map(np.array, episode)
  other['query']['image'][:, 1:] = 0.5
  run = jax.jit(predict)
  found, changed = (
    np.asarray(run(method.params, e, None)) for e in (episode, other)
  )
  np.testing.assert_array_equal(found[:, 0], changed[:, 0])
  assert np.abs(found[:, 1:] - changed[:, 1:]).max() > 1e-3
  # Other training tasks, other statistics.
  again = method.per_step(method.params, [source(2)])
  differs = np.asarray(jax.jit(again)(method.params, episode, None))
  assert np.abs(differs - found).max() > 1e-5


def test_statistics_without_inner_steps_are_those_of_the_support(drawn):
  config = maml.Config(filters=4)
  params = task.start(config, 5)
  loss = fmeta.supervised(task.model(config, 5), fmeta.softmax_cross_entropy)
  inner = maml.sgd_inner(config)(loss)
  columns = drawn_characters()['background']
  source = episodes.episodes(columns, 5, 1, 1, 0, tasks=1)
  by_training = measure.by_training(config, 5, inner, 0)
  found = by_training(params, [source(0)])(params, source(0), None)
  alone = measure.by_support(config, 5)
  query = jax.tree.map(lambda x: x[0], measure.with_support(source(0))['query'])
  expected = alone(params, {}, query, None)[0]
  # float32, the same sums in two programs
  np.testing.assert_allclose(found[0], expected, rtol=1e-5, atol=1e-5)


def test_nothing_is_compiled_after_the_second_validation(
  tmp_path, drawn, monkeypatch
):
  seen, marks = [], []
  jax.monitoring.register_event_duration_secs_listener(
    lambda event, seconds, **_: seen.append(event)
  )
  evaluate_episodes = evaluate.evaluate_episodes

  def counted(*args, **options):
    found = evaluate_episodes(*args, **options)
    marks.append(
      sum(event.endswith('backend_compile_duration') for event in seen)
    )
    return found

  monkeypatch.setattr(evaluate, 'evaluate_episodes', counted)
  small('omniglot/maml', tmp_path / 'run', iterations=10)
  # Five validations; what the first checkpoint compiles lies before the second.
  assert len(marks) == 5 and marks[0] > 0
  assert marks[1:] == [marks[1]] * 4


def test_the_baseline_refuses_what_only_episodes_have(tmp_path):
  for field in ({'resident': True}, {'chunk': 1}):
    config = baseline_plus_plus.Config(**field)
    with pytest.raises(UsageError, match='trains on no episodes'):
      baseline_plus_plus.run(config, Context(tmp_path))


@pytest.mark.parametrize(
  ('field', 'words'),
  [
    ({'ways': 20}, 'inner batches of 10 do not hold 20 classes evenly'),
    ({'final_lr': 0.1}, 'the outer rate of Reptile falls to 0'),
    ({'queries': 1}, 'no queries in training'),
  ],
)
def test_reptile_refuses_what_it_does_not_have(field, words, tmp_path):
  with pytest.raises(UsageError, match=words):
    reptile.run(reptile.Config(**field), Context(tmp_path))


def test_a_norm_that_cannot_be_trained_from_nothing_is_refused():
  with pytest.raises(UsageError, match="'frozen' is not trained here"):
    task.start(maml.Config(norm='frozen'), 5)


@pytest.mark.parametrize('name', ['maml', 'maml_plus_plus'])
def test_images_on_the_device_change_no_number(name, tmp_path, drawn):
  sent = small(f'omniglot/{name}', tmp_path / 'sent')
  kept = small(f'omniglot/{name}', tmp_path / 'kept', resident=True)
  assert sent['metrics'] == kept['metrics']
  logs = [tmp_path / run / 'fit' / 'metrics.jsonl' for run in ('sent', 'kept')]
  assert logs[0].read_text() == logs[1].read_text()


@pytest.mark.parametrize('name', LOOPS)
def test_a_meta_step_moves_what_the_method_learns(name, tmp_path, drawn):
  module = importlib.import_module(f'experiments.fewshot.omniglot.{name}')
  config = module.Config(**module.SMALL, seed=Seeds())
  seen = {}

  def keep(config, context, method):
    parts = splits.load(config, context)
    source = method.source(
      task.training_episodes(config, method, parts['train'])
    )
    state = method.learner.init(method.params, jax.random.key(0))
    step = jax.jit(method.learner.step)
    after, _ = step(state, source(0), jax.random.key(1))
    seen['moved'] = {
      leaf: bool((tree.get(after.trainable, leaf) != value).any())
      for leaf, value in zip(
        tree.names(state.trainable),
        jax.tree.leaves(state.trainable),
        strict=True,
      )
    }

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(task, 'run', keep)
    module.run(config, Context(tmp_path))
  still = {leaf for leaf, moved in seen['moved'].items() if not moved}
  # A norm takes a bias away, so its rate does nothing; MAML++'s norms follow
  # offsets.
  dead = re.compile(r'hyper/.*(conv/bias|norm/(scale|bias))')
  assert not {leaf for leaf in still if not dead.fullmatch(leaf)}


def test_judging_alone_does_not_depend_on_the_other_queries(drawn):
  config = maml.Config(filters=4)
  transductive = forward(Conv4(5, 4), ('image',))
  images = drawn_characters()['background']['image']
  params = task.start(config, 5)
  alone = measure.by_support(config, 5)

  def logits(how, rows):
    batch = {'image': images[rows], 'support_image': images[100:105]}
    run = jax.jit(lambda params, batch: how(params, {}, batch, None)[0])
    return np.asarray(run(params, batch))[0]

  together, single = logits(alone, [0, 30, 60]), logits(alone, [0])
  np.testing.assert_allclose(together, single, rtol=1e-5, atol=1e-6)
  together, single = (logits(transductive, r) for r in ([0, 30, 60], [0]))
  assert np.abs(together - single).max() > 1e-3


def test_characters_of_the_three_splits_are_disjoint(tmp_path, drawn):
  config = maml.Config(**maml.SMALL)
  parts = splits.load(config, Context(tmp_path))
  upright, validation, test = (
    set(parts[name]['label'][:600].tolist())  # the first turn comes first
    for name in ('train', 'validation', 'test')
  )
  assert len(upright) == 30 and upright | validation | test == set(range(60))
  assert not upright & validation and not validation & test
  assert len(parts['train']['label']) == 4 * 30 * 20
  assert len(np.unique(parts['train']['label'])) == 4 * 30
  # Nor does a turned image of one be trained on.
  seen = {image.tobytes() for image in parts['train']['image']}
  for image in np.concatenate(
    [parts[n]['image'] for n in ('validation', 'test')]
  ):
    turns = [np.rot90(image, turn) for turn in range(4)]
    assert not seen & {turn.tobytes() for turn in turns}


def test_alphabets_are_split_whole(tmp_path, drawn):
  config = maml.Config(**maml.SMALL, split='alphabets', split_seed=3)
  parts = splits.load(config, Context(tmp_path))
  train = parts['train']['label']
  # Nine alphabets of seven characters, the last of four (see `drawn`).
  groups = [
    {label // 7 for label in labels.tolist()}
    for labels in (
      train[: len(train) // 4],
      parts['validation']['label'],
      parts['test']['label'],
    )
  ]
  sizes = [{k: 7 for k in range(8)} | {8: 4}][0]
  assert sorted(sum(map(sorted, groups), [])) == list(range(9))
  counts = [sum(sizes[k] for k in group) for group in groups]
  assert sum(counts) == 60
  # The fewest alphabets that have as many characters as were asked for.
  assert 30 <= counts[0] < 37 and 10 <= counts[1] < 17
  for part in parts.values():
    assert set(part) == {'image', 'label'}


def test_an_unknown_split_is_refused(tmp_path, drawn):
  config = maml.Config(**maml.SMALL, split='lake')
  with pytest.raises(UsageError, match="no split 'lake'; choose one of"):
    splits.load(config, Context(tmp_path))


def test_too_many_characters_are_refused_in_one_line(tmp_path, drawn):
  config = maml.Config(train_characters=58, validation_characters=1)
  with pytest.raises(UsageError, match='leave 1 of 60 to test on'):
    splits.load(config, Context(tmp_path))
