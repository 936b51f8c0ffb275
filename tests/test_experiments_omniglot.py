"""Every Omniglot experiment at its small setting, through experiments.run."""

import importlib
import re

import jax
import numpy as np
import pytest
from test_experiments_fewshot import small, text

from experiments import run
from experiments.common import Seeds
from experiments.fewshot.omniglot import (
  baseline_plus_plus,
  maml,
  protonet,
  reptile,
  splits,
  task,
)
from fmeta import evaluate, scores, tree
from fmeta.errors import UsageError
from fmeta.workdir import Context

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


def test_nothing_is_compiled_after_the_second_validation(
  tmp_path, drawn, monkeypatch
):
  seen, marks = [], []

  def listen(event, seconds, **_):
    seen.append(event)

  evaluate_episodes = evaluate.evaluate_episodes

  def counted(*args, **options):
    found = evaluate_episodes(*args, **options)
    marks.append(
      sum(event.endswith('backend_compile_duration') for event in seen)
    )
    return found

  monkeypatch.setattr(evaluate, 'evaluate_episodes', counted)
  jax.monitoring.register_event_duration_secs_listener(listen)
  small('omniglot/maml', tmp_path / 'run', iterations=10)
  jax.monitoring.unregister_event_duration_listener(listen)
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

  def keep(config, context, method, *_):
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


@pytest.mark.parametrize(
  ('settings', 'words'),
  [
    ({'ways': 0}, 'config.ways is 0; give at least 2'),
    ({'ways': 1}, 'config.ways is 1; give at least 2'),
    ({'chunk': -1}, 'config.chunk is -1; give at least 0'),
    ({'iterations': 0}, 'config.iterations is 0; give at least 1'),
    ({'test_steps': -1}, 'config.test_steps is -1; give at least 0'),
    ({'curve_steps': -1}, 'config.curve_steps is -1; give at least 0'),
    ({'inner_lr': -0.4}, 'config.inner_lr is -0.4; give a number above 0'),
    ({'outer_lr': 0.0}, 'config.outer_lr is 0.0; give a number above 0'),
    ({'final_lr': -1.0}, 'config.final_lr is -1.0; give a number above 0'),
    ({'weights': 'none'}, "config.weights is 'none', where there is no"),
  ],
)
def test_settings_out_of_range_are_refused_before_anything_is_written(
  settings, words, tmp_path, drawn, capsys
):
  flags = [f'--config.{k}={text(v)}' for k, v in settings.items()]
  small_flags = [f'--config.{k}={text(v)}' for k, v in maml.SMALL.items()]
  command = ['run', '--config=experiments/fewshot/omniglot/maml.py']
  folder = tmp_path / 'run'
  assert run.main([*command, f'--workdir={folder}', *small_flags, *flags]) == 2
  message = capsys.readouterr().err
  assert words in message and message.count('\n') == 1
  assert not folder.exists()


def test_a_head_is_not_trained_on_one_class(tmp_path):
  config = protonet.Config(train_ways=1)
  with pytest.raises(UsageError, match='train_ways is 1, and one class'):
    protonet.run(config, Context(tmp_path))


def test_tasks_that_do_not_divide_over_the_mesh_are_refused_at_once(tmp_path):
  with pytest.raises(UsageError, match=r'32 tasks do not divide over 3 dev'):
    maml.run(maml.Config(), Context(tmp_path, mesh='data:3'))
