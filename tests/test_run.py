"""The command line as a user meets it; most of it without a new process."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import pytest

from experiments import files, run
from fmeta.errors import UsageError

TOY = '''"""A toy.

It adds.
"""
import dataclasses

import jax
import jax.numpy as jnp
from fmeta.errors import UsageError


@dataclasses.dataclass
class Seed:
  init: int = 0


@dataclasses.dataclass
class Config:
  lr: float = 0.5
  pattern: str = 'head/.*'
  fail: bool = False
  seed: Seed = dataclasses.field(default_factory=Seed)


def run(config, context):
  if config.pattern == 'hed/.*':
    raise UsageError("no parameter\\\\nmatches 'hed/.*'")
  if config.fail:
    raise ValueError('a bug')
  if config.pattern == 'stop':
    raise KeyboardInterrupt
  try:
    config.lr = 3.0
  except dataclasses.FrozenInstanceError:
    frozen = 1
  (context.workdir / 'metrics.jsonl').touch()
  return {'metrics': {
    'lr': config.lr, 'frozen': frozen, 'devices': len(jax.devices()),
    'resumed': int(context.resume), 'sum': jnp.ones(3).sum()}}
'''


@pytest.fixture
def toy(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  path = tmp_path / 'toy.py'
  path.write_text(TOY.replace('\\\\', '\\'))
  return path


def start(*words):
  return run.main(['run', *map(str, words)])


def result(folder):
  return json.loads((pathlib.Path(folder) / 'result.json').read_text())


def refused(capsys, *words):
  """Runs a command that must fail, and returns its one line."""
  capsys.readouterr()
  assert start(*words) == 2
  message = capsys.readouterr().err
  assert message.startswith('error: ')
  assert message.count('\n') == 1 and message.endswith('\n')
  return message


def test_a_run_is_numbered_described_and_recorded(toy, tmp_path):
  assert start('--config=toy.py', '--config.lr=2', '--config.seed.init=4') == 0
  assert start(f'--config={toy}') == 0
  folder = tmp_path / 'runs' / 'toy' / '001'
  assert json.loads((folder / 'config.json').read_text()) == {
    'lr': 2.0,
    'pattern': 'head/.*',
    'fail': False,
    'seed': {'init': 4},
  }
  assert (folder / 'experiment.py').read_text() == toy.read_text()
  assert result(folder)['experiment'] == 'toy'
  metrics = result(folder)['metrics']
  assert metrics['lr'] == 2.0 and metrics['sum'] == 3.0
  assert metrics['frozen'] == 1
  assert result(folder.with_name('002'))['metrics']['lr'] == 0.5


def test_flags_may_come_in_any_order(toy):
  assert start('--config.lr=2', '--workdir=w', '--config', 'toy.py') == 0
  assert result('w')['metrics']['lr'] == 2.0


def test_no_and_bare_boolean_fields(toy):
  _, given = run.parse(['run', '--noconfig.fail', '--config.a.b', '--list'])
  assert given == [('fail', 'false'), ('a.b', None)]


@pytest.mark.parametrize(
  'words, message',
  [
    (['--config.lrr=1'], "did you mean 'config.lr'"),
    (['--config.lr=fast'], "config.lr is a number, not 'fast'"),
    (['--config.fail=7'], 'true or false'),
    (['--config.lr', '3'], "unexpected argument '3'"),
    (['--config.lr'], 'needs a value'),
    (['--wokdir=x'], 'Did you mean: workdir'),
    (['--mesh=data:3'], 'possible sizes: [1, 2, 4, 8]'),
    (['--mesh=dta:2'], "did you mean 'data'"),
    (['--resume'], '--workdir=DIR'),
    (['--resume=3'], '--resume=3'),
    (['--resume', '--workdir=none'], 'there is no workdir'),
    (['--workdir=.'], 'not empty'),
    (['--workdir=toy.py/w'], 'cannot be written'),
    (['--config=experiments/run.py'], "no 'Config'"),
    (['--config=toy.txt'], "no experiment file 'toy.txt'"),
    (['--config=.'], "no experiment file '.'"),
    (['--config.pattern=hed/.*'], "no parameter matches 'hed/.*'"),
  ],
)
def test_bad_input_is_one_line_and_touches_nothing(
  toy, tmp_path, capsys, words, message
):
  line = refused(capsys, '--config=toy.py', *words)
  assert message in line
  left = [p.name for p in tmp_path.rglob('*') if '__pycache__' not in str(p)]
  assert set(left) <= {'toy.py', 'runs', 'toy'}


def test_a_file_that_is_not_python_is_refused(toy, tmp_path, capsys):
  (tmp_path / 'toy.yaml').write_text('lr: 1')
  assert 'not a Python file' in refused(capsys, '--config=toy.yaml')


def test_a_bug_keeps_its_traceback_and_its_folder(toy, tmp_path):
  with pytest.raises(ValueError, match='a bug'):
    start('--config=toy.py', '--config.fail')
  assert (tmp_path / 'runs/toy/001/config.json').exists()


def test_an_interrupted_run_says_how_to_continue(toy, capsys):
  with pytest.raises(SystemExit) as stopped:
    start(f'--config={toy}', '--config.pattern=stop', '--workdir=w')
  assert stopped.value.code == 130
  said = 'stopped; --resume --workdir=w continues\n'
  assert capsys.readouterr().err == said
  assert pathlib.Path('w/config.json').exists()


def test_a_run_that_takes_something_else_is_no_experiment(toy, capsys):
  shared = toy.with_name('shared.py')
  shared.write_text(TOY.replace('run(config, context)', 'run(table, a, b)'))
  message = refused(capsys, f'--config={shared}', '--workdir=w')
  assert 'does not take (config, context); --list' in message
  assert not pathlib.Path('w').exists()


def test_resume_needs_no_config_and_uses_the_stored_copy(toy):
  assert start('--config=toy.py', '--config.lr=2', '--workdir=w') == 0
  toy.unlink()
  before = pathlib.Path('w/config.json').read_bytes()
  assert start('--workdir=w', '--resume') == 0
  assert pathlib.Path('w/config.json').read_bytes() == before
  assert result('w')['experiment'] == 'toy'
  metrics = result('w')['metrics']
  assert metrics['lr'] == 2.0 and metrics['resumed'] == 1


def test_resume_with_other_settings_names_the_field(toy, capsys):
  assert start('--config=toy.py', '--config.seed.init=2', '--workdir=w') == 0
  again = ['--workdir=w', '--resume']
  line = refused(capsys, '--config=toy.py', *again)
  assert 'config.seed.init was 2 and is now 0' in line
  assert 'config.lr was 0.5 and is now 1.0' in refused(
    capsys, *again, '--config.lr=1'
  )
  assert start('--config=toy.py', '--config.seed.init=2', *again) == 0


def test_a_refused_resume_keeps_the_folder(toy, capsys):
  assert start('--config=toy.py', '--workdir=w') == 0
  held = sorted(os.listdir('w'))
  refused(capsys, '--workdir=w', '--resume', '--config.pattern=hed/.*')
  assert sorted(os.listdir('w')) == held


def test_help_shows_the_flags_and_the_fields(toy, capsys):
  assert start('--help', '--config=toy.py') == 0
  shown = capsys.readouterr().out
  for words in ('--workdir', '--mesh', 'A toy.', '--config.seed.init=0'):
    assert words in shown


def test_help_says_what_a_field_means(capsys):
  assert start('--help', '--config=experiments/fewshot/omniglot/maml.py') == 0
  shown = capsys.readouterr().out
  assert '--config.queries=0  # to train with; 0: as many as shots' in shown
  assert '--config.test_steps=3  # in testing' in shown


def test_the_list_names_what_can_be_run(capsys):
  assert start('--list') == 0
  shown = capsys.readouterr().out
  for path in files.experiments():
    assert f'experiments/{files.name_of(path)}.py' in shown
  assert 'experiments/run.py' not in shown


def test_experiments_are_named_by_their_place():
  assert files.name_of(files.HERE / 'finetune' / 'a.py') == 'finetune/a'
  assert files.name_of(pathlib.Path('/x/b.py')) == 'b'


def test_every_listed_experiment_has_defaults_for_all_fields():
  for path in files.experiments():
    assert dataclasses.is_dataclass(files.load(path).Config())


def test_an_absurd_mesh_makes_no_devices(monkeypatch):
  monkeypatch.setenv('XLA_FLAGS', '')
  run.use_host_devices('data:100000')
  run.use_host_devices('data:1')
  run.use_host_devices(None)
  assert os.environ['XLA_FLAGS'] == ''
  run.use_host_devices('data:2,fsdp:2')
  assert os.environ['XLA_FLAGS'].endswith('device_count=4')


def test_experiment_files_are_those_with_a_config_and_a_run(
  tmp_path, monkeypatch
):
  monkeypatch.setattr(files, 'HERE', tmp_path)
  (tmp_path / 'fewshot').mkdir()
  (tmp_path / 'fewshot' / 'toy.py').write_text(TOY)
  (tmp_path / 'helper.py').write_text('def run(): pass')
  shared = TOY.replace('run(config, context)', 'run(table, a, b)')
  (tmp_path / 'shared.py').write_text(shared)
  assert [path.name for path in files.experiments()] == ['toy.py']
  with pytest.raises(UsageError, match="mean '[^']*/fewshot/toy.py'"):
    files.find(f'{tmp_path.name}/fewshot/tyo.py')


def test_the_command_itself_exits_2_and_obeys_the_mesh(toy):
  environ = {k: v for k, v in os.environ.items() if k != 'XLA_FLAGS'}
  environ['PYTHONPATH'] = str(files.HERE.parent)
  command = [sys.executable, '-P', '-m', 'experiments.run', '--config=toy.py']

  def call(*words):
    return subprocess.run(
      [*command, *words], env=environ, capture_output=True, text=True
    )

  bad = call('--config.lrr=1')
  assert bad.returncode == 2
  assert bad.stderr.count('\n') == 1 and bad.stdout == ''
  good = call('--workdir=w', '--mesh=data:2')
  assert good.returncode == 0 and good.stderr == ''
  assert result('w')['metrics']['devices'] == 2
