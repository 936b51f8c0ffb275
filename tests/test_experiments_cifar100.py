"""The stream of CIFAR-100, small, on images and weights made here."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file
from test_resnet import tensors_of

from experiments import run as job
from experiments.continual import cifar100, rows, table
from fmeta import tree
from fmeta.datasets import cifar100 as dataset
from fmeta.models import ResNet
from fmeta.pretrained.resnet import MEAN, STD
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
  assert 'none@lora' in said and 'intervals over test rows' in said
  assert (folder / 'cifar100.png').read_bytes()[1:4] == b'PNG'


def test_the_other_rows_run_from_weights_with_norms(tmp_path, weights):
  others = ('joint', 'sampled_ewc', 'der_plus_plus', 'none@norms')
  folder, options = tmp_path / 'run', {'seeds': 1, 'frozen': ('nearest_mean',)}
  argv = arguments(folder, weights, methods=others, **options)
  assert job.main(argv) == 0
  (joint,), (ewc,) = trials(folder, 'joint'), trials(folder, 'sampled_ewc')
  assert joint['steps'] == ewc['steps'] == 20 and len(joint['matrix']) == 1
  (norms,) = trials(folder, 'none@norms')
  result = json.loads((folder / 'result.json').read_text())
  assert norms['trainable'] == result['total_parameters'] > ewc['trainable']
  # An anchor and an importance for each leaf that moves.
  assert ewc['cost']['memory_bytes'] == 2 * 4 * ewc['trainable']


@pytest.mark.parametrize('name', ['none', 'none@norms'])
def test_norms_and_their_statistics_move_only_where_a_row_says_so(held, name):
  bench = held.bench(held.splits, 0)
  row = rows.find(name, cifar100.TUNINGS)
  tuning = cifar100.tunings(held.config).get(row.tuning, bench.tuning)
  learner = row.learner(rows.Recipe(bench, 1e-2, 8, 16, tuning), 0.0)
  key = jax.random.key(0)
  before = learner.init(bench.start(key), key, bench.model_state)
  numbers = bench.batches([0], 8, 0)(0)
  batch = {k: v[numbers['row']] for k, v in bench.columns.items()}
  after, _ = jax.jit(learner.step)(
    before, {**batch, 'allowed': numbers['allowed']}, key
  )
  moved = {
    leaf: bool((a != b).any())
    for part in (learner.params, lambda state: state.model_state)
    for leaf, a, b in zip(
      tree.names(part(before)),
      jax.tree.leaves(part(before)),
      jax.tree.leaves(part(after)),
      strict=True,
    )
  }
  norms = [moved[leaf] for leaf in moved if '/norm' in leaf]
  assert len(norms) == 7 * 4  # scale, bias, mean, var
  assert all(norms) if row.tuning else not any(norms)
  assert moved['body/stem/conv/kernel'] and moved['head/kernel']


def test_features_are_what_the_published_head_reads(held):
  published = ResNet(8, 10, 4, MEAN, STD)
  image = held.splits['test']['image'][:5].astype(np.float32) / 255
  variables = {'params': held.params, **held.model_state}
  logits = published.apply(variables, image)
  head = held.params['head']
  found = held.features['test']['feature'][:5] @ np.asarray(head['kernel'])
  # Compiled for another number of rows.
  np.testing.assert_allclose(
    found + head['bias'][None], logits, rtol=1e-4, atol=1e-5
  )
  np.testing.assert_array_equal(
    held.features['test']['label'], held.splits['test']['label']
  )


def test_an_order_is_a_partition_of_the_classes_and_moves_images_with_it(held):
  drawn = [held.tasks(held.splits, order) for order in (0, 1)]
  for tasks in drawn:
    assert tasks.allowed.shape == (10, 100)
    assert (tasks.allowed.sum(0) == 1).all()
    assert (tasks.allowed.sum(1) == 10).all()
    for k, task in enumerate(tasks.train):
      assert tasks.allowed[k][task.columns['label']].all()
  assert (drawn[0].allowed != drawn[1].allowed).any()


def test_a_tuning_may_have_a_rate_of_its_own(held, tmp_path):
  made = table.Table(
    held.config,
    Context(tmp_path),
    held.splits,
    0.1,
    held.bench,
    tunings=cifar100.tunings(held.config),
  )
  rates = {
    name: made.recipe(made.bench, made.row(name)).rate
    for name in ('none', 'er@lora', 'er@norms')
  }
  assert rates == {'none': 3e-4, 'er@lora': 1e-3, 'er@norms': 3e-4}


def test_a_row_is_a_method_and_what_moves():
  row = rows.find('er@lora', ('lora',))
  assert row == rows.ROWS['er']._replace(title='ER@lora', tuning='lora')
  assert rows.find('er') == rows.ROWS['er']


@pytest.mark.parametrize(
  ('flag', 'said'),
  [
    ('--config.methods=none@lra', 'possible: none@lora, none@norms'),
    ('--config.methods=nome@lora', "no method 'nome'"),
    ('--config.methods=none@', "'none@' names no tuning"),
    ('--config.strengths=er@lora:3', "'er@lora' has no strength"),
    ('--config.rates=lra:1', "rate 'lra:1' names no tuning"),
    ('--config.rates=lora:x', "rate 'lora:x'; give tuning:number"),
    ('--config.rates=lora:0', "rate 'lora:0'; give a number above 0"),
    ('--config.frozen=sdla', "no frozen row 'sdla'"),
    ('--config.rank=0', 'config.rank is 0'),
    ('--config.checkpoint=x.safetensors', 'no weights at'),
  ],
)
def test_misuse_is_one_line(tmp_path, capsys, flag, said):
  argv = ['run', f'--config={cifar100.__file__}', f'--workdir={tmp_path}/run']
  assert job.main([*argv, flag]) == 2
  error = capsys.readouterr().err
  assert error.count('\n') == 1 and said in error


def test_weights_are_looked_for_beside_the_images(
  tmp_path, capsys, monkeypatch
):
  monkeypatch.delenv('FMETA_DATA_DIR', raising=False)
  argv = ['run', f'--config={cifar100.__file__}', f'--workdir={tmp_path}/run']
  assert job.main(argv) == 2
  assert 'the weights are not known' in capsys.readouterr().err
  assert job.main([*argv, f'--data_dir={tmp_path}']) == 2
  path = tmp_path / 'checkpoints' / 'cifar10_resnet20.safetensors'
  assert f'no weights at {path}' in capsys.readouterr().err.replace("'", '')
