"""Small runs of every regime on any mesh; as a program, one of N processes.

python tests/mesh_worker.py PROCESS_ID NUM_PROCESSES PORT OUT_FILE

runs the regimes of `PROCESSES` over all processes and lets process 0 write
the gathered results as an .npz file.
"""

import functools
import os
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

import fmeta
from fmeta import data, episodes, evaluate, models, optim, sharding, tree

ROWS, FEATURES, CLASSES, BATCH, TASKS = 96, 8, 8, 16, 8
RNG = jax.random.PRNGKey
RULES = ((r'.*/kernel(\.lora_b)?', P(None, 'fsdp')), ('.*', P()))
# What two processes of two devices each run, and on which mesh.
PROCESSES = {'stream': 'data:2,fsdp:2', 'maml': 'fsdp:4'}

# LLVM's optimiser is most of these runs' time.
QUICK = {'xla_backend_optimization_level': 0}


def forward_of(dropout=0.0):
  module = models.Mlp((16, 16), CLASSES, dropout=dropout)
  return models.forward(module, ('x',))


FORWARD = forward_of()
LOSS = fmeta.supervised(FORWARD, fmeta.softmax_cross_entropy)
NOISY_LOSS = fmeta.supervised(forward_of(0.1), fmeta.softmax_cross_entropy)


def columns(dtype):
  rng = np.random.default_rng(0)
  x = rng.normal(size=(ROWS, FEATURES)).astype(dtype)
  # Each class eight times or more, so that every class makes episodes.
  return {'x': x, 'label': np.arange(ROWS, dtype=np.int32) % CLASSES}


def parameters(dtype):
  batch = {'x': np.zeros((1, FEATURES), np.float32)}
  module = models.Mlp((16, 16), CLASSES)
  params, _ = models.init(module, RNG(1), batch, ('x',))
  return jax.tree.map(lambda x: x.astype(dtype), params)


def plain(tuning, loss=LOSS):
  return fmeta.finetune(loss, optim.adamw(1e-2), tuning=tuning)


def maml():
  inner = fmeta.finetune(LOSS, optim.sgd(0.1))
  return fmeta.finetune(
    fmeta.episode_loss(inner, LOSS, 2), optim.adam(1e-2, eps_root=1e-8)
  )


def stream(dtype):
  spec = {
    'x': jax.ShapeDtypeStruct((FEATURES,), dtype),
    'label': jax.ShapeDtypeStruct((), jnp.int32),
  }
  learner = fmeta.finetune(
    LOSS,
    optim.adamw(1e-2),
    penalty=fmeta.ewc(10.0, fmeta.fisher.empirical_fisher),
  )
  return fmeta.rehearse(learner, fmeta.reservoir(24, spec), 8)


def learner_of(regime, dtype):
  makers = {
    'full': lambda: plain(fmeta.full(), NOISY_LOSS),
    'select': lambda: plain(fmeta.select('body/layer_1/.*', 'head/.*')),
    'lora': lambda: plain(
      fmeta.lora('body/.*/kernel', rank=4, also=('head/.*',))
    ),
    'maml': maml,
    'stream': lambda: stream(dtype),
  }
  return makers[regime]()


def source_of(regime, dtype):
  """`i -> batch`, the same for every mesh and number of processes."""
  if regime == 'maml':
    return episodes.episodes(columns(dtype), 4, 1, 2, seed=5, tasks=TASKS)
  return data.batches(columns(dtype), BATCH, seed=5)


def mesh_of(text):
  return sharding.make_mesh(sharding.parse_mesh(text, jax.device_count()))


def rules_for(mesh):
  """Small kernels are split only when asked; a data mesh splits none."""
  return RULES if 'fsdp' in mesh.shape else ()


def start(regime, mesh, dtype=np.float32):
  """A learner, its placed state, and its jitted step."""
  learner = learner_of(regime, dtype)
  state = jax.jit(learner.init)(parameters(dtype), RNG(2))
  if mesh is None:
    return learner, state, jax.jit(learner.step, compiler_options=QUICK)
  rules = rules_for(mesh)
  placed = sharding.state_shardings(state, mesh, rules)
  step = jax.jit(
    learner.step, out_shardings=(placed, None), compiler_options=QUICK
  )
  return learner, sharding.place_state(state, mesh, rules), step


def end_task(learner, state, batches, mesh):
  where = None
  if mesh is not None:
    where = sharding.state_shardings(state, mesh, rules_for(mesh))
  finish = jax.jit(
    lambda state, batches: learner.end_task(state, FORWARD, batches, RNG(4)),
    out_shardings=where,
    compiler_options=QUICK,
  )
  return finish(state, batches)


def put(batch, mesh):
  return batch if mesh is None else sharding.place_batch(batch, mesh)


def run(regime, mesh, dtype=np.float32, num_steps=20):
  """Parameters after the first and the last step, memory, final state."""
  learner, state, step = start(regime, mesh, dtype)
  source, first = source_of(regime, dtype), None
  for i in range(num_steps):
    state, _ = step(state, put(source(i), mesh), RNG(3))
    first = learner.params(state) if i == 0 else first
    if regime == 'stream' and i == num_steps // 2:
      batches = [put(source(j), mesh) for j in range(2)]
      state = end_task(learner, state, batches, mesh)
  found = {
    'first': first,
    'last': learner.params(state),
    'memory': state.memory,
  }
  return sharding.gather_to_host(found)


@functools.cache
def on_one_device(regime, dtype=np.float32):
  return run(regime, None, dtype)


def flat(found):
  return dict(zip(tree.names(found), jax.tree.leaves(found), strict=True))


def _check_rows(mesh):
  """Own rows and the whole batch give the same global array, bit by bit."""
  index, count = jax.process_index(), jax.process_count()
  for regime in ('full', 'maml'):
    batch = source_of(regime, np.float32)(0)
    own = data.rows_of_process(batch, index, count)
    whole = sharding.gather_to_host(sharding.place_batch(batch, mesh))
    pieces = sharding.gather_to_host(sharding.place_process_rows(own, mesh))
    jax.tree.map(np.testing.assert_array_equal, whole, batch)
    jax.tree.map(np.testing.assert_array_equal, pieces, batch)


def answers(mesh):
  """Logits of the adapted start, parameters over the mesh."""
  learner, state, _ = start('maml', mesh)
  inner = fmeta.finetune(LOSS, optim.sgd(0.1))
  predict = fmeta.predict_episodes(inner, FORWARD, 2)
  source = source_of('maml', np.float32)
  return evaluate.answer_episodes(
    predict, learner.params(state), source, 2 * TASKS
  ).logits


def main(process_id, num_processes, port, out):
  jax.config.update('jax_numpy_rank_promotion', 'raise')
  sharding.initialize_processes(
    int(num_processes), int(process_id), f'127.0.0.1:{port}', timeout=30
  )
  _check_rows(mesh_of('data:2,fsdp:2'))
  results = {'answers': answers(mesh_of('fsdp:4'))}
  for regime, text in PROCESSES.items():
    found = run(regime, mesh_of(text), num_steps=20)
    results |= {f'{regime}/{k}': v for k, v in flat(found).items()}
  if jax.process_index() == 0:
    np.savez(out, **results)


if __name__ == '__main__':
  os.environ.setdefault('JAX_PLATFORMS', 'cpu')
  main(*sys.argv[1:])
