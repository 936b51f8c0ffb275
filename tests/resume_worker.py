"""Trains a tiny model in one regime and kills it on the way.

  python tests/resume_worker.py REGIME FOLDER '[["step", 3, "SIGKILL"], ...]'

Runs uninterrupted in FOLDER/whole, then in FOLDER/killed one process after
the other, each resuming from where the last one died. A death by `step` comes
when that step has been logged, one by `save` when that step's checkpoint is
written but not yet committed, one by `look` inside the importance pass of that
task. Prints the exit statuses.
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
import jax.numpy as jnp
import numpy as np
import optax
import tensorboardX  # noqa: F401
from orbax.checkpoint import v1  # noqa: F401

import fmeta
from fmeta import optim, train
from fmeta.train import checkpoint, log

NUM_STEPS, EVERY = 14, 4  # of the stream: two tasks of 7
LENGTHS = (5, 4, 5)  # of the phases


def forward(params, model_state, batch, rng):
  hidden = jnp.tanh(batch['x'] @ params['body']['kernel'])
  if rng is not None:
    kept = jax.random.bernoulli(rng, 0.8, hidden.shape)
    hidden = jnp.where(kept, hidden / 0.8, 0)
  return hidden @ params['head']['kernel'], model_state


def parameters():
  keys = jax.random.split(jax.random.key(0), 2)
  return {
    'body': {'kernel': 0.4 * jax.random.normal(keys[0], (6, 8))},
    'head': {'kernel': 0.4 * jax.random.normal(keys[1], (8, 3))},
  }


def rows(seed, index, size):
  draw = np.random.default_rng((seed, index))
  x = draw.normal(size=(size, 6)).astype(np.float32)
  return {'x': x, 'label': x[:, :3].argmax(-1).astype(np.int32)}


def tasks(index):
  drawn = [(rows(5, 10 * index + t, 8)) for t in range(3)]
  both = {k: np.stack([d[k] for d in drawn]) for k in drawn[0]}
  return {
    'support': {k: v[:, :4] for k, v in both.items()},
    'query': {k: v[:, 4:] for k, v in both.items()},
  }


def setting(regime):
  """(learner, stages, options of `fit`)."""
  loss = fmeta.supervised(forward, fmeta.softmax_cross_entropy)
  if regime == 'plain':
    learner = fmeta.finetune(loss, optax.adamw(1e-2))
    stage = train.Stage('train', lambda i: rows(1, i, 8), NUM_STEPS)
    return learner, [stage], {'steps_per_dispatch': 3}
  if regime == 'meta':
    inner = fmeta.finetune(loss, optim.sgd(0.1))
    learner = fmeta.finetune(
      fmeta.episode_loss(inner, loss, 2), optax.adam(1e-2)
    )
    return learner, [train.Stage('meta', tasks, NUM_STEPS)], {}
  if regime == 'phases':
    # The head freezes in the second phase and thaws in the third.
    return in_phases(loss)
  return stream(loss, regime)


class Looked(list):
  """What an importance pass reads of a task, batch after batch."""

  die_in = {}  # task -> signal

  def __init__(self, task, batches):
    super().__init__(batches)
    self.task = task

  def __iter__(self):
    for number, batch in enumerate(list.__iter__(self)):
      if number == 1 and self.task in self.die_in:
        os.kill(os.getpid(), self.die_in[self.task])
      yield batch


def stream(loss, method):
  penalty = fmeta.ewc(5.0) if method == 'ewc' else None
  learner = fmeta.finetune(loss, optax.adam(1e-2), penalty=penalty)
  if method == 'er':
    spec = {k: v[0] for k, v in rows(0, 0, 1).items()}
    learner = fmeta.rehearse(learner, fmeta.reservoir(12, spec), 4)

  def seen(t):
    return Looked(t, [rows(20 + t, i, 6) for i in range(2)])

  stages = [
    train.Stage(
      f'task_{t}',
      lambda i, t=t: rows(20 + t, i, 6),
      7,
      seen(t) if method == 'ewc' else (),
    )
    for t in range(2)
  ]
  options = {
    'forward': forward,
    'after_stage': lambda params, model_state, index: [
      float(jnp.abs(params['head']['kernel']).sum())
    ],
    'steps_per_dispatch': 2,
  }
  return learner, stages, options


def in_phases(loss):
  tunings = [fmeta.select('head/.*'), fmeta.select('body/.*'), fmeta.full()]
  phased = train.Phased(
    fmeta.phases(zip(LENGTHS, tunings, strict=True)),
    lambda tuning: fmeta.finetune(
      loss,
      fmeta.adamw_per_leaf(1e-2),
      tuning=tuning,
      penalty=fmeta.l2_sp(0.1),
    ),
  )
  stages = phased.stages('task', lambda i: rows(1, i, 8))
  return phased.learners[0], stages, {}


def kill_after_step(step, number):
  write = log.Metrics.write

  def writing(self, record):
    write(self, record)
    if record['step'] == step:
      os.kill(os.getpid(), number)

  log.Metrics.write = writing


def kill_before_commit(step, number):
  """Between Orbax' last write and the rename that commits it."""

  def wrap(rename):
    def renaming(source, target, **kwargs):
      if pathlib.Path(target).name == str(step):
        os.kill(os.getpid(), number)
      return rename(source, target, **kwargs)

    return renaming

  os.rename, os.replace = wrap(os.rename), wrap(os.replace)


def live(regime, workdir, resume, death):
  """One life of a run: from its last checkpoint to its death or its end."""
  if death:
    kind, place, name = death
    kill = {
      'step': kill_after_step,
      'save': kill_before_commit,
      'look': Looked.die_in.__setitem__,
    }[kind]
    kill(place, getattr(signal, name))
  learner, stages, options = setting(regime)
  fitted = train.fit(
    learner,
    learner.init(parameters(), jax.random.key(1)),
    stages,
    jax.random.key(2),
    workdir=workdir,
    resume=resume,
    checkpoint_every=EVERY,
    quiet=True,
    **options,
  )
  arrays = checkpoint.by_name(fitted.state)
  arrays['matrix'] = np.asarray(fitted.matrix)
  # What is random is a function of the root key and of where the run is.
  host = checkpoint.Checkpoints(workdir / 'checkpoints', 2).host(fitted.steps)
  arrays['key'] = np.asarray(host['key'])
  arrays['progress'] = np.asarray(json.dumps(host['progress']))
  np.savez(workdir / 'final.npz', **arrays)


def fork(*args):
  """Runs `live` in a child and gives its status as a shell would."""
  sys.stdout.flush()
  child = os.fork()
  if child == 0:
    status = 1
    try:
      live(*args)
      status = 0
    except SystemExit as error:
      status = error.code
    except BaseException:  # Printed: a forked child must end here, always.
      traceback.print_exc()
    os._exit(status)
  return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main():
  regime, folder, deaths = sys.argv[1:]
  folder = pathlib.Path(folder)
  statuses = [fork(regime, folder / 'whole', False, None)]
  for number, death in enumerate([*json.loads(deaths), None]):
    statuses.append(fork(regime, folder / 'killed', number > 0, death))
  print(json.dumps(statuses))


if __name__ == '__main__':
  # The imports are paid once; nothing has run on a device yet, so no thread
  # of jax is lost in the fork that it warns of.
  warnings.filterwarnings('ignore', message='os.fork', category=RuntimeWarning)
  main()
