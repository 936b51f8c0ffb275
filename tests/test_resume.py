"""A killed run, resumed, equals an uninterrupted one bit by bit."""

import json
import os
import pathlib
import random
import signal
import subprocess
import sys

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
SEED = 20261123
SAVES = {
  'plain': [4, 8, 12],
  'meta': [4, 8, 12],
  # At a boundary; three deaths in three phases.
  'phases': [9],
}
STREAMS = 'naive', 'ewc', 'er'  # two tasks of seven steps


def deaths_of(regime):
  """SIGKILL at a step, SIGKILL during a save, SIGTERM at a step; in order.

  Of a stream, all by SIGKILL: within its first task, at the boundary while
  that is saved, and within the last task; EWC's last is inside the importance
  pass at that task's end.
  """
  draw = random.Random(f'{SEED} {regime}')
  if regime in STREAMS:
    last = ('look', 1) if regime == 'ewc' else ('step', draw.randrange(8, 14))
    deaths = [('step', draw.randrange(1, 7)), ('save', 7), last]
    return [(*death, 'SIGKILL') for death in deaths]
  save = draw.choice(SAVES[regime])
  before, after = draw.randrange(1, save + 1), draw.randrange(save + 1, 14)
  return [
    ('step', before, 'SIGKILL'),
    ('save', save, 'SIGKILL'),
    ('step', after, 'SIGTERM'),
  ]


def lives(regime, folder, cache):
  environment = {
    **os.environ,
    'PYTHONPATH': str(ROOT),
    'XLA_FLAGS': '',
    'JAX_PLATFORMS': 'cpu',
    'JAX_COMPILATION_CACHE_DIR': str(cache),
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
    'JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES': '-1',
  }
  worker = ROOT / 'tests' / 'resume_worker.py'
  deaths = deaths_of(regime)
  print(f'{regime}: seed {SEED}, deaths {deaths}')
  done = subprocess.run(
    [sys.executable, str(worker), regime, str(folder), json.dumps(deaths)],
    env=environment,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  return json.loads(done.stdout), done.stderr


@pytest.fixture(scope='module')
def cache(tmp_path_factory):
  """Programs that lives and regimes have in common are compiled once."""
  return tmp_path_factory.mktemp('cache')


@pytest.mark.parametrize('regime', [*SAVES, *STREAMS])
def test_killed_run_equals_uninterrupted_run_bitwise(regime, tmp_path, cache):
  statuses, errors = lives(regime, tmp_path, cache)
  kill = -signal.SIGKILL
  third = kill if regime in STREAMS else 143
  assert statuses == [0, kill, kill, third, 0], errors
  whole, killed = tmp_path / 'whole', tmp_path / 'killed'
  with np.load(whole / 'final.npz') as a, np.load(killed / 'final.npz') as b:
    assert set(a) == set(b) and {'trainable/head/kernel', 'key'} <= set(a)
    for name in a:
      np.testing.assert_array_equal(a[name], b[name], err_msg=name)
    assert len(a['matrix']) == (2 if regime in STREAMS else 0)
    # What each method remembers is there, and is something.
    held = {
      'ewc': 'penalty_state/importance/head/kernel',
      'er': 'memory/rows/x',
    }
    assert {m for m, name in held.items() if name in a} == {regime} & set(held)
    if regime in held:
      assert a[held[regime]].any()
  # Also the loss trace: hex floats, no step missing and none twice.
  assert (whole / 'metrics.jsonl').read_bytes() == (
    killed / 'metrics.jsonl'
  ).read_bytes()
  lines = (whole / 'metrics.jsonl').read_text().splitlines()
  assert [json.loads(line)['step'] for line in lines] == list(range(1, 15))
