"""Runs two searches, kills each once on the way, and resumes them.

  python tests/search_worker.py FOLDER

FOLDER/whole holds the uninterrupted searches, FOLDER/killed those that died:
halving while its second rung is scored, Optuna's in its fourth trial. Every
piece of work appends a line to `work.log`. Prints the exit statuses.
"""

import json
import os
import pathlib
import signal
import sys
import traceback
import warnings

import grain  # noqa: F401, imported once for all lives
import jax
import numpy as np
import optuna
import search_toys as toys
from optuna.storages import journal  # noqa: F401

from fmeta import search

HYPER = {'rate': np.geomspace(0.01, 0.5, 4)}
SPACE = {
  'rate': optuna.distributions.FloatDistribution(1e-3, 1.0, log=True),
  'rank': optuna.distributions.CategoricalDistribution([2, 4, 8]),
}
NUM_TRIALS = 14  # the sampler draws at random for ten, then learns


def work(folder, line):
  """Notes a piece of work; says how many there are."""
  with open(folder / 'work.log', 'a') as log:
    log.write(line + '\n')
  return len((folder / 'work.log').read_text().splitlines())


def die():
  os.kill(os.getpid(), signal.SIGKILL)


def halve(folder, dies):
  trials = search.Trials(toys.plain_of)
  rng = jax.random.key(0)
  held_out = [{'c': np.zeros(3, np.float32)}]
  measure = search.validation(trials, toys.loss, held_out, '-loss')

  def score(state, hyper):
    count = work(folder, f'rung of {len(hyper["rate"])}')
    if dies and count == 2:
      die()
    return measure(state, hyper)

  found = search.halving(
    trials,
    trials.init(toys.PARAMS, HYPER, rng),
    HYPER,
    toys.batches,
    rng,
    score,
    search.rungs(4, 8, eta=2),
    ledger=search.Ledger(folder / 'ledger'),
  )
  x = np.asarray(found.state.trainable['x']).tobytes().hex()
  (folder / 'found.json').write_text(json.dumps([found.rungs, x]))


def propose(folder, dies):
  def objective(settings):
    count = work(folder, json.dumps(settings, sort_keys=True))
    if dies and count == 4:
      die()
    return -abs(np.log(settings['rate'] / 0.1)) - settings['rank']

  study = search.optuna_search(
    objective,
    SPACE,
    num_trials=NUM_TRIALS,
    storage=folder / 'deep' / 'search.journal',
    seed=3,
  )
  finished = optuna.trial.TrialState.COMPLETE
  told = [[t.params, t.value] for t in study.get_trials(states=[finished])]
  (folder / 'found.json').write_text(json.dumps(told, sort_keys=True))


def life(search_once, folder, dies=False):
  """Runs a search in a child; its exit status, negative for a signal."""
  folder.mkdir(parents=True, exist_ok=True)
  with warnings.catch_warnings():
    # No computation ran in this process, so no thread holds a lock.
    warnings.simplefilter('ignore')
    pid = os.fork()
  if pid == 0:
    try:
      search_once(folder, dies)
      os._exit(0)
    except BaseException:  # a child must not run its parent's exit
      traceback.print_exc()
      os._exit(1)
  return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def main(root):
  optuna.logging.set_verbosity(optuna.logging.WARNING)
  for name, search_once in (('halving', halve), ('optuna', propose)):
    whole, killed = root / 'whole' / name, root / 'killed' / name
    statuses = [
      life(search_once, whole),
      life(search_once, killed, dies=True),
      life(search_once, killed),
    ]
    print(name, *statuses, flush=True)


if __name__ == '__main__':
  main(pathlib.Path(sys.argv[1]))
