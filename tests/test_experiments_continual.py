"""The streams of experiments/continual, small, through the job machinery."""

import json
import math

import jax
import numpy as np
import pytest

import fmeta
from experiments import run as job
from experiments.continual import (
  docparams_by_package,
  methods,
  packages,
  split_digits,
)
from fmeta import data, models, stream, train
from fmeta.models import Mlp

SIZES = (2, 3, 4)


def execute(module, workdir, **settings) -> dict:
  """Runs an experiment with its small setting; gives its result."""
  argv = ['run', f'--config={module.__file__}', f'--workdir={workdir}']
  for name, value in {**module.SMALL, **settings}.items():
    if isinstance(value, tuple):
      value = ','.join(map(str, value))
    argv.append(f'--config.{name}={value}')
  assert job.main(argv) == 0
  return json.loads((workdir / 'result.json').read_text())


def test_the_stream_of_packages_gives_a_table_and_a_picture(
  tmp_path, tiny_bert, capsys
):
  result = execute(docparams_by_package, tmp_path / 'run', model=tiny_bert)
  metrics = result['metrics']
  for title in ('naive', 'EWC', 'replay', 'nearest class mean'):
    assert 0 <= metrics[f'continual/{title}'] <= 1
    low, high = result['ci95'][f'continual/{title}']
    assert low <= metrics[f'continual/{title}'] <= high
  assert all(math.isfinite(value) for value in metrics.values())
  assert metrics['continual/EWC rate * strength * max F'] > 0
  assert 'continual/nearest class mean forgetting (Chaudhry)' not in metrics
  trained = json.loads(
    (tmp_path / 'run/trials/continual/naive/seed_0.json').read_text()
  )
  assert [len(row) for row in trained['matrix']] == [1, 2]
  assert (tmp_path / 'run/panel_c.png').read_bytes()[1:4] == b'PNG'
  shown = capsys.readouterr().out
  assert "by setting {'rate 0.001': " in shown
  assert 'replay: rate 0.001' in shown


@pytest.mark.parametrize(
  ('module', 'setting', 'said'),
  [
    (split_digits, 'seeds=0', 'config.seeds is 0; give at least 1'),
    (split_digits, 'sizes=0', 'give at least 1'),
    (split_digits, 'iterations=0', 'give at least 1'),
    (split_digits, 'rate=-1', 'give a number above 0'),
    (split_digits, 'rate=inf', 'give a number above 0'),
    (split_digits, 'strengths=ewc:-5', "strength 'ewc:-5'; give"),
    (split_digits, 'methods=naive', "no method 'naive'; possible: none"),
    (split_digits, 'methods=', 'give some of none'),
    (split_digits, 'methods=ewc,ewc', "has 'ewc' twice"),
    (docparams_by_package, 'methods=none', "no method 'none'; possible"),
    (docparams_by_package, 'rates_ewc=0', 'give a number above 0'),
    (docparams_by_package, 'blocks=0', 'give at least 1'),
  ],
)
def test_a_setting_that_means_nothing_is_refused_first(
  tmp_path, capsys, module, setting, said
):
  folder = tmp_path / 'run'
  argv = [f'--config={module.__file__}', f'--workdir={folder}']
  assert job.main(['run', *argv, f'--config.{setting}']) == 2
  (line,) = capsys.readouterr().err.splitlines()
  assert said in line and not folder.exists()


def test_the_cached_prefix_and_the_whole_model_agree(tiny_bert):
  config = docparams_by_package.Config(
    **{**docparams_by_package.SMALL, 'model': str(tiny_bert)}
  )
  bench = packages.Bench(config)
  cached = bench.predict(bench.parameters, bench.test).logits
  whole = models.forward(bench.module)
  mask = np.arange(32)[None] < bench.test['length'][:, None]
  batch = {'input_ids': bench.test['input_ids'], 'attention_mask': mask}
  logits, _ = jax.jit(lambda p, b: whole(p, {}, b, None))(
    bench.parameters, batch
  )
  np.testing.assert_allclose(cached, logits, atol=1e-5)
  first = next(iter(bench.tasks()))
  assert set(first.columns['package']) == {'numpy'}
  assert bench.accuracies(bench.parameters, 1) == [
    pytest.approx(
      (logits.argmax(-1) == bench.test['label'])[
        bench.test['package'] == 'numpy'
      ].mean()
    )
  ]


@pytest.mark.parametrize('scenario', ['task', 'domain', 'class'])
def test_split_digits_runs_in_every_scenario(tmp_path, scenario):
  result = execute(split_digits, tmp_path / 'run', scenario=scenario)
  metrics = result['metrics']
  assert all(math.isfinite(value) for value in metrics.values())
  assert {'none', 'ewc', 'er'} <= set(metrics)
  assert result['steps'] == 5 * split_digits.SMALL['iterations']
  assert (tmp_path / 'run/split_digits.png').exists()


def test_an_unknown_scenario_or_method_is_one_line(tmp_path, capsys):
  argv = ['run', f'--config={split_digits.__file__}']
  argv.append(f'--workdir={tmp_path / "run"}')
  assert job.main([*argv, '--config.scenario=clas']) == 2
  assert job.main([*argv, '--config.methods=none,ewk']) == 2
  error = capsys.readouterr().err
  assert error.count('\n') == 2
  assert "'ewk'" in error


def numbers(num: int, seed: int) -> dict[str, np.ndarray]:
  rng = np.random.default_rng(seed)
  x = rng.normal(size=(num, SIZES[0])).astype(np.float32)
  return {'x': x, 'label': (x[:, 0] > 0).astype(np.int32)}


FORWARD = models.forward(Mlp((SIZES[1],), SIZES[2]), ('x',))
LOSS = fmeta.supervised(FORWARD, fmeta.softmax_cross_entropy)


@pytest.fixture
def recipe() -> methods.Recipe:
  return methods.Recipe(
    loss=LOSS,
    tuning=fmeta.full(),
    importance=methods.EXACT,
    batch_size=4,
    steps_per_task=lambda examples: examples // 4,
    memory_size=6,
    replayed=4,
    fisher_examples=8,
  )


def fitted(recipe, method, tasks, setting=methods.Setting(1e-2)):  # noqa: B008
  rows = recipe.row(tasks[0].columns)
  learner = methods.learner(recipe, method, setting, rows)
  params, _ = models.init(
    Mlp((SIZES[1],), SIZES[2]), jax.random.key(0), numbers(1, 0), ('x',)
  )
  return train.fit(
    learner,
    learner.init(params, jax.random.key(0)),
    methods.stages(recipe, method, tasks, 0),
    jax.random.key(1),
    forward=FORWARD,
    quiet=True,
  )


@pytest.mark.parametrize('method', ['naive', 'ewc', 'joint'])
def test_a_stream_of_one_task_is_plain_fine_tuning_bitwise(recipe, method):
  columns = numbers(16, 0)
  ours = fitted(
    recipe, method, [stream.Task('a', columns)], methods.Setting(1e-2, 50.0)
  )
  learner = fmeta.finetune(LOSS, fmeta.optim.adamw(1e-2))
  params, _ = models.init(
    Mlp((SIZES[1],), SIZES[2]), jax.random.key(0), columns, ('x',)
  )
  plain = train.fit(
    learner,
    learner.init(params, jax.random.key(0)),
    [train.Stage('a', data.batches(columns, 4, 0), 4)],
    jax.random.key(1),
    quiet=True,
  )
  jax.tree.map(np.testing.assert_array_equal, ours.params, plain.params)


def test_the_strength_in_the_importance_is_the_strength_of_ewc(recipe):
  tasks = [stream.Task('a', numbers(16, 0)), stream.Task('b', numbers(16, 1))]
  ours = fitted(recipe, 'ewc', tasks, methods.Setting(1e-2, 30.0))
  stages = methods.stages(recipe, 'ewc', tasks, 0)
  learner = fmeta.finetune(
    LOSS, fmeta.optim.adamw(1e-2), penalty=fmeta.ewc(30.0)
  )
  params, _ = models.init(
    Mlp((SIZES[1],), SIZES[2]), jax.random.key(0), numbers(1, 0), ('x',)
  )
  plain = train.fit(
    learner,
    learner.init(params, jax.random.key(0)),
    stages,
    jax.random.key(1),
    forward=FORWARD,
    quiet=True,
  )
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
    ours.params,
    plain.params,
  )
  peak = float(fmeta.penalty.max_importance(plain.state.penalty_state))
  product = methods.divergence_product(
    recipe, methods.Setting(1e-2, 30.0), ours
  )
  assert product == pytest.approx(1e-2 * 30 * peak, rel=1e-3)
  assert ours.history[-1]['penalty'] > 0


def test_stages_remember_all_tasks_but_the_last(recipe):
  tasks = [stream.Task(str(k), numbers(8 + 4 * k, k)) for k in range(3)]
  made = methods.stages(recipe, 'ewc', tasks, 0)
  assert [len(stage.remember) for stage in made] == [1, 1, 0]
  assert [stage.num_steps for stage in made] == [2, 3, 4]
  (joint,) = methods.stages(recipe, 'joint', tasks, 0)
  assert joint.num_steps == 9
  assert not any(s.remember for s in methods.stages(recipe, 'naive', tasks, 0))


def test_replay_holds_rows_of_earlier_tasks(recipe):
  tasks = [stream.Task('a', numbers(16, 0)), stream.Task('b', numbers(16, 1))]
  memory = fitted(recipe, 'replay', tasks).state.memory
  assert int(memory['seen']) == 32
  seen = np.concatenate([task.columns['x'] for task in tasks])
  for row in np.asarray(memory['rows']['x']):
    assert (seen == row).all(1).any()


def test_the_summary_names_its_forgetting():
  matrix = [[0.90], [0.95, 0.80], [0.70, 0.85, 0.90]]
  kept = methods.summary([matrix, matrix])
  assert kept['forgetting (Chaudhry)'] == pytest.approx(0.10)
  assert kept['backward transfer'] == pytest.approx(-0.075)
  assert kept['average accuracy'] == pytest.approx(2.45 / 3)
  assert methods.summary([[]]) == {}


def test_little_forgetting_is_said():
  assert 'forgets 0.5 points' in methods.remark(0.005)
  assert methods.remark(0.03) == methods.remark(None) == ''
