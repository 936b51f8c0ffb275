"""Few-shot experiments at their small setting, through experiments.run."""

import dataclasses
import importlib
import json
import math

import jax
import numpy as np
import pytest

from experiments import run
from experiments.fewshot import docparams_maml, names, sinusoid_maml
from fmeta import scores
from fmeta.datasets import docparams
from fmeta.errors import UsageError
from fmeta.result import OUTCOME
from fmeta.workdir import Context


def text(value):
  return ','.join(map(str, value)) if isinstance(value, tuple) else str(value)


def small(name, folder, **more):
  """Runs an experiment's small setting; its `result.json`."""
  dotted = name.replace('/', '.')
  module = importlib.import_module(f'experiments.fewshot.{dotted}')
  settings = {**module.SMALL, **more}
  words = [f'--config.{key}={text(value)}' for key, value in settings.items()]
  status = run.main(
    [
      'run',
      f'--config=experiments/fewshot/{name}.py',
      f'--workdir={folder}',
      *words,
    ]
  )
  assert status == 0
  result = json.loads((folder / 'result.json').read_text())
  assert result['experiment'] == f'fewshot/{name}'
  assert all(math.isfinite(value) for value in result['metrics'].values())
  assert set(OUTCOME) - {'scores'} <= set(result)
  assert len(result['data_sha256']) == 64
  return result


@pytest.mark.parametrize('name', ['sinusoid_maml', 'sinusoid_cavia'])
def test_sinusoids_run_and_report_an_error_per_number_of_steps(name, tmp_path):
  result = small(name, tmp_path / 'run')
  assert set(result['metrics']) == {'mse_0', 'mse_1'}
  assert result['steps'] == sinusoid_maml.SMALL['iterations']
  kept = scores.load(tmp_path / 'run')
  for key, value in result['metrics'].items():
    assert kept[key].mean.mean == pytest.approx(value)
  low, high = result['ci95']['mse_0']
  assert low < result['metrics']['mse_0'] < high


def test_sinusoid_tasks_have_the_stated_amplitude_and_phase():
  tasks = sinusoid_maml.sinusoids(3, 50, 10, 10)(7)
  x = np.concatenate([tasks[part]['x'] for part in tasks], 1)[..., 0]
  y = np.concatenate([tasks[part]['target'] for part in tasks], 1)[..., 0]
  assert np.abs(x).max() <= 5 and x.min() < -4 and x.max() > 4
  for points, targets in zip(x, y, strict=True):
    basis = np.stack([np.sin(points), -np.cos(points)], 1)
    (real, imaginary), residual, *_ = np.linalg.lstsq(basis, targets)
    assert residual.sum() < 1e-8
    assert 0.1 <= np.hypot(real, imaginary) <= 5
    assert imaginary >= -1e-4  # sin of a phase in [0, pi]


@pytest.fixture
def few_texts(monkeypatch):
  """Names of 25 texts each; as many names as the splits need."""
  words = 'array axis value number index size shape order mode name'.split()
  classes = [f'p{index}' for index in range(60)]
  rows = [(n, f'{words[i % 10]} {i} {n}') for n in classes for i in range(25)]
  columns = {
    'name': np.array([name for name, _ in rows], object),
    'text': np.array([text for _, text in rows], object),
  }
  monkeypatch.setattr(docparams, 'load', lambda subset: {'train': columns})


def test_docparams_maml_runs_every_kind_of_row(tmp_path, tiny_bert, few_texts):
  folder = tmp_path / 'run'
  result = small('docparams_maml', folder, model=tiny_bert)
  methods = docparams_maml.SMALL['methods']
  for name in (docparams_maml.REFERENCE, *methods):
    assert 0 <= result['metrics'][f'fewshot/{name}'] <= 1
    assert f'fewshot/{name}' in result['ci95']
  assert (folder / 'panel_b.png').read_bytes().startswith(b'\x89PNG')
  for name in methods:
    path = folder / 'trials' / 'fewshot' / name / 'seed_0.json'
    trial = json.loads(path.read_text())
    assert len(trial['tried']) == 2 and trial['setting'] in trial['tried']
    assert len(trial['correct']) == docparams_maml.SMALL['test_episodes']


def test_classes_are_split_by_name_and_disjoint(tmp_path, tiny_bert, few_texts):
  config = docparams_maml.Config(**docparams_maml.SMALL, model=str(tiny_bert))
  bench = names.open_bench(config, Context(tmp_path))
  flat = [name for split in bench.classes.values() for name in split]
  assert sorted(flat) == sorted(f'p{index}' for index in range(60))
  assert len(set(flat)) == len(flat)
  assert names.split_of('alpha') == 'train'
  assert names.split_of('axis') == 'test'


def test_zero_steps_of_a_zero_head_know_nothing_and_rates_move_it(
  tmp_path, tiny_bert, few_texts
):
  config = docparams_maml.Config(**docparams_maml.SMALL, model=str(tiny_bert))
  bench = names.open_bench(config, Context(tmp_path))
  family = docparams_maml.families_of(bench)[True]
  params, batch = family.start(0), bench.held_out('test')[0]
  query = jax.tree.map(lambda x: x[0], batch['query'])
  logits = jax.jit(bench.classify)(params['model'], {}, query, None)[0]
  assert logits.shape == (25, 5) and not np.asarray(logits).any()
  moved = np.asarray(family.predict(params, batch))
  assert moved.shape == (10, 2, 25, 5) and moved.any()


def test_only_meta_sgd_moves_the_inner_rates(tmp_path, tiny_bert, few_texts):
  small_config = docparams_maml.Config(
    **docparams_maml.SMALL, model=str(tiny_bert)
  )
  config = dataclasses.replace(small_config, iterations=2)
  bench = names.open_bench(config, Context(tmp_path))
  family = docparams_maml.families_of(bench)[True]
  start = family.start(0)['hyper']['head']['kernel']
  rates = {
    method: float(
      docparams_maml.meta_train(family, method, 0, quiet=True).params['hyper'][
        'head'
      ]['kernel']
    )
    for method in ('MAML', 'Meta-SGD')
  }
  assert rates['MAML'] == float(start)
  assert rates['Meta-SGD'] != float(start)


def test_an_unknown_method_is_refused_with_those_that_exist(
  tmp_path, tiny_bert, few_texts
):
  config = docparams_maml.Config(
    **{**docparams_maml.SMALL, 'methods': ('maml',)}, model=str(tiny_bert)
  )
  bench = names.open_bench(config, Context(tmp_path))
  with pytest.raises(UsageError, match="no method 'maml'; possible: fine-t"):
    docparams_maml.run_methods(bench)


@pytest.mark.parametrize(
  ('settings', 'words'),
  [
    ({'iterations': 0}, 'config.iterations is 0; give at least 1'),
    ({'inner_lr': -0.01}, 'config.inner_lr is -0.01; give a number above 0'),
    ({'test_steps': (0, -1)}, r'config.test_steps is \(0, -1\); give at lea'),
  ],
)
def test_sinusoids_refuse_settings_out_of_range(settings, words, tmp_path):
  config = sinusoid_maml.Config(**settings)
  with pytest.raises(UsageError, match=words):
    sinusoid_maml.run(config, Context(tmp_path))
