"""The stream of CIFAR-100, small, on images and weights made here."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file
from test_resnet import tensors_of

from experiments import run as job
from experiments.continual import cifar100, rows
from fmeta import models, tree
from fmeta.datasets import cifar100 as dataset
from fmeta.models import ResNet
from fmeta.workdir import Context

SIDE = 8
COUNTS = {'train': 3, 'test': 2}


def columns(count, seed):
  rng = np.random.default_rng(seed)
  label = np.repeat(np.arange(100, dtype=np.int32), count)
  image = rng.integers(0, 256, (len(label), SIDE, SIDE, 3))
  # A class has a tint, so that frozen features know something.
  tint = np.random.default_rng(9).uniform(0.2, 1, (100, 1, 1, 3))
  return {
    'image': (tint[label] * image / 255).astype(np.float32),
    'label': label,
  }


@pytest.fixture(scope='module')
def weights(tmp_path_factory):
  path = tmp_path_factory.mktemp('weights') / 'tiny.safetensors'
  save_file(tensors_of(ResNet(8, 10, 4)), path)
  return path


@pytest.fixture(autouse=True)
def data(monkeypatch):
  splits = {
    name: columns(count, k) for k, (name, count) in enumerate(COUNTS.items())
  }
  monkeypatch.setattr(dataset, 'load', lambda data_dir: splits)


def arguments(workdir, weights, **settings):
  argv = ['run', f'--config={cifar100.__file__}', f'--workdir={workdir}']
  settings = {**cifar100.SMALL, 'checkpoint': weights, **settings}
  for name, value in settings.items():
    value = ','.join(map(str, value)) if isinstance(value, tuple) else value
    argv.append(f'--config.{name}={value}')
  return argv


def trials(workdir, name, scenario='class'):
  folder = workdir / 'trials' / scenario / name
  return [json.loads(path.read_text()) for path in sorted(folder.glob('*'))]


@pytest.fixture(scope='module')
def held(weights):
  settings = {**cifar100.SMALL, 'checkpoint': str(weights)}
  config = cifar100.Config(**settings)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(
      dataset,
      'load',
      lambda data_dir: {'train': columns(3, 0), 'test': columns(2, 1)},
    )
    return cifar100.Images(config, Context(weights.parent))


def test_frozen_and_trained_rows_share_a_table(tmp_path, weights, capsys):
  folder = tmp_path / 'run'
  assert job.main(arguments(folder, weights)) == 0
  result = json.loads((folder / 'result.json').read_text())
  named = {'nearest_mean', 'slda', 'ranpac', 'none', 'none@lora', 'er'}
  assert named <= set(result['metrics'])
  first, second = trials(folder, 'nearest_mean')
  # Other classes in each task, the same last answers: the sums are the same.
  assert first['matrix'] != second['matrix']
  assert first['correct'] == second['correct']
  trained = trials(folder, 'er')[1]
  assert [len(row) for row in trained['matrix']] == list(range(1, 11))
  low, high = result['ci95']['none minus nearest mean, frozen']
  assert low < result['metrics']['none minus nearest mean, frozen'] < high
  full, low_rank = trials(folder, 'none')[0], trials(folder, 'none@lora')[0]
  assert 0 < low_rank['trainable'] < full['trainable']
  assert full['trainable'] < result['total_parameters']
  said = ' '.join(capsys.readouterr().out.split())
  assert 'none, lora' in said and 'intervals over test rows' in said
  assert (folder / 'cifar100.png').read_bytes()[1:4] == b'PNG'
