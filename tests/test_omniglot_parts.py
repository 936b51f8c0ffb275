"""Omniglot's splits, statistics, lists and kept weights."""

import importlib
import json
import re

import jax
import numpy as np
import pytest
from characters import drawn_characters
from test_experiments_fewshot import small
from test_query_leakage import method_of

import fmeta
from experiments.common import Seeds
from experiments.fewshot.omniglot import (
  maml,
  measure,
  splits,
  task,
  testing,
  weights,
)
from fmeta import compare, episodes, scores
from fmeta.errors import UsageError
from fmeta.models import Conv4, forward
from fmeta.workdir import Context


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


@pytest.mark.parametrize(
  ('facts', 'folder', 'words'),
  [
    ({'norm': 'group'}, 'anil', "trained with norm 'transductive', this run"),
    ({'data_sha256': 'b'}, 'anil', "trained with data_sha256 'a', this run"),
    ({}, 'maml', "trained with experiment 'fewshot/omniglot/anil', this run"),
    ({}, 'anil', "head/bias' is float32[5] there and float32[6] here"),
  ],
)
def test_weights_of_another_run_are_refused(facts, folder, words, tmp_path):
  given = {'data_sha256': 'a', 'norm': 'transductive'}
  for name in ('first', 'anil', 'maml'):
    (tmp_path / name).mkdir()
    kind = 'anil' if name == 'first' else name
    text = json.dumps({'experiment': f'fewshot/omniglot/{kind}'})
    (tmp_path / name / 'run.json').write_text(text)
  first = tmp_path / 'first'
  weights.save(first, task.start(maml.Config(filters=4), 5), given)
  like = task.start(maml.Config(filters=4, ways=6), 6)
  with pytest.raises(UsageError, match=re.escape(words)):
    weights.load(str(first), like, tmp_path / folder, {**given, **facts})


@pytest.mark.parametrize('name', ['maml', 'maml_plus_plus'])
def test_statistics_of_training_tasks_judge_queries_one_by_one(
  name, tmp_path, drawn
):
  module = importlib.import_module(f'experiments.fewshot.omniglot.{name}')
  config = module.Config(**module.SMALL, seed=Seeds())
  method = method_of(name, tmp_path)
  parts = splits.load(config, Context(tmp_path))
  source = task.training_episodes(config, method, parts['train'])
  predict = method.per_step(method.params, [source(0), source(1)])
  episode = testing.lists_of(config, parts).test[0]
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


def test_no_character_to_train_on_is_refused(tmp_path, drawn):
  config = maml.Config(train_characters=0, validation_characters=1)
  with pytest.raises(UsageError, match='0 characters to train and 1 to valid'):
    splits.load(config, Context(tmp_path))


@pytest.mark.parametrize(
  ('field', 'words'),
  [
    ({'test_queries': 20}, r'need 21: lower'),
    ({'curve_shots': (1, 19), 'test_queries': 2}, r'need 21: lower'),
    ({'curve_shots': (1, 1)}, r'curve_shots \(1, 1\); give different numbers'),
    ({'curve_shots': (0, 1)}, 'give different numbers from 1'),
    ({'test_episodes': 605}, '605 episodes do not divide'),
    ({'curve_episodes': 5, 'curve_shots': (1,)}, '5 episodes do not divide'),
  ],
)
def test_what_cannot_be_tested_is_refused_before_training(
  field, words, tmp_path, drawn
):
  config = maml.Config(**{**maml.SMALL, 'seed': Seeds(), **field})
  with pytest.raises(UsageError, match=words):
    maml.run(config, Context(tmp_path))
  assert not (tmp_path / 'fit').exists()


def test_alphabets_and_statistics_of_training_run_to_the_end(tmp_path, drawn):
  folder = tmp_path / 'run'
  settings = {'split': 'alphabets', 'statistics_batches': 1}
  result = small('omniglot/maml', folder, **settings)
  name = 'accuracy_per_step_statistics'
  mean = scores.load(folder)[name].mean.mean
  assert result['metrics'][name] == pytest.approx(mean)


def test_the_baseline_has_as_many_classes_as_there_are(tmp_path, drawn):
  # Whole alphabets are more characters than were asked for.
  small('omniglot/baseline_plus_plus', tmp_path / 'run', split='alphabets')
