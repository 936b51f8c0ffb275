"""Streams of MNIST, small, on images made here."""

import dataclasses
import json
import math

import jax
import numpy as np
import pytest

from experiments import run as job
from experiments.continual import bench as benches
from experiments.continual import images, measured, rows, settings, table
from experiments.continual.mnist import permuted, protocol, split
from fmeta import models, train
from fmeta.datasets import mnist


def columns(size, seed):
  rng = np.random.default_rng(seed)
  label = np.arange(size, dtype=np.int32) % 10
  image = rng.integers(0, 256, (size, 28, 28, 1)).astype(np.float32) / 255
  return {'image': image, 'label': label}


SPLITS = {'train': columns(400, 0), 'test': columns(200, 1)}
BYTES = {name: images.as_bytes(part) for name, part in SPLITS.items()}


def bench_of(scenario):
  tasks_of = lambda splits: protocol.split_tasks(splits, scenario)
  return protocol.bench_of(tasks_of, scenario, (8,))(BYTES, 0)


@pytest.fixture(autouse=True)
def dataset(monkeypatch):
  monkeypatch.setattr(mnist, 'load', lambda data_dir: SPLITS)


def execute(module, workdir, **settings):
  argv = ['run', f'--config={module.__file__}', f'--workdir={workdir}']
  for name, value in {**module.SMALL, **settings}.items():
    value = ','.join(map(str, value)) if isinstance(value, tuple) else value
    argv.append(f'--config.{name}={value}')
  assert job.main(argv) == 0
  return json.loads((workdir / 'result.json').read_text())


@pytest.mark.parametrize('scenario', benches.SCENARIOS)
def test_split_mnist_gives_a_table_and_a_picture(tmp_path, scenario, capsys):
  result = execute(split, tmp_path / 'run', scenario=scenario)
  assert all(math.isfinite(value) for value in result['metrics'].values())
  assert {'none', 'ewc', 'er'} <= set(result['metrics'])
  assert result['steps'] == 5 * split.SMALL['iterations']
  assert (tmp_path / 'run/split_mnist.png').read_bytes()[1:4] == b'PNG'
  trained = json.loads(
    (tmp_path / f'run/trials/{scenario}/er/seed_1.json').read_text()
  )
  assert [len(row) for row in trained['matrix']] == [1, 2, 3, 4, 5]
  assert trained['cost']['memory_bytes'] >= 20 * 28 * 28
  assert 'EWC' in capsys.readouterr().out


@pytest.mark.parametrize('scenario', benches.SCENARIOS)
def test_every_row_runs_in_every_scenario(tmp_path, scenario):
  named = tuple(name for name, row in rows.ROWS.items() if not row.folds)
  strengths = tuple(f'{n}:0.5' for n in named if rows.ROWS[n].grid)
  result = execute(
    split,
    tmp_path / 'run',
    scenario=scenario,
    methods=named,
    strengths=strengths,
    seeds=1,
  )
  assert set(named) <= set(result['metrics'])
  assert not set(named) & set(result['ci95'])  # of one seed
  for name in named:
    path = tmp_path / f'run/trials/{scenario}/{name}/seed_0.json'
    cost = json.loads(path.read_text())['cost']
    # Every row sees at least the stream; those that replay see more.
    seen = 5 * split.SMALL['iterations'] * split.SMALL['batch_size']
    more = name in ('er', 'er_ace', 'der_plus_plus', 'a_gem', 'gem')
    assert cost['examples'] > seen if more else cost['examples'] == seen


def test_a_domain_is_odd_or_even_whatever_the_digits():
  made = protocol.split_tasks(BYTES, 'domain')
  assert [task.name for task in made.train] == [
    '0/1',
    '2/3',
    '4/5',
    '6/7',
    '8/9',
  ]
  for task in made.train:
    assert set(task.columns['label'].tolist()) == {0, 1}
  classes = protocol.split_tasks(BYTES, 'class').train[1].columns['label']
  assert set(classes.tolist()) == {2, 3}
  assert made.allowed.all()


def test_published_numbers_stand_beside_their_own_settings_only():
  asked = dataclasses.replace(permuted.Config(), seeds=2, memory_size=20)
  assert settings.as_published(asked)
  for field in ('tasks', 'iterations', 'rate'):
    value = getattr(asked, field) / 2
    assert not settings.as_published(
      dataclasses.replace(asked, **{field: value})
    )


def test_permuted_mnist_gives_a_table(tmp_path):
  result = execute(permuted, tmp_path / 'run', methods=('none', 'joint'))
  assert result['steps'] == 3 * permuted.SMALL['iterations']
  assert 'joint' in result['metrics'] and 'none' in result['ci95']


def test_a_strength_is_chosen_on_validation_images(
  tmp_path, capsys, monkeypatch
):
  short = rows.ROWS['ewc']._replace(grid=(1.0, 10.0))
  monkeypatch.setitem(rows.ROWS, 'ewc', short)
  execute(split, tmp_path / 'run', methods=('ewc',), seeds=1, strengths=())
  tried = sorted((tmp_path / 'run/trials/domain/ewc').glob('strength_*'))
  assert [path.stem for path in tried] == ['strength_1', 'strength_10']
  assert 'an edge of the grid' in capsys.readouterr().out


def test_images_as_bytes_give_the_same_logits():
  bench = bench_of('class')
  plain = models.forward(models.Mlp((8,), 10), models.IMAGE)
  params = bench.start(jax.random.key(0))
  of_bytes, _ = bench.forward(params, {}, BYTES['test'], None)
  of_floats, _ = plain(params, {}, SPLITS['test'], None)
  np.testing.assert_allclose(of_bytes, of_floats, rtol=1e-5, atol=1e-6)


def test_a_batch_says_what_may_be_answered_and_no_more():
  by_class = bench_of('class')
  batch = by_class.batches([1], 8, 0)(3)
  assert sorted(batch) == ['allowed', 'row']
  np.testing.assert_array_equal(
    batch['allowed'], np.tile(np.arange(10) < 4, (8, 1))
  )
  labels = by_class.columns['label'][batch['row']]
  assert set(labels) <= {2, 3}
  domain = bench_of('domain')
  assert sorted(domain.batches([1], 8, 0)(3)) == ['row']
  assert set(domain.columns['label']) == {0, 1}
  known = bench_of('task')
  row = known.batches([1], 8, 0)(3)['row']
  np.testing.assert_array_equal(
    np.flatnonzero(known.columns['allowed'][row].all(0)), [2, 3]
  )


def test_a_task_is_looked_at_again_by_its_first_rows_and_all_its_classes():
  bench = bench_of('class')
  of_task = bench.rows(1)
  label = bench.columns['label'][of_task]
  assert list(label[:3]) == [2, 3, 2]
  (few,), (more,) = bench.remembered(1, 1), bench.remembered(1, 5)
  assert list(few['label']) == [2, 3]
  assert len(more['label']) == len(more['allowed']) == 5
  np.testing.assert_array_equal(
    more['image'], bench.columns['image'][of_task[:5]]
  )
  (rest,) = bench.remembered(1, 10_000)
  assert len(rest['label']) == len(of_task)


def test_permuted_tasks_keep_pixels_and_give_each_task_its_head():
  made = protocol.permuted_tasks(BYTES, 'task', 3, 0)
  first, second = made.train[0].columns, made.train[1].columns
  assert (first['image'] != second['image']).any()
  np.testing.assert_array_equal(
    np.sort(first['image'].reshape(400, -1)),
    np.sort(second['image'].reshape(400, -1)),
  )
  np.testing.assert_array_equal(second['label'], first['label'] + 10)
  assert made.allowed.shape == (3, 30)
  assert (made.allowed.sum(0) == 1).all() and made.allowed[2, 25]


def test_the_error_shown_is_the_standard_error_over_seeds():
  runs = [{'matrix': [[0.5], [0.8, 0.6]]}, {'matrix': [[0.5], [0.9, 0.9]]}]
  mean, error = measured.standard_error(runs)
  assert mean == pytest.approx(0.8)
  assert error == pytest.approx(0.1)


def test_intervals_are_of_t_over_seeds_and_none_for_one_seed():
  runs = [{'matrix': [[x]], 'seconds': 1.0} for x in (0.5, 0.7, 0.9)]
  # t(2) = 4.303 times the standard error .2 / sqrt(3).
  half = 4.3027 * 0.2 / 3**0.5
  found = measured.interval_of(measured.Measured(rows.ROWS['none'], 0.0, runs))
  np.testing.assert_allclose(found, (0.7 - half, 0.7 + half), rtol=1e-4)
  one = measured.Measured(rows.ROWS['none'], 0.0, runs[:1])
  assert measured.interval_of(one) is None


@pytest.mark.parametrize(
  ('flag', 'said'),
  [
    ('--config.scenario=clas', "no scenario 'clas'"),
    ('--config.methods=none,ewk', "no method 'ewk'"),
    ('--config.strengths=ewc:x', "strength 'ewc:x'"),
    ('--config.strengths=ewk:3', "no method 'ewk'"),
    ('--config.strengths=er:3', "'er' has no strength"),
    ('--config.strengths=ewc:-1', "strength 'ewc:-1'"),
    ('--config.strengths=ewc:nan', "strength 'ewc:nan'"),
    ('--config.methods=', 'methods is empty'),
    ('--config.seeds=0', 'config.seeds is 0'),
    ('--config.iterations=0', 'config.iterations is 0'),
    ('--config.rate=0', 'config.rate is 0'),
    ('--config.memory_size=0', 'config.memory_size is 0'),
    ('--config.memory_size=100', 'ER replays 128 rows a step'),
    ('--config.fisher_examples=-1', 'config.fisher_examples is -1'),
    ('--config.test_examples=0', 'config.test_examples is 0'),
    ('--config.test_examples=1', 'no example has class'),
    ('--config.steps_per_dispatch=0', 'config.steps_per_dispatch is 0'),
    ('--config.batch_size=1', 'ER matched takes 0.5 of a batch of 1'),
    ('--config.batch_size=100', 'batch_size 100 does not fit 80 examples'),
    ('--config.sizes=8,0', 'config.sizes is (8, 0)'),
    ('--config.methods=o_lora', 'is for low-rank factors'),
    ('--config.methods=none,er,none', "config.methods has 'none' twice"),
    ('--config.strengths=ewc:1,si:1,ewc:2', "config.strengths has 'ewc' twice"),
  ],
)
def test_misuse_is_one_line(tmp_path, capsys, flag, said):
  argv = ['run', f'--config={split.__file__}', f'--workdir={tmp_path / "run"}']
  assert job.main([*argv, flag]) == 2
  error = capsys.readouterr().err
  assert error.count('\n') == 1 and said in error


def test_a_stream_of_no_tasks_is_refused(tmp_path, capsys):
  folder = tmp_path / 'run'
  argv = ['run', f'--config={permuted.__file__}', f'--workdir={folder}']
  assert job.main([*argv, '--config.tasks=0']) == 2
  assert 'config.tasks is 0' in capsys.readouterr().err
  assert not folder.exists()


@pytest.mark.parametrize(('worst', 'status'), [(1.0, 2), (100.0, 0)])
def test_a_strength_that_diverges_is_not_chosen(
  tmp_path, monkeypatch, capsys, worst, status
):
  fit = table.Table.fit

  def fragile(self, bench, name, strength, seed):
    if seed == table.SEARCH_SEED and strength >= worst:
      raise train.Diverged('loss is nan')
    return fit(self, bench, name, strength, seed)

  monkeypatch.setattr(table.Table, 'fit', fragile)
  monkeypatch.setitem(
    rows.ROWS, 'ewc', rows.ROWS['ewc']._replace(grid=(10.0, 1000.0))
  )
  argv = ['run', f'--config={split.__file__}', f'--workdir={tmp_path}/run']
  small = {**split.SMALL, 'seeds': 1, 'methods': ('ewc',), 'strengths': ()}
  for name, value in small.items():
    value = ','.join(map(str, value)) if isinstance(value, tuple) else value
    argv.append(f'--config.{name}={value}')
  assert job.main(argv) == status
  shown = capsys.readouterr()
  if status:
    assert 'diverged with every strength' in shown.err
  else:
    assert "'1000': None" in shown.out
