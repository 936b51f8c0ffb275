"""Optuna proposes; a kill costs one trial at most."""

import collections
import math
import pathlib
import subprocess
import sys

import pytest

from fmeta import search
from fmeta.errors import UsageError
from fmeta.train import Diverged

optuna = pytest.importorskip('optuna')
ROOT = pathlib.Path(__file__).resolve().parents[1]
RATE = optuna.distributions.FloatDistribution(1e-3, 1.0, log=True)
SPACE = {'rate': RATE}


@pytest.fixture(autouse=True)
def quiet():
  optuna.logging.set_verbosity(optuna.logging.WARNING)


def squared(settings):
  return -(math.log10(settings['rate'] / 0.05) ** 2)


def test_killed_searches_resume_without_repeating_finished_work(tmp_path):
  done = subprocess.run(
    [sys.executable, str(ROOT / 'tests' / 'search_worker.py'), str(tmp_path)],
    capture_output=True,
    text=True,
    cwd=ROOT,
    env={'PYTHONPATH': f'{ROOT}:{ROOT / "tests"}', 'JAX_PLATFORMS': 'cpu'},
  )
  assert done.stdout == 'halving 0 -9 0\noptuna 0 -9 0\n', done.stderr
  for name in ('halving', 'optuna'):
    whole, killed = tmp_path / 'whole' / name, tmp_path / 'killed' / name
    expected = (whole / 'found.json').read_bytes()
    assert (killed / 'found.json').read_bytes() == expected
    pieces = (whole / 'work.log').read_text().splitlines()
    assert len(set(pieces)) == len(pieces) == (3 if name == 'halving' else 14)
    # Only what was running when the process died was done twice.
    again = collections.Counter((killed / 'work.log').read_text().splitlines())
    again.subtract(pieces)
    running = pieces[1] if name == 'halving' else pieces[3]
    assert +again == {running: 1} and not -again


def test_proposals_get_better_and_a_longer_search_continues(tmp_path):
  storage = tmp_path / 'search.journal'
  study = search.optuna_search(squared, SPACE, num_trials=12, storage=storage)
  assert abs(math.log10(study.best_params['rate'] / 0.05)) < 0.5
  calls = []

  def counted(settings):
    calls.append(settings)
    return squared(settings)

  study = search.optuna_search(counted, SPACE, num_trials=15, storage=storage)
  assert len(study.trials) == 15 and len(calls) == 3


def test_a_diverged_trial_counts_as_the_worst(tmp_path):
  def objective(settings):
    if settings['rate'] > 0.3:
      raise Diverged('the loss is nan')
    return math.nan if settings['rate'] > 0.1 else squared(settings)

  study = search.optuna_search(
    objective, SPACE, num_trials=10, storage=tmp_path / 'a'
  )
  values = {t.params['rate']: t.value for t in study.trials}
  assert len(values) == 10 and any(rate > 0.3 for rate in values)
  for rate, value in values.items():
    assert value == (-math.inf if rate > 0.1 else squared({'rate': rate}))
  minimised = search.optuna_search(
    lambda settings: math.nan,
    SPACE,
    num_trials=1,
    storage=tmp_path / 'b',
    direction='minimize',
  )
  assert minimised.trials[0].value == math.inf


def test_a_bug_in_the_objective_keeps_its_traceback(tmp_path):
  storage = tmp_path / 'a'
  with pytest.raises(ZeroDivisionError):
    search.optuna_search(
      lambda settings: 1 / 0, SPACE, num_trials=2, storage=storage
    )
  study = search.optuna_search(squared, SPACE, num_trials=2, storage=storage)
  finished = study.get_trials(states=[optuna.trial.TrialState.COMPLETE])
  assert len(finished) == 2


def asked(tmp_path, space=SPACE, name='a', **options):
  options = {'num_trials': 1, 'storage': tmp_path / name, **options}
  return search.optuna_search(squared, space, **options)


BAD = {
  'empty': (lambda p: asked(p, {}), 'an empty search space'),
  'no distribution': (
    lambda p: asked(p, {'rate': (0, 1)}),
    "'rate' is (0, 1); give an optuna distribution",
  ),
  'trials': (lambda p: asked(p, num_trials=0), 'num_trials=0'),
  'direction': (lambda p: asked(p, direction='up'), "direction='up'"),
  'other space': (
    lambda p: (
      asked(p),
      asked(p, {'rate': optuna.distributions.FloatDistribution(0, 1)}),
    ),
    "a search with another 'rate'",
  ),
  'other seed': (
    lambda p: (asked(p), asked(p, seed=1)),
    "another 'seed of the search'",
  ),
  'no journal': (
    lambda p: ((p / 'b').write_text('text\n'), asked(p, name='b')),
    'cannot be used as a journal',
  ),
  'no folder': (
    lambda p: ((p / 'c').write_text(''), asked(p, name='c/d')),
    'cannot be used as a journal',
  ),
}


@pytest.mark.parametrize('name', BAD)
def test_bad_input_is_told_in_one_line(name, tmp_path):
  call, words = BAD[name]
  with pytest.raises(UsageError) as caught:
    call(tmp_path)
  assert words in str(caught.value) and '\n' not in str(caught.value)


def test_without_optuna_the_extra_is_named(monkeypatch, tmp_path):
  monkeypatch.setitem(sys.modules, 'optuna', None)
  with pytest.raises(UsageError, match=r"pip install 'fmeta\[search\]'"):
    search.optuna_search(squared, SPACE, num_trials=1, storage=tmp_path / 'a')
