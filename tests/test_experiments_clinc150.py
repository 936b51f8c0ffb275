"""The stream of intents, small, on texts made here."""

import json

import numpy as np
import pytest

from experiments import run as job
from experiments.continual import bench, clinc150, measured
from fmeta import stream
from fmeta.datasets import clinc150 as dataset

WORDS = 'value of the axis to use for an array number or name'.split()


def texts(count, seed):
  rng = np.random.default_rng(seed)
  label = np.repeat(np.arange(150, dtype=np.int32), count)
  words = [
    ' '.join([WORDS[k % len(WORDS)], WORDS[k // len(WORDS) % len(WORDS)]])
    + ' '
    + ' '.join(rng.choice(WORDS, 2))
    for k in label
  ]
  domain = np.array([f'domain {k // 15}' for k in label], object)
  return {'text': np.array(words, object), 'label': label, 'domain': domain}


@pytest.fixture(autouse=True)
def data(monkeypatch):
  splits = {'train': texts(3, 0), 'test': texts(2, 1)}
  monkeypatch.setattr(dataset, 'load', lambda data_dir: splits)


def execute(workdir, **settings):
  argv = ['run', f'--config={clinc150.__file__}', f'--workdir={workdir}']
  for name, value in {**clinc150.SMALL, **settings}.items():
    value = ','.join(map(str, value)) if isinstance(value, tuple) else value
    argv.append(f'--config.{name}={value}')
  assert job.main(argv) == 0
  return json.loads((workdir / 'result.json').read_text())


@pytest.mark.parametrize('groups', ['domains', 'random'])
def test_frozen_and_trained_rows_share_a_table(
  tmp_path, tiny_bert, groups, capsys
):
  result = execute(tmp_path / 'run', model=tiny_bert, groups=groups)
  assert {'nearest_mean', 'slda', 'ranpac', 'none', 'er'} <= set(
    result['metrics']
  )
  first, second = (
    json.loads(
      (tmp_path / f'run/trials/class/nearest_mean/seed_{k}.json').read_text()
    )
    for k in range(2)
  )
  # Another order of tasks, the same last answers: the sums are the same.
  assert first['matrix'] != second['matrix']
  assert first['correct'] == second['correct']
  if groups == 'domains':
    assert sorted(first['tasks']) == [f'domain {k}' for k in range(10)]
    assert first['tasks'] != second['tasks']
  # A block of two and the head move, the table of words does not.
  assert result['trainable_parameters'] < result['total_parameters'] / 10
  # As many remembered rows as new ones cost as much again; LoRA forms no
  # full-size weight gradient.
  spent = [result['metrics'][f'{k} compute'] for k in ('none', 'er')]
  assert 1.5 < spent[1] / spent[0] < 2.1
  assert result['metrics']['none@lora compute'] == 1
  low, high = result['ci95']['none minus nearest mean, frozen']
  assert low < result['metrics']['none minus nearest mean, frozen'] < high
  assert 'intervals over test rows' in ' '.join(capsys.readouterr().out.split())


def test_rows_without_a_gradient_may_stand_alone(tmp_path, tiny_bert, capsys):
  result = execute(
    tmp_path / 'run', model=tiny_bert, methods=(), frozen=('slda', 'ranpac')
  )
  assert {'slda', 'ranpac'} <= set(result['metrics'])
  assert result['steps'] is None
  assert 'iterations' not in capsys.readouterr().out
  assert (tmp_path / 'run/clinc150.png').exists()


def test_rows_without_a_gradient_know_the_task_where_the_others_do(
  tmp_path, tiny_bert
):
  right = {}
  for scenario in ('task', 'class'):
    folder = tmp_path / scenario
    execute(
      folder,
      model=tiny_bert,
      scenario=scenario,
      frozen=('nearest_mean',),
      methods=('none',),
      seeds=1,
    )
    path = folder / f'trials/{scenario}/nearest_mean/seed_0.json'
    right[scenario] = np.array(json.loads(path.read_text())['correct'])
  # Fewer answers are possible, so none that was right becomes wrong.
  assert (right['task'] >= right['class']).all()
  assert right['task'].sum() > right['class'].sum()


def test_answers_are_listed_by_class_whatever_the_order_of_tasks():
  columns = {'label': np.array([0, 1, 2, 0, 1, 2]), 'right': np.arange(6) % 2}
  listed = []
  for groups in ([[0], [1, 2]], [[2, 1], [0]]):
    tasks = stream.by_classes(columns, groups)
    correct = [task.columns['right'] for task in tasks]
    listed.append(bench.by_label(tasks, correct))
  assert listed[0] == listed[1] == [False, True, True, False, False, True]


def test_rows_of_different_answers_are_compared_over_seeds():
  def made(*finals):
    runs = [{'matrix': [[x]], 'seconds': 1.0} for x in finals]
    return measured.Measured(None, 0.0, runs)

  found = measured.difference_of(made(0.5, 0.7, 0.9), made(0.4, 0.5, 0.6))
  assert found.mean == pytest.approx(0.2)
  # t(2) = 4.303 times the standard error .1 / sqrt(3).
  assert found.ci95[1] - found.mean == pytest.approx(
    4.3027 * 0.1 / 3**0.5, rel=1e-4
  )
  assert measured.difference_of(made(0.5), made(0.4)) is None


@pytest.mark.parametrize(
  ('flag', 'said'),
  [
    ('--config.groups=domain', "groups 'domain'"),
    ('--config.max_length=20', 'max_length 20'),
    ('--config.frozen=sdla', "no frozen row 'sdla'"),
    ('--config.methods=none,ewk', "no method 'ewk'"),
    ('--config.blocks=0', 'config.blocks is 0'),
    ('--config.random_features=0', 'config.random_features is 0'),
  ],
)
def test_misuse_is_one_line(tmp_path, capsys, flag, said):
  argv = ['run', f'--config={clinc150.__file__}', f'--workdir={tmp_path}/run']
  assert job.main([*argv, flag]) == 2
  error = capsys.readouterr().err
  assert error.count('\n') == 1 and said in error


def test_more_blocks_than_layers_are_refused(tmp_path, tiny_bert, capsys):
  argv = ['run', f'--config={clinc150.__file__}', f'--workdir={tmp_path}/run']
  argv += [f'--config.model={tiny_bert}', '--config.blocks=3']
  assert job.main(argv) == 2
  assert 'the model has 2 layers' in capsys.readouterr().err
