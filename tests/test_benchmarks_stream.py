"""A stream's steps do not depend on how many tasks went before."""

import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from experiments import run
from experiments.benchmarks import stream_throughput as throughput
from fmeta import train, tree

CONFIG = throughput.Config(**throughput.SMALL)


@pytest.mark.parametrize('row', throughput.ROWS)
def test_the_twentieth_task_runs_the_program_of_the_first(row):
  config = throughput.Config(**{**throughput.SMALL, 'tasks': 20})
  stream = throughput.Stream(row, config)
  first, last = stream.states
  assert (int(first.step), int(last.step)) == (0, 19 * config.task_steps)
  stream.seconds(1)
  assert stream.program.traces == 1
  # Compiled for that state alone, it costs the same.
  fresh = stream.program
  stream.program = train.Resident(stream.learner, stream.columns)
  stream.seconds(1)
  assert stream.program.flops_per_step == fresh.flops_per_step > 0
  assert stream.program.peak_bytes == fresh.peak_bytes > 0
  assert tree.num_bytes(first) == tree.num_bytes(last)


def test_the_last_task_s_state_is_one_that_remembers():
  importance = throughput.Stream('ewc', CONFIG).states[1].penalty_state
  assert all(map(np.any, jax.tree.leaves(importance['importance'])))
  held = throughput.Stream('er', CONFIG).states[1].memory
  assert held['seen'] == (CONFIG.tasks - 1) * CONFIG.task_steps * 4


def test_half_the_speed_at_the_end_is_a_ratio_of_one_half(monkeypatch):
  order = []

  def seconds(which):
    order.append(which)
    return (0.1, 0.2)[which]

  fake = SimpleNamespace(
    seconds=seconds,
    states=({}, {}),
    program=SimpleNamespace(traces=1),
    evaluate_seconds=lambda: 0.003,
    end_task_seconds=lambda which: (0.004, 0.005)[which],
    looks=True,
  )
  monkeypatch.setattr(throughput, 'Stream', lambda row, config: fake)
  line = throughput.measure('ewc', CONFIG)
  assert line['ratio'] == 0.5 and line['ci95'] == [0.5, 0.5]
  assert line['steps_per_second'] == [10, 5]
  assert line['end_task_ms'] == [4, 5] and line['evaluate_ms'] == 3
  # A warm-up of both, then turns whose order is reversed in between.
  assert order == [0, 1, 0, 1, 1, 0]


def test_a_line_per_row(tmp_path, capsys):
  argv = ['run', f'--config={throughput.__file__}', f'--workdir={tmp_path}/run']
  for name, value in throughput.SMALL.items():
    value = ','.join(map(str, value)) if isinstance(value, tuple) else value
    argv.append(f'--config.{name}={value}')
  assert run.main(argv) == 0
  lines = [x for x in capsys.readouterr().out.splitlines() if x[:1] == '{']
  found = {line['row']: line for line in map(json.loads, lines)}
  assert set(found) == {'ewc', 'er'}
  assert all(line['programs'] == 1 for line in found.values())
  assert 'end_task_ms' in found['ewc'] and 'end_task_ms' not in found['er']


@pytest.mark.parametrize(
  ('changes', 'said'),
  [
    ({'rows': ('naive', 'gemm')}, "no 'gemm'"),
    ({'steps': 3}, '3 steps are no whole number of dispatches of 2'),
    ({'task_steps': 1}, 'change --config.task_steps'),
    ({'tasks': 1}, 'config.tasks is 1'),
  ],
)
def test_misuse_is_one_line(changes, said):
  config = throughput.Config(**{**throughput.SMALL, **changes})
  with pytest.raises(ValueError, match=said):
    throughput.check(config)
