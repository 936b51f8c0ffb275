"""One of two processes of a run; the second is told to stop on the way.

python tests/preempt_worker.py PROCESS_ID PORT WORKDIR OUT_FILE [--stop]
"""

import os
import signal
import sys
import time

import jax
import mesh_worker as worker
import numpy as np

from fmeta import sharding, train, tree

# Batches are read ahead: the signal comes while an earlier step runs.
STEPS, TOLD_AT = 40, 4


def source(stop):
  """The batches of the run; with `stop` paced, and one sends a SIGTERM."""
  batches = worker.source_of('full', np.float32)

  def paced(i):
    if i == TOLD_AT and jax.process_index() == 1:
      os.kill(os.getpid(), signal.SIGTERM)
    if i >= TOLD_AT:
      # The notice takes about a second to reach everyone.
      time.sleep(0.1)
    return batches(i)

  return paced if stop else batches


def fit(mesh, stop=False, **options):
  learner = worker.plain(worker.fmeta.full())
  state = learner.init(worker.parameters(np.float32), worker.RNG(2))
  return train.fit(
    learner,
    state,
    [train.Stage('plain', source(stop), STEPS)],
    jax.random.key(3),
    mesh=mesh,
    quiet=True,
    **options,
  )


def main(process_id, port, workdir, out, *flags):
  sharding.initialize_processes(
    2, int(process_id), f'127.0.0.1:{port}', timeout=30
  )
  stop = '--stop' in flags
  mesh = worker.mesh_of('data:2')
  fitted = fit(mesh, stop, workdir=workdir, resume=not stop)
  params = sharding.gather_to_host(fitted.params)
  if jax.process_index() == 0:
    np.savez(
      out,
      losses=[record['loss'] for record in fitted.history],
      **dict(zip(tree.names(params), jax.tree.leaves(params), strict=True)),
    )


if __name__ == '__main__':
  os.environ.setdefault('JAX_PLATFORMS', 'cpu')
  main(*sys.argv[1:])
