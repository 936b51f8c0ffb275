"""Five seeds side by side against five runs one after the other.

  ./launch/local.sh --config=experiments/benchmarks/seeds.py

Steps of a stream's second task in two processes, paired and interleaved: one
with all seeds in one program (`fmeta.over_seeds`), one that takes a seed after
the other through one compiled program. Shapes: `tiny`, 64-32-10, batches of
16; `digits`, 64-100-100-10, batches of 32, split digits' size; `mnist`,
784-400-400-10, batches of 128, split MNIST's size. Rows: naive; EWC with one
importance; ER with as many rows from a memory. Adam, data on the device.

One JSON line per shape and row: ratio > 1 means that side by side is faster;
seconds are of a step of all seeds. Compilation is left out: each side compiles
once. What the sides compute is compared in tests/test_benchmarks_seeds.py.
Expected: gains where a step is made of many small operations, none where its
products fill the cores. Measured: experiments/README.md.
"""

import dataclasses
import json
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import fmeta
from experiments.benchmarks.paired import Contender, compare
from experiments.common import require
from fmeta import data, models, optim, train
from fmeta.models import Mlp
from fmeta.seeds import abreast
from fmeta.train.dispatch import own
from fmeta.workdir import Context

CLASSES = 10


class Shape(NamedTuple):
  """An MLP and its batches."""

  features: int
  sizes: tuple[int, ...]
  batch_size: int


SHAPES = {
  'tiny': Shape(64, (32,), 16),
  'digits': Shape(64, (100, 100), 32),
  'mnist': Shape(784, (400, 400), 128),
}
ROWS = 'naive', 'ewc', 'er'
LEAST = {
  'seeds': 1,
  'steps': 1,
  'steps_per_dispatch': 1,
  'pairs': 2,
  'memory_size': 1,
}


@dataclasses.dataclass
class Config:
  """Lengths of the timings."""

  shapes: tuple[str, ...] = tuple(SHAPES)
  rows: tuple[str, ...] = ROWS
  seeds: int = 5
  pairs: int = 10
  steps: int = 200  # of a timing
  steps_per_dispatch: int = 100
  memory_size: int = 500
  rate: float = 1e-3
  strength: float = 100.0


SMALL = {
  'shapes': ('tiny',),
  'rows': ('er',),
  'seeds': 2,
  'pairs': 2,
  'steps': 4,
  'steps_per_dispatch': 2,
  'memory_size': 20,
}


class Run(NamedTuple):
  """What `Side` steps: one seed, or all of them."""

  moving: fmeta.TrainState
  batches: Any
  keys: jax.Array


class Side:
  """All seeds, side by side or one after the other.

  Attributes:
    program: what `fit` would dispatch; it counts its traces.
    runs: one of all seeds, or one of each.
  """

  def __init__(self, together: bool, shape: str, row: str, config: Config):
    self.config = config
    size, seeds = SHAPES[shape], range(config.seeds)
    columns = examples(size, config.steps)
    forward, start = network(size)
    learner = learner_of(row, size, config, forward, columns)
    orders = [
      data.batches(
        {'row': np.arange(len(columns['label']))}, size.batch_size, k
      )
      for k in seeds
    ]
    first = data.take(columns, slice(size.batch_size))
    keys = jax.vmap(jax.random.key)(jnp.arange(config.seeds))
    if together:
      learner = fmeta.over_seeds(learner, config.seeds)
      begins = [(jax.vmap(start)(keys), keys, abreast(orders))]
      first = abreast([lambda i: first] * config.seeds)(0)
    else:
      begins = [(start(keys[k]), keys[k], orders[k]) for k in seeds]
    self.program, self.runs = train.Resident(learner, columns), []
    for params, key, batches in begins:
      state = learner.init(params, key)
      if row == 'ewc':
        state = learner.end_task(state, forward, [first], key)
      self.runs.append(Run(own(state.replace(frozen={})), batches, key))

  def __call__(self, steps: int) -> None:
    """Takes so many steps of every seed, in whole dispatches, and waits."""
    length = min(steps, self.config.steps_per_dispatch)
    for number, run in enumerate(self.runs):
      moving = run.moving
      for start in range(0, steps, length):
        rows = [run.batches(start + k)['row'] for k in range(length)]
        moving, _ = self.program(moving, {}, {'row': np.stack(rows)}, run.keys)
      self.runs[number] = run._replace(moving=jax.block_until_ready(moving))


def examples(shape: Shape, steps: int) -> dict[str, np.ndarray]:
  """One epoch of `steps` batches."""
  rng = np.random.default_rng(0)
  size = steps * shape.batch_size
  return {
    'x': rng.random((size, shape.features), np.float32),
    'label': rng.integers(0, CLASSES, size).astype(np.int32),
  }


def network(shape: Shape) -> tuple[fmeta.Forward, Any]:
  """The model and `key -> parameters`."""
  module = Mlp(shape.sizes, CLASSES)
  batch = {'x': np.zeros((1, shape.features), np.float32)}

  def start(key):
    return models.init(module, key, batch, ('x',))[0]

  return models.forward(module, ('x',)), start


def learner_of(
  row: str,
  shape: Shape,
  config: Config,
  forward: fmeta.Forward,
  columns: data.Columns,
) -> fmeta.Learner:
  """The method of one seed."""
  loss = fmeta.supervised(forward, fmeta.softmax_cross_entropy)
  penalty = fmeta.ewc(config.strength) if row == 'ewc' else None
  made = fmeta.finetune(loss, optim.adam(config.rate), penalty=penalty)
  if row != 'er':
    return made
  spec = {key: value[0] for key, value in columns.items()}
  held = fmeta.reservoir(config.memory_size, spec)
  return fmeta.rehearse(made, held, shape.batch_size)


def make(together: bool, shape: str, row: str, config: Config) -> Side:
  """A side in a process of its own."""
  return Side(together, shape, row, config)


def check(config: Config) -> None:
  """Raises `UsageError` for what does not exist."""
  require(config, LEAST, ('rate',))
  for names, possible in ((config.rows, ROWS), (config.shapes, SHAPES)):
    for name in names:
      if name not in possible:
        raise fmeta.UsageError(f'no {name!r}; possible: {", ".join(possible)}')
  if config.steps % config.steps_per_dispatch:
    raise fmeta.UsageError(
      f'{config.steps} steps are no whole number of dispatches of '
      f'{config.steps_per_dispatch}; change --config.steps'
    )
  most = max(SHAPES[name].batch_size for name in config.shapes)
  if 'er' in config.rows and most > config.memory_size:
    raise fmeta.UsageError(
      f'er replays {most} rows a step from a memory of '
      f'{config.memory_size}; raise --config.memory_size'
    )


def measure(shape: str, row: str, config: Config) -> dict[str, Any]:
  """The line of a shape and a row."""
  sides = [
    Contender(
      name, make, together=together, shape=shape, row=row, config=config
    )
    for name, together in (('side by side', True), ('in turn', False))
  ]
  ratio = compare(sides[0], sides[1], config.pairs, config.steps)
  for side in sides:
    side.close()
  line = {
    'shape': shape,
    'row': row,
    'ratio': round(ratio.median, 3),
    'ci95': [round(ratio.low, 3), round(ratio.high, 3)],
    'pairs': ratio.pairs,
    'milliseconds': [round(1000 * s, 3) for s in ratio.seconds],
  }
  print(json.dumps(line), flush=True)
  return line


def run(config: Config, context: Context) -> dict:
  """Prints a JSON line per shape and row."""
  del context
  check(config)
  lines = [
    measure(shape, row, config)
    for shape in config.shapes
    for row in config.rows
  ]
  return {
    'metrics': {f'{x["shape"]} / {x["row"]}': x['ratio'] for x in lines},
    'ci95': {f'{x["shape"]} / {x["row"]}': x['ci95'] for x in lines},
  }
