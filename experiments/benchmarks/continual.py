"""Steps of a continual stream against Avalanche and a plain torch loop.

  ./launch/peers.sh    # once: installs the peers
  ./launch/local.sh --config=experiments/benchmarks/continual.py

An MLP of split MNIST's size (784-400-400-10, batches of 128, Adam 1e-3) in
its second task, rows: naive; EWC, one importance and one anchor remembered;
ER, as many rows from a memory of 500 as new ones. A timing is one call of
each side over the same number of steps: fmeta dispatches
`steps_per_dispatch` at a time over data on the device, the plain loop slices
tensors that lie in memory, Avalanche runs `strategy.train` for one epoch
without an evaluator and without the work at a task's end. All sides have all
cores and the allocator of `launch/local.sh`, and all report the loss alone.

Each round also times the matrix products of the step and nothing else, in a
scan like ours: how many times faster than the peer a step could be that did
no other work.

One JSON line per row and peer: `ratio` > 1 means that fmeta is faster,
`products_ratio` is that of the products, `products_share` the part of our
step that they take. What the sides compute is compared in
tests/test_benchmarks_continual.py. Expected and measured:
experiments/README.md.
"""

import dataclasses
import functools
import importlib.util
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import fmeta
from experiments.benchmarks.fewshot import cores
from experiments.benchmarks.paired import Contender, interleaved, ratio_of
from experiments.common import require
from fmeta import data, models, optim, train
from fmeta.models import Mlp
from fmeta.train.dispatch import own
from fmeta.workdir import Context

ROWS = 'naive', 'ewc', 'er'
PEERS = 'torch', 'avalanche'
LEAST = {
  'pairs': 2,
  'steps': 1,
  'steps_per_dispatch': 1,
  'features': 1,
  'sizes': 1,
  'classes': 1,
  'batch_size': 1,
  'memory_size': 1,
}


@dataclasses.dataclass
class Config:
  """Shapes and lengths of the timings."""

  rows: tuple[str, ...] = ROWS
  peers: tuple[str, ...] = PEERS
  pairs: int = 10
  steps: int = 400  # of a timing
  steps_per_dispatch: int = 200
  features: int = 784
  sizes: tuple[int, ...] = (400, 400)
  classes: int = 10
  batch_size: int = 128
  memory_size: int = 500
  rate: float = 1e-3
  strength: float = 100.0


SMALL = {
  'peers': ('torch',),
  'pairs': 2,
  'steps': 4,
  'steps_per_dispatch': 2,
  'features': 6,
  'sizes': (5,),
  'classes': 3,
  'batch_size': 4,
  'memory_size': 8,
}


def examples(config: Config, seed: int) -> dict[str, np.ndarray]:
  """One epoch of `steps` batches."""
  rng = np.random.default_rng(seed)
  size = config.steps * config.batch_size
  return {
    'x': rng.random((size, config.features), np.float32),
    'label': rng.integers(0, config.classes, size).astype(np.int32),
  }


def network(config: Config) -> tuple[Mlp, Any]:
  """The module and its first parameters."""
  module = Mlp(config.sizes, config.classes)
  batch = {'x': np.zeros((1, config.features), np.float32)}
  return module, models.init(module, jax.random.key(0), batch, ('x',))[0]


class Side:
  """Steps of fmeta.

  Attributes:
    program: what `fit` dispatches; it counts its traces.
    moving: the state without what is frozen.
  """

  def __init__(self, row: str, config: Config):
    module, params = network(config)
    forward = models.forward(module, ('x',))
    columns = examples(config, 0)
    learner = _learner(row, config, forward, columns)
    self.config, self.rng = config, jax.random.key(1)
    state = learner.init(params, self.rng)
    if row == 'ewc':
      first = data.take(columns, slice(config.batch_size))
      state = learner.end_task(state, forward, [first], self.rng)
    self.program = train.Resident(learner, columns)
    self._frozen = state.frozen
    self.moving = own(state.replace(frozen={}))
    self._order = data.batches(
      {'row': np.arange(len(columns['label']))}, config.batch_size, 0
    )

  def __call__(self, steps: int) -> None:
    """Takes at least so many steps, in whole dispatches, and waits."""
    length, metrics = min(steps, self.config.steps_per_dispatch), None
    for start in range(0, steps, length):
      rows = [self._order(start + k)['row'] for k in range(length)]
      self.moving, metrics = self.program(
        self.moving, self._frozen, {'row': np.stack(rows)}, self.rng
      )
    jax.block_until_ready((self.moving, metrics))


def _learner(
  row: str, config: Config, forward: fmeta.Forward, columns: data.Columns
) -> fmeta.Learner:
  loss = fmeta.supervised(forward, fmeta.softmax_cross_entropy)
  remembers = fmeta.ewc(config.strength) if row == 'ewc' else None
  made = fmeta.finetune(loss, optim.adam(config.rate), penalty=remembers)
  if row == 'er':
    spec = {key: value[0] for key, value in columns.items()}
    memory = fmeta.reservoir(config.memory_size, spec)
    made = fmeta.rehearse(made, memory, config.batch_size)
  return fmeta.reporting(made)  # The peers compute no norms either.


class Products:
  """The matrix products of a row's steps and nothing else.

  Those of the network without biases, activations and loss, forward and
  backward: no step that multiplies with the same routine can be faster.

  Attributes:
    step: `(kernels, x) -> gradients of the kernels`.
    kernels: from the input to the head.
    x: [batches, rows, features]; ER's rows are new and remembered ones.
    grads: of the latest step.
  """

  def __init__(self, row: str, config: Config):
    params = network(config)[1]
    layers = *params['body'].values(), params['head']
    self.kernels = tuple(layer['kernel'] for layer in layers)
    rows = config.batch_size * (2 if row == 'er' else 1)
    x = examples(config, 0)['x']
    batches = -(-len(x) // rows)
    self.x = jnp.asarray(np.resize(x, (batches, rows, config.features)))
    self.config = config
    self.grads = jax.tree.map(jnp.zeros_like, self.kernels)
    self._run = jax.jit(self._scanned, static_argnums=3, donate_argnums=0)

  @staticmethod
  def step(kernels: tuple, x: jax.Array) -> tuple:
    """Forward, and backward from the outputs themselves."""
    product = lambda *kernels: functools.reduce(jnp.matmul, kernels, x)
    outputs, pull = jax.vjp(product, *kernels)
    return pull(outputs)

  def _scanned(self, grads, kernels, x, num_steps):
    # Another batch each time, or products would leave the loop.
    def body(grads, i):
      return self.step(kernels, x[i % len(x)]), None

    return jax.lax.scan(body, grads, jnp.arange(num_steps))[0]

  def __call__(self, steps: int) -> None:
    """As `Side`'s."""
    length = min(steps, self.config.steps_per_dispatch)
    for _ in range(0, steps, length):
      self.grads = self._run(self.grads, self.kernels, self.x, length)
    jax.block_until_ready(self.grads)


def make_fmeta(row: str, config: Config) -> Side:
  """Ours, in a process of its own."""
  return Side(row, config)


def make_products(row: str, config: Config) -> Products:
  """Its products, likewise."""
  return Products(row, config)


def make_torch(row: str, config: Config, peer: str, params: Any) -> Any:
  """A peer, in a process of its own that computes nothing in JAX."""
  import torch

  from experiments.benchmarks import continual_in_torch as peers

  torch.set_num_threads(cores())
  return peers.PEERS[peer](row, config, params, examples(config, 0))


def check(config: Config) -> None:
  """Raises `UsageError` for what does not exist or is not installed."""
  require(config, LEAST, ('rate',))
  if 'er' in config.rows and config.batch_size > config.memory_size:
    raise fmeta.UsageError(
      f'er replays {config.batch_size} rows a step from a memory of '
      f'{config.memory_size}; raise --config.memory_size'
    )
  for names, possible in ((config.rows, ROWS), (config.peers, PEERS)):
    for name in names:
      if name not in possible:
        raise fmeta.UsageError(f'no {name!r}; possible: {", ".join(possible)}')
  missing = [
    name
    for name in ('torch', *config.peers)
    if importlib.util.find_spec(name) is None
  ]
  if missing:
    raise fmeta.UsageError(
      f'not installed: {", ".join(missing)}; run ./launch/peers.sh once, or '
      'name the peers to measure with --config.peers='
    )
  if config.steps % config.steps_per_dispatch:
    raise fmeta.UsageError(
      f'{config.steps} steps are no whole number of dispatches of '
      f'{config.steps_per_dispatch}; change --config.steps'
    )


def measure(row: str, config: Config) -> list[dict]:
  """The lines of a row: ours, its products and each peer in turn."""
  params = jax.tree.map(np.asarray, network(config)[1])
  ours = Contender('fmeta', make_fmeta, row=row, config=config)
  bare = Contender('products', make_products, row=row, config=config)
  lines = []
  for peer in config.peers:
    other = Contender(
      peer, make_torch, row=row, config=config, peer=peer, params=params
    )
    times = interleaved((ours, bare, other), config.pairs, config.steps)
    other.close()
    lines.append({'row': row, 'peer': peer, **summary(times)})
    print(json.dumps(lines[-1]), flush=True)
  ours.close()
  bare.close()
  return lines


def summary(times: np.ndarray) -> dict[str, Any]:
  """What a line says of seconds per step [pairs, (ours, products, peer)]."""
  ratio, most = ratio_of(times[:, [0, 2]]), ratio_of(times[:, [1, 2]])
  return {
    'ratio': round(ratio.median, 3),
    'ci95': [round(ratio.low, 3), round(ratio.high, 3)],
    'products_ratio': round(most.median, 3),
    'products_ci95': [round(most.low, 3), round(most.high, 3)],
    'products_share': round(ratio_of(times[:, [0, 1]]).median, 3),
    'pairs': ratio.pairs,
    'steps_per_second': [round(1 / x, 1) for x in np.median(times, axis=0)],
  }


def run(config: Config, context: Context) -> dict:
  """Prints a JSON line per row and peer."""
  check(config)
  lines = [line for row in config.rows for line in measure(row, config)]
  metrics, ci95 = {}, {}
  for line in lines:
    name = f'{line["row"]} / {line["peer"]}'
    metrics[name], ci95[name] = line['ratio'], line['ci95']
    name = f'{name} / products'
    metrics[name] = line['products_ratio']
    ci95[name] = line['products_ci95']
  return {'metrics': metrics, 'ci95': ci95}
