"""The experiments of `fmeta.search` at their small settings."""

import json

import pytest

from experiments import run as job
from experiments.benchmarks import trials
from experiments.finetune import search_digits


def execute(module, workdir, *flags) -> int:
  argv = ['run', f'--config={module.__file__}', f'--workdir={workdir}', *flags]
  for name, value in module.SMALL.items():
    value = ','.join(map(str, value)) if isinstance(value, tuple) else value
    argv.append(f'--config.{name}={value}')
  return job.main(argv)


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
  folder = tmp_path_factory.mktemp('search') / 'run'
  assert execute(search_digits, folder) == 0
  return folder


def test_every_row_is_measured_within_the_same_budget(finished):
  result = json.loads((finished / 'result.json').read_text())
  small = search_digits.SMALL
  names = small['rows']
  assert set(names) <= set(result['metrics'])
  paths = [*finished.glob('trials/*/seed_0.json')]
  assert len(paths) == len(names)
  for path in paths:
    found = json.loads(path.read_text())
    assert found['steps'] <= small['steps'] * small['trials']
    assert len(found['correct']) == 360
  for name in names[1:]:
    low, high = result['ci95'][f'{name} minus fixed grid']
    gap = result['metrics'][name] - result['metrics']['fixed grid']
    assert low <= gap <= high
  assert (finished / 'range.png').read_bytes().startswith(b'\x89PNG')


def test_resuming_trains_nothing_again(finished, monkeypatch):
  def refuse(*args, **kwargs):
    raise AssertionError('a finished search ran again')

  monkeypatch.setattr(search_digits.search.Trials, 'run', refuse)
  for path in finished.glob('trials/halving/*.json'):
    path.unlink()  # its rungs are still in the ledger
  assert job.main(['run', f'--workdir={finished}', '--resume']) == 0


def test_the_benchmark_prints_a_line_per_row(tmp_path, capsys):
  assert execute(trials, tmp_path / 'run') == 0
  lines = [x for x in capsys.readouterr().out.splitlines() if x[:1] == '{']
  row = json.loads(lines[0])
  assert len(lines) == 1 and row['row'] == 'mlp' and row['trials'] == 2
  assert set(row['seconds_per_step']) == {'vmapped', 'mapped', 'looped'}
  assert row['times_faster_than_looped']['looped'] == 1.0


def test_a_row_may_not_spend_more_than_the_grid(tmp_path, capsys):
  small = {**search_digits.SMALL, 'rows': 'halving', 'halving_trials': 8}
  argv = [f'--config.{k}={v}' for k, v in small.items()]
  config = f'--config={search_digits.__file__}'
  assert job.main(['run', config, f'--workdir={tmp_path}/run', *argv]) == 2
  said = capsys.readouterr().err.strip()
  assert 'a row of 96 steps and a budget of 64' in said
