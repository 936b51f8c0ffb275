"""Learned layer-wise rates at their small setting, through experiments.run."""

import dataclasses
import json
import math

import numpy as np
import pytest

from experiments import run as job
from experiments.finetune import (
  learned_rates,
  rate_policy,
  rate_report,
  rate_tasks,
)
from experiments.finetune.rate_rows import FEW, LEARNED, PROBE, without_slow
from fmeta.datasets import docparams
from fmeta.errors import UsageError
from fmeta.workdir import Context

ROWS = (PROBE, 'uniform', 'decay', LEARNED, FEW)


@pytest.fixture(scope='module')
def few_texts():
  """Six texts of each type in each split, three to a file."""
  words = 'array axis value number index size shape order mode name'.split()

  def columns(split):
    rows = [
      (f'{word} {i} {split}', label, f'{split}/{label}_{i // 3}.py')
      for label, word in enumerate(words)
      for i in range(6)
    ]
    text, label, file = zip(*rows, strict=True)
    return {
      'text': np.array(text, object),
      'label': np.array(label, np.int32),
      'file': np.array(file, object),
    }

  splits = {split: columns(split) for split in rate_tasks.SPLITS}
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(docparams, 'load', lambda subset: splits)
    yield


def flags(settings):
  return [
    f'--config.{key}='
    + (','.join(map(str, value)) if isinstance(value, tuple) else str(value))
    for key, value in settings.items()
  ]


@pytest.fixture(scope='module')
def finished(tmp_path_factory, tiny_bert, few_texts):
  folder = tmp_path_factory.mktemp('learned') / 'run'
  settings = {**learned_rates.SMALL, 'model': tiny_bert}
  argv = ['run', f'--config={learned_rates.__file__}', f'--workdir={folder}']
  assert job.main([*argv, *flags(settings)]) == 0
  return folder


def test_every_row_is_compared_with_uniform_and_decay(finished):
  result = json.loads((finished / 'result.json').read_text())
  numbers, ci95 = result['metrics'], result['ci95']
  assert all(math.isfinite(value) for value in numbers.values())
  for row in (rate_report.MEAN, *ROWS):
    assert 0 <= numbers[row] <= 1
    for other in {'uniform', 'decay'} - {row}:
      for unit in ('', ', by seed'):
        key = f'{row} minus {other}{unit}'
        gap = numbers[row] - numbers[other]
        np.testing.assert_allclose(numbers[key], gap, atol=1e-12)
        assert ci95[key][0] <= numbers[key] <= ci95[key][1]
  assert result['steps'] == learned_rates.SMALL['iterations']


def test_the_rates_are_handed_over_as_ordinary_lists(finished):
  written = json.loads((finished / 'rates.json').read_text())
  assert len(written['rates']) == learned_rates.SMALL['seeds']
  for rates in written['rates']:
    assert [name for name, _ in rates][-1] == 'head/.*'
    assert len(rates) == 5 and all(rate > 0 for _, rate in rates)
  # One step of Adam moves logarithms by at most its rate, from a start that
  # is the same for all seeds.
  start = learned_rates.Config()
  for _, rate in written['rates'][0][:-1]:
    moved = abs(math.log(rate / start.start_rate))
    assert moved <= 1.01 * start.outer_lr


def test_resuming_repeats_no_trial(finished, monkeypatch):
  def refuse(*args):
    raise AssertionError('a finished trial ran again')

  before = json.loads((finished / 'result.json').read_text())
  monkeypatch.setattr(rate_policy.Policy, 'learn', refuse)
  monkeypatch.setattr(rate_policy.Policy, 'correct', refuse)
  assert job.main(['run', f'--workdir={finished}', '--resume']) == 0
  after = json.loads((finished / 'result.json').read_text())
  assert after['metrics'] == before['metrics']


@pytest.fixture(scope='module')
def policy(tmp_path_factory, tiny_bert, few_texts):
  config = learned_rates.Config(**learned_rates.SMALL, model=str(tiny_bert))
  context = Context(tmp_path_factory.mktemp('policy'))
  return rate_policy.Policy(rate_tasks.Tasks(config, context))


def test_rates_go_from_input_to_output(policy):
  start = dict(policy.tasks.start)
  layers = {f'layer_{k}': start['body']['layer_1'] for k in (9, 10)}
  params = {'body': layers, 'head': start['head']}
  assert rate_policy.patterns_of(params, ('mlp/.*', '.*')) == (
    'body/layer_9/mlp/.*',
    'body/layer_9/.*',
    'body/layer_10/mlp/.*',
    'body/layer_10/.*',
    'head/.*',
  )
  with pytest.raises(UsageError, match="no parameter matches '.*/mpl/"):
    rate_policy.patterns_of(params, ('mpl/.*', '.*'))
  with pytest.raises(UsageError, match='no pattern gives'):
    rate_policy.patterns_of(params, ('mlp/.*',))


def test_decayed_rates_shrink_by_layer_and_not_by_part(policy, monkeypatch):
  config = dataclasses.replace(
    policy.tasks.config, blocks=3, parts=('mlp/.*', '.*')
  )
  monkeypatch.setattr(policy.tasks, 'config', config)
  np.testing.assert_allclose(
    policy.decayed(0.4, 0.5, 3.0), [0.1, 0.1, 0.2, 0.2, 0.4, 0.4, 3.0]
  )


def test_slow_parts_are_frozen_and_the_head_never(policy):
  rates = [('a', 1.0), ('b', 0.2), ('head/.*', 0.01)]
  assert without_slow(rates, 0.5) == [('a', 1.0), ('b', 0.0), ('head/.*', 0.01)]


def test_seeds_and_splits_have_tasks_of_their_own(policy):
  def support(split, seed):
    return policy.tasks.held_out(split, seed)[0]['support']['hidden']

  first = support('test', 0)
  assert np.array_equal(first, support('test', 0))
  assert not np.array_equal(first, support('test', 1))
  assert not np.array_equal(first, support('validation', 0))


def test_files_are_those_of_the_queries(policy):
  tasks, files = policy.tasks, policy.tasks.files(1)
  config = tasks.config
  shape = (config.test_episodes, config.ways * config.queries)
  assert files.shape == shape
  query = tasks.held_out('test', 1)[1]['query']['hidden'][0]
  held = tasks.columns['test']['hidden']
  for row, file in zip(query, files[1], strict=True):
    at = np.flatnonzero((held == row).all((1, 2)))
    assert file in tasks.texts['test']['file'][at]


@pytest.mark.parametrize(
  ('wrong', 'words'),
  [
    ({'decays': (0.5, 0.7)}, 'grids of unequal size'),
    ({'seeds': 0}, 'seeds=0; give at least 1'),
    ({'blocks': 0}, 'blocks=0; give at least 1'),
    ({'test_episodes': 0}, 'test_episodes=0; give at least 1'),
    ({'model': 'nowhere'}, "no model at 'nowhere'"),
    ({'start_rate': 0.0}, 'start_rate=0.0; give a positive'),
  ],
)
def test_bad_settings_are_one_line(tmp_path, capsys, wrong, words):
  argv = ['run', f'--config={learned_rates.__file__}']
  argv += [f'--workdir={tmp_path / "run"}']
  assert job.main([*argv, *flags({**learned_rates.SMALL, **wrong})]) == 2
  error = capsys.readouterr().err.strip()
  assert words in error and '\n' not in error
