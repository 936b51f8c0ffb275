"""Memory of a meta-gradient, by how the inner loop is differentiated.

  FMETA_LESS_MEMORY=1 ./launch/local.sh \\
    --config=experiments/benchmarks/meta_memory.py

One 5-way 5-shot episode of a BERT of MiniLM's size with random weights,
compiled, and run only if `--config.execute=True`: the outer gradient of
LoRA-MAML (factors and head move in both loops) and of full MAML. One JSON line
per row, number of inner steps and way of `fmeta.through`, with and without
`BertConfig.remat` ("blocks");
"segments" is `in_segments` with the largest divisor up to the square root:

  temp_bytes          XLA's temporary buffers: all but arguments and results
  state_bytes         steps x bytes(trainable + optimiser state), which any
                      exact method that does not repeat steps has to keep;
                      of segments those of as many states as they keep
  ratio               temp_bytes over that of `first_order` at as many steps
  ratio_blocks        over that of `first_order+blocks`
  ratio_without       `ratio` after subtracting state_bytes from temp_bytes
  flops               as XLA counts them, each loop's body once: one inner
                      step forward, one backward, and the query's gradient
  seconds             of one gradient of random texts, if executed
  resident_mib        the most that the process has held until then, XLA's
                      compiler included
  finite              whether all of that gradient is

XLA's scheduler on CPU prefers concurrency to memory and computes what a
checkpoint leaves out long before it is needed. `FMETA_LESS_MEMORY=1` puts
`MEMORY_FIRST` into XLA_FLAGS (which must be there before the first
compilation); each line says whether it was.

`first_order` is FOMAML: its inner gradients are not differentiated and
nothing is kept per step, so its peak is that of one gradient, on the support
or on the query set. `growth` is that of temp_bytes - state_bytes from the
second to the last number of steps. Measured: experiments/README.md.
"""

import dataclasses
import json
import math
import os
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import fmeta
from experiments.benchmarks import paired
from fmeta import adapters, models, optim, through, tree
from fmeta.workdir import Context


def segments_of(steps: int) -> int:
  """The largest divisor up to the square root."""
  return max(n for n in range(1, math.isqrt(steps) + 1) if steps % n == 0)


def in_segments(loop: through.Loop) -> Any:
  """Segments about as long as there are many."""
  return through.in_segments(segments_of(loop.num_steps))(loop)


SEGMENTS = 'segments+blocks'
# Way, and whether the model's blocks are computed again in a backward pass.
WAYS = {
  'first_order': (through.first_order, False),
  'first_order+blocks': (through.first_order, True),
  'plain': (through.plain, False),
  'remat': (through.remat, False),
  'mixed': (through.mixed, False),
  'mixed+blocks': (through.mixed, True),
  SEGMENTS: (in_segments, True),
}
BASE, BLOCKS = 'first_order', 'first_order+blocks'
MEMORY_FIRST = '--xla_cpu_enable_concurrency_optimized_scheduler=false'
KERNELS = r'body/layer_\d+/.*kernel'


@dataclasses.dataclass
class Config:
  """Shapes; sizes of the model are MiniLM's (all-MiniLM-L6-v2)."""

  rows: tuple[str, ...] = ('lora', 'full')
  ways: tuple[str, ...] = tuple(WAYS)
  inner_steps: tuple[int, ...] = (1, 5, 20, 100)
  tasks: int = 1
  classes: int = 5
  shots: int = 5
  queries: int = 5
  length: int = 32
  rank: int = 8
  inner_lr: float = 0.1
  vocab_size: int = 30522
  hidden_size: int = 384
  num_layers: int = 6
  num_heads: int = 12
  intermediate_size: int = 1536
  execute: bool = False


SMALL = {
  'inner_steps': (1, 2, 3),
  'shots': 1,
  'queries': 1,
  'length': 8,
  'rank': 2,
  'vocab_size': 64,
  'hidden_size': 16,
  'num_layers': 2,
  'num_heads': 2,
  'intermediate_size': 32,
}


def module_of(config: Config, remat: bool) -> models.BertClassifier:
  """BERT of those sizes, without dropout."""
  sizes = {
    name: getattr(config, name)
    for name in (
      'vocab_size',
      'hidden_size',
      'num_layers',
      'num_heads',
      'intermediate_size',
    )
  }
  bert = models.BertConfig(
    dropout=0.0, attention_dropout=0.0, remat=remat, **sizes
  )
  return models.BertClassifier(bert, config.classes)


def episodes(config: Config) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
  """Shapes of a meta-batch."""

  def part(each):
    rows = (config.tasks, config.classes * each)
    shape = (*rows, config.length)
    return {
      'input_ids': jax.ShapeDtypeStruct(shape, jnp.int32),
      'attention_mask': jax.ShapeDtypeStruct(shape, jnp.int32),
      'label': jax.ShapeDtypeStruct(rows, jnp.int32),
    }

  return {'support': part(config.shots), 'query': part(config.queries)}


def learners(
  config: Config,
  row: str,
  num_steps: int,
  way: str,
  optimizer: Callable = optim.sgd,
) -> tuple[fmeta.Learner, fmeta.Learner, Callable]:
  """(outer learner, inner learner, key -> outer parameters)."""
  goes_through, remat = WAYS[way]
  module = module_of(config, remat)
  loss = fmeta.supervised(models.forward(module), fmeta.softmax_cross_entropy)
  ids = jnp.zeros((1, config.length), jnp.int32)

  def params_of(key):
    params = module.init(key, ids, ids)['params']
    if row == 'lora':
      # Born in the outer parameters, hence meta-learned.
      params = adapters.lora_init(params, key, (KERNELS,), config.rank)
    return params

  tunings = {
    'lora': (
      fmeta.lora(KERNELS, rank=config.rank, also=('head/.*',)),
      fmeta.select(r'.*\.lora_[ab]', 'head/.*'),
    ),
    'full': (fmeta.full(), fmeta.full()),
  }
  if row not in tunings:
    raise fmeta.UsageError(f'no row {row!r}; possible: {sorted(tunings)}')
  inner_tuning, outer_tuning = tunings[row]
  inner = fmeta.finetune(loss, optimizer(config.inner_lr), tuning=inner_tuning)
  meta_loss = fmeta.episode_loss(inner, loss, num_steps, through=goes_through)
  outer = fmeta.finetune(meta_loss, optim.adam(1e-3), tuning=outer_tuning)
  return outer, inner, params_of


def measure(
  config: Config, row: str, num_steps: int, way: str, **options: Any
) -> dict[str, Any]:
  """Compiles one outer gradient from shapes; runs it if asked to."""
  if way not in WAYS:
    raise fmeta.UsageError(f'no way {way!r}; possible: {sorted(WAYS)}')
  outer, inner, params_of = learners(config, row, num_steps, way, **options)
  key = jax.eval_shape(lambda: jax.random.key(0))
  params = jax.eval_shape(params_of, key)
  state = jax.eval_shape(outer.init, params, key)
  start = jax.eval_shape(inner.init, params, key)
  began = time.perf_counter()
  lowered = jax.jit(outer.gradient).lower(state, episodes(config), key)
  compiled = lowered.compile()
  seconds = time.perf_counter() - began
  per_step = tree.num_bytes((start.trainable, start.opt_state))
  return {
    'row': row,
    'steps': num_steps,
    'way': way,
    'temp_bytes': compiled.memory_analysis().temp_size_in_bytes,
    'state_bytes': states_held(num_steps, way) * per_step * config.tasks,
    'flops': (compiled.cost_analysis() or {}).get('flops', 0.0),
    'compile_seconds': round(seconds, 1),
    'memory_first': MEMORY_FIRST in os.environ.get('XLA_FLAGS', ''),
    **(execute(config, outer, params_of, compiled) if config.execute else {}),
  }


def execute(
  config: Config, outer: fmeta.Learner, params_of: Callable, compiled: Any
) -> dict[str, Any]:
  """Runs a compiled gradient once on random weights and texts."""
  key = jax.random.key(0)
  state = outer.init(jax.jit(params_of)(key), key)
  began = time.perf_counter()
  gradient = jax.block_until_ready(compiled(state, random_texts(config), key))
  return {
    'seconds': round(time.perf_counter() - began, 2),
    'resident_mib': paired.peak_bytes() // 2**20,
    'finite': all(
      bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(gradient)
    ),
  }


def random_texts(config: Config) -> dict[str, dict[str, np.ndarray]]:
  """A meta-batch of full-length texts, as many of each class."""
  rng = np.random.default_rng(0)

  def filled(path, leaf):
    name = path[-1].key
    if name == 'label':
      classes = np.arange(leaf.shape[1]) % config.classes
      return np.broadcast_to(classes, leaf.shape).astype(leaf.dtype)
    if name == 'attention_mask':
      return np.ones(leaf.shape, leaf.dtype)
    return rng.integers(config.vocab_size, size=leaf.shape, dtype=leaf.dtype)

  return jax.tree_util.tree_map_with_path(filled, episodes(config))


def states_held(num_steps: int, way: str) -> int:
  """How many steps' states a gradient keeps at once."""
  if way != SEGMENTS:
    return num_steps
  return segments_of(num_steps) + num_steps // segments_of(num_steps)


def compared(line: dict, base: dict, blocks: dict) -> dict:
  """The line with its ratios to first order."""
  held = 0 if line['way'] in (BASE, BLOCKS) else line['state_bytes']
  return {
    **line,
    'ratio': round(line['temp_bytes'] / base['temp_bytes'], 3),
    'ratio_blocks': round(line['temp_bytes'] / blocks['temp_bytes'], 3),
    'ratio_without': round((line['temp_bytes'] - held) / base['temp_bytes'], 3),
    'times_flops': round(line['flops'] / base['flops'], 2),
  }


def growth(lines: list[dict]) -> float:
  """Of temp_bytes - state_bytes, from the second line to the last."""
  rest = [line['temp_bytes'] - line['state_bytes'] for line in lines]
  return rest[-1] / rest[min(1, len(rest) - 1)] - 1


def run(config: Config, context: Context) -> dict:
  """Prints a line per program."""
  del context
  metrics = {}
  for row in config.rows:
    lines = {way: [] for way in config.ways}
    for num_steps in config.inner_steps:
      bases = {w: measure(config, row, num_steps, w) for w in (BASE, BLOCKS)}
      for way in config.ways:
        line = bases.get(way) or measure(config, row, num_steps, way)
        line = compared(line, *bases.values())
        print(json.dumps(line), flush=True)
        lines[way].append(line)
        metrics[f'{row} {way} {num_steps} ratio'] = line['ratio']
    for way in config.ways:
      if way not in (BASE, BLOCKS):
        metrics[f'{row} {way} growth'] = round(growth(lines[way]), 4)
        print(f'{row} {way}: growth {growth(lines[way]):+.1%}', flush=True)
  return {'metrics': metrics}
