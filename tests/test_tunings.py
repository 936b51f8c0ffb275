"""Every tuning, in every regime: resumed bit by bit, eight devices like one."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_methods as methods

from fmeta import (
  adapters,
  memory,
  models,
  optim,
  penalty,
  surgical,
  tuning,
)
from fmeta.learner import finetune, rehearse
from fmeta.meta import episode_loss
from fmeta.testing import assert_close, assert_same
from fmeta.types import Batch, LossFn, Params, Penalty, Tuning


class Problem(NamedTuple):
  """What is tuned: `batch` has eight rows."""

  loss: LossFn
  forward: Any
  params: Params
  batch: Batch


NET = Problem(
  methods.ENTERING,
  adapters.entering(methods.FORWARD),
  methods.PARAMS,
  methods.BATCH,
)
TEXT = jax.tree.map(lambda x: jnp.concatenate([x, x]), methods.TEXT)
BERT = Problem(
  methods.OF_TEXT,
  models.forward(methods.BERT),
  # No leaf at zero, where a gradient of rounding errors would be all of it.
  methods.grown(models.init(methods.BERT, jax.random.key(0), TEXT)[0]),
  TEXT,
)
HEAD, MATRICES = 'head/.*', methods.MATRICES
FRESH = adapters.reinitialise(
  NET.params, ('body/layer_1/.*',), jax.random.key(3)
)
WORDS = 'body/embeddings/word/embedding'
ADAMW, SGD = methods.CLIPPED, methods.SGD


class Row(NamedTuple):
  """A tuning on a problem, how it moves and what holds it in a stream."""

  tuning: Tuning
  problem: Problem = NET
  optimizer: Any = ADAMW
  penalty: Penalty = penalty.ewc(1.0)


ROWS = {
  'full': Row(tuning.full()),
  'probe': Row(tuning.select(HEAD)),
  'surgical': Row(methods.SURGERY),
  'auto_surgical': Row(
    surgical.auto_surgical(NET.loss, NET.params, [NET.batch], also=(HEAD,))
  ),
  'bitfit': Row(adapters.bitfit(also=(HEAD,))),
  'norm_tuning': Row(adapters.norm_tuning(also=(HEAD,)), BERT),
  'reinitialise': Row(tuning.full(), NET._replace(params=FRESH)),
  'lora': Row(methods.LORA),
  'lora of a table': Row(adapters.lora(WORDS, rank=2, also=(HEAD,)), BERT),
  'lora_merged': Row(adapters.lora_merged(MATRICES, rank=2)),
  'lora_plus': Row(
    methods.LORA,
    optimizer=optim.adamw(0.01, multipliers=adapters.lora_plus()),
  ),
  'lora_fa': Row(adapters.lora_fa(MATRICES, rank=2, also=(HEAD,))),
  'rslora': Row(adapters.rslora(MATRICES, rank=2)),
  'dora': Row(adapters.dora(MATRICES, rank=2)),
  'pissa': Row(methods.PISSA),
  'vera': Row(adapters.vera(MATRICES, rank=7)),
  'ia3': Row(methods.IA3),
  'bottleneck': Row(methods.BOTTLENECK),
  # EWC refuses it: no leaf of it belongs to one parameter.
  'subspace': Row(methods.SUBSPACE, penalty=penalty.no_penalty()),
  'prefix': Row(methods.PREFIX, BERT),
  'prompt': Row(methods.PROMPT, BERT),
}
# Each penalty that learns at a task's end, in a stream, on factors.
REMEMBERING = {
  name: Row(methods.LORA, penalty=each)
  for name, each in methods.LEARNING.items()
}
# Compiling is slow: the others run with --oracles.
OFTEN = {
  'plain': set(ROWS),
  'maml': {'lora', 'subspace'},
  'stream': {'surgical', 'ia3', 'lwf'},
}


def plain(row):
  """Fine-tuning."""
  learner = finetune(row.problem.loss, row.optimizer, tuning=row.tuning)
  return learner, row.problem.batch, lambda state: state


def maml(row):
  """The tuning inside: born, moved and differentiated in every episode."""
  inner = finetune(row.problem.loss, SGD, tuning=row.tuning)
  # A slot of a key's bias, whose gradient is zero, would be rounding errors.
  outer = optim.sgd(0.1, clip_norm=1.0)
  learner = finetune(episode_loss(inner, row.problem.loss, 1), outer)
  pairs = jax.tree.map(lambda x: jnp.stack([x[:2]] * 8), row.problem.batch)
  turned = jax.tree.map(lambda x: jnp.roll(x, 1, axis=0), row.problem.batch)
  query = jax.tree.map(lambda x: x[:, None], turned)
  return learner, {'support': pairs, 'query': query}, lambda state: state


def stream(row):
  """EWC and a memory; a task ends after the first step."""
  batch = row.problem.batch
  spec = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), dict(batch)
  )
  learner = rehearse(
    finetune(
      row.problem.loss,
      row.optimizer,
      tuning=row.tuning,
      penalty=row.penalty,
    ),
    memory.reservoir(8, spec),
    4,
  )

  def end(state):
    key = jax.random.key(5)
    return learner.end_task(state, row.problem.forward, [batch], key)

  return learner, batch, end


REGIMES = {'plain': plain, 'maml': maml, 'stream': stream}


def cells():
  rare = [pytest.mark.oracle]
  return [
    pytest.param(name, regime, marks=[] if name in often else rare)
    for regime, often in OFTEN.items()
    for name in [*ROWS, *(REMEMBERING if regime == 'stream' else ())]
  ]


@pytest.mark.parametrize(('name', 'regime'), cells())
def test_a_tuning_resumes_bitwise_and_eight_devices_are_one(name, regime):
  row = {**ROWS, **REMEMBERING}[name]
  learner, batch, boundary = REGIMES[regime](row)
  key = jax.random.key(20)
  step = jax.jit(lambda state, batch, key: learner.step(state, batch, key)[0])
  start = learner.init(row.problem.params, jax.random.key(21))
  first = step(start, batch, key)
  moved = jax.tree.leaves(first.trainable)
  before = jax.tree.leaves(start.trainable)
  assert any(np.any(x != y) for x, y in zip(moved, before, strict=True))
  last = step(boundary(first), batch, key)
  # Through host memory, as a checkpoint goes; at the boundary, too.
  held = jax.tree.map(np.asarray, first)
  again = step(boundary(jax.tree.map(jnp.asarray, held)), batch, key)
  assert_same(last, again, 'save, restore, continue')
  spec, mesh = jax.sharding.PartitionSpec, methods.mesh()
  everywhere = jax.sharding.NamedSharding(mesh, spec())
  sharded = step(
    jax.device_put(start, everywhere),
    jax.device_put(batch, jax.sharding.NamedSharding(mesh, spec('data'))),
    jax.device_put(key, everywhere),
  )
  assert_close(first, sharded, 'eight devices = one', 1e-5)
