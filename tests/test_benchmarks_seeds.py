"""The benchmark of seeds: its sides take the same steps, and it runs."""

import json

import jax
import numpy as np
import pytest

from experiments import run
from experiments.benchmarks import seeds
from fmeta.seeds import one_seed
from fmeta.testing import assert_close

CONFIG = seeds.Config(**seeds.SMALL)


@pytest.mark.parametrize('row', ['ewc', 'er'])
def test_both_sides_take_the_same_steps(row):
  together = seeds.Side(True, 'tiny', row, CONFIG)
  in_turn = seeds.Side(False, 'tiny', row, CONFIG)
  before = [np.asarray(x) for x in jax.tree.leaves(in_turn.runs[1].moving)]
  for side in (together, in_turn):
    side(4)
    assert side.program.traces == 1
  (run_of_all,) = together.runs
  assert len(in_turn.runs) == 2
  for k, alone in enumerate(in_turn.runs):
    mine = one_seed(run_of_all.moving, k)
    # Measured after these four Adam steps: 2e-7.
    assert_close(alone.moving, mine, f'seed {k}', 1e-6)
    assert int(mine.step) == 4
  after = jax.tree.leaves(in_turn.runs[1].moving)
  assert sum((a != b).any() for a, b in zip(before, after, strict=True)) > 4


@pytest.mark.oracle  # Two processes that compile.
def test_a_line_per_shape_and_row(tmp_path, capsys):
  argv = ['run', f'--config={seeds.__file__}', f'--workdir={tmp_path}/run']
  for name, value in seeds.SMALL.items():
    value = ','.join(map(str, value)) if isinstance(value, tuple) else value
    argv.append(f'--config.{name}={value}')
  assert run.main(argv) == 0
  lines = [x for x in capsys.readouterr().out.splitlines() if x[:1] == '{']
  assert [json.loads(x)['shape'] for x in lines] == ['tiny']
  assert json.loads(lines[0])['ratio'] > 0


@pytest.mark.parametrize(
  ('changes', 'said'),
  [
    ({'rows': ('gem',)}, "no 'gem'; possible: naive"),
    ({'shapes': ('huge',)}, "no 'huge'; possible: tiny"),
    ({'steps': 5}, 'no whole number of dispatches'),
    ({'seeds': 0}, 'config.seeds is 0'),
    ({'pairs': 1}, 'config.pairs is 1'),
    ({'memory_size': 3}, 'er replays 16 rows a step from a memory of 3'),
  ],
)
def test_misuse_is_one_line(changes, said):
  with pytest.raises(ValueError, match=said):
    seeds.check(seeds.Config(**{**seeds.SMALL, **changes}))
