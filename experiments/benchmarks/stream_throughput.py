"""Steps of a stream's last task against those of its first.

  ./launch/local.sh --config=experiments/benchmarks/stream_throughput.py

A stream of 20 tasks of split MNIST's size (an MLP 784-400-400-10, batches of
128, Adam 1e-3; random images: their values do not matter to the time) goes
through `fmeta.train.fit`, every task ending as a user's does. Then the state
before the first task and the state before the last take the same stage of
steps by `fit` in turn, first, last, last, first, ..., so that a drift of the
machine is in both. What is compared is what `fit` reports as
`examples_per_second`, which is without compilation and a task's end.

One JSON line per row: `ratio` is the last task's steps/s over the first's;
`end_task_ms` what the penalty's look at `remembered` rows takes at a task's
end, `evaluate_ms` what one task's `tested` rows take: after task t a matrix
asks for t of those, which is the user's choice and no part of a step. That
both tasks run one and the same program is a test
(tests/test_benchmarks_stream.py). Expected: 0.95 at least. Measured:
experiments/README.md.
"""

import dataclasses
import json
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

import fmeta
from experiments.benchmarks.continual import examples, network
from experiments.benchmarks.paired import ratio_of
from experiments.common import require
from fmeta import continual, data, evaluate, models, optim, train, tree
from fmeta.workdir import Context

LEAST = {
  'tasks': 2,
  'pairs': 2,
  'steps': 1,
  'task_steps': 1,
  'steps_per_dispatch': 1,
  'features': 1,
  'sizes': 1,
  'classes': 1,
  'batch_size': 1,
  'memory_size': 1,
  'remembered': 1,
  'tested': 1,
}


@dataclasses.dataclass
class Config:
  """The stream, and lengths of the timings."""

  rows: tuple[str, ...] = ('naive', 'ewc', 'online_ewc', 'er', 'der_plus_plus')
  tasks: int = 20
  pairs: int = 10
  steps: int = 400  # of a timing
  task_steps: int = 200  # of each task before the last
  steps_per_dispatch: int = 200
  features: int = 784
  sizes: tuple[int, ...] = (400, 400)
  classes: int = 10
  batch_size: int = 128
  memory_size: int = 500
  remembered: int = 2000  # rows the penalty looks at
  tested: int = 2000  # test rows of a task
  rate: float = 1e-3
  strength: float = 100.0


SMALL = {
  'rows': ('ewc', 'er'),
  'tasks': 3,
  'pairs': 2,
  'steps': 2,
  'task_steps': 2,
  'steps_per_dispatch': 2,
  'features': 6,
  'sizes': (5,),
  'classes': 3,
  'batch_size': 4,
  'memory_size': 16,
  'remembered': 8,
  'tested': 8,
}


def _replayed(config, made, spec, how, size) -> fmeta.Learner:
  held = fmeta.reservoir(config.memory_size, spec)
  return fmeta.rehearse(made, held, size, mix=how)


def _penalised(penalty: Callable) -> Callable:
  def make(config, loss, forward, spec):
    optimizer = optim.adam(config.rate)
    return fmeta.finetune(loss, optimizer, penalty=penalty(config.strength))

  return make


def _naive(config, loss, forward, spec) -> fmeta.Learner:
  return fmeta.finetune(loss, optim.adam(config.rate))


def _er(config, loss, forward, spec) -> fmeta.Learner:
  made = _naive(config, loss, forward, spec)
  return _replayed(config, made, spec, fmeta.append, config.batch_size)


def _der_plus_plus(config, loss, forward, spec) -> fmeta.Learner:
  loss = continual.der_plus_plus(
    forward, fmeta.softmax_cross_entropy, alpha=0.5, beta=0.5
  )
  made = _naive(config, loss, forward, spec)
  logits = jax.ShapeDtypeStruct((config.classes,), np.float32)
  spec = {**spec, 'outputs': logits}
  # Logits of one half, labels of the other.
  return _replayed(config, made, spec, fmeta.beside, 2 * config.batch_size)


# (config, loss, forward, spec of a row) -> learner
ROWS = {
  'naive': _naive,
  'ewc': _penalised(fmeta.ewc),
  'online_ewc': _penalised(fmeta.penalty.online_ewc),
  'er': _er,
  'der_plus_plus': _der_plus_plus,
}


class Stream:
  """A row's stream, and steps from its beginning and its end.

  Attributes:
    program: what `fit` dispatches; it counts its traces.
    states: before the first task, and before the last.
  """

  def __init__(self, row: str, config: Config):
    module, params = network(config)  # type: ignore[arg-type]
    columns = examples(config, 0)  # type: ignore[arg-type]
    self.config, self.rng = config, jax.random.key(1)
    self.forward = models.forward(module, ('x',))
    loss = fmeta.supervised(self.forward, fmeta.softmax_cross_entropy)
    spec = {key: value[0] for key, value in columns.items()}
    self.learner = ROWS[row](config, loss, self.forward, spec)
    self.looks = row in ('ewc', 'online_ewc')
    self.program = train.Resident(self.learner, columns)
    rows = {'row': np.arange(len(columns['label']))}
    self.batches = data.batches(rows, config.batch_size, 0)
    self.columns = columns
    first = self.learner.init(params, self.rng)
    self.states = first, self._through(first, config.tasks - 1)

  def rows(self, count: int) -> list[dict[str, np.ndarray]]:
    """So many rows, as a penalty and an evaluation get them."""
    some = np.arange(count) % len(self.columns['label'])
    return data.eval_batches(data.take(self.columns, some), min(500, count))

  def fit(
    self, state: fmeta.TrainState, stages: list[train.Stage]
  ) -> train.Fitted:
    """As a user calls it, on the one program."""
    return train.fit(
      self.learner,
      state,
      stages,
      self.rng,
      forward=self.forward,
      steps_per_dispatch=self.config.steps_per_dispatch,
      quiet=True,
      program=self.program,
    )

  def _through(self, state, tasks):
    looked_at = self.rows(self.config.remembered) if self.looks else ()
    stages = [
      train.Stage(
        f'task_{k}', self.batches, self.config.task_steps, looked_at, None, True
      )
      for k in range(tasks)
    ]
    return self.fit(state, stages).state

  def seconds(self, which: int) -> float:
    """Seconds per step of the first task (0) or the last (1)."""
    stage = train.Stage('timed', self.batches, self.config.steps)
    found = self.fit(self.states[which], [stage])
    return self.config.batch_size / found.examples_per_second

  def end_task_seconds(self, which: int) -> float:
    """Seconds of the penalty's work at that task's end, once compiled."""
    rows, state = self.rows(self.config.remembered), self.states[which]
    return _waited(
      lambda: self.learner.end_task(state, self.forward, rows, self.rng)
    )

  def evaluate_seconds(self) -> float:
    """Seconds of an evaluation of one task."""
    rows = self.rows(self.config.tested)
    params = self.learner.params(self.states[1])
    return _waited(
      lambda: evaluate.evaluate(self.forward, params, {}, rows).correct
    )


def _waited(run: Callable[[], Any]) -> float:
  began = time.perf_counter()
  jax.block_until_ready(run())
  return time.perf_counter() - began


def check(config: Config) -> None:
  """Raises `UsageError` for what does not exist."""
  require(config, LEAST, ('rate',))
  for name in config.rows:
    if name not in ROWS:
      raise fmeta.UsageError(f'no {name!r}; possible: {", ".join(ROWS)}')
  for name in ('steps', 'task_steps'):
    if getattr(config, name) % config.steps_per_dispatch:
      raise fmeta.UsageError(
        f'{getattr(config, name)} steps are no whole number of dispatches of '
        f'{config.steps_per_dispatch}; change --config.{name}'
      )


def interleaved(call: Callable[[int], float], pairs: int) -> np.ndarray:
  """What `call(0)` and `call(1)` give, [pairs, 2], by turns."""
  for which in (0, 1):
    call(which)
  found = np.zeros((pairs, 2))
  for pair in range(pairs):
    for which in (0, 1) if pair % 2 == 0 else (1, 0):
      found[pair, which] = call(which)
  return found


def measure(row: str, config: Config) -> dict[str, Any]:
  """The line of a row."""
  stream = Stream(row, config)
  times = interleaved(stream.seconds, config.pairs)
  ratio = ratio_of(times[:, ::-1])  # The first's seconds over the last's.
  line = {
    'row': row,
    'tasks': config.tasks,
    'ratio': round(ratio.median, 3),
    'ci95': [round(ratio.low, 3), round(ratio.high, 3)],
    'pairs': ratio.pairs,
    'steps_per_second': [round(1 / s, 1) for s in np.median(times, axis=0)],
    'state_bytes': [tree.num_bytes(state) for state in stream.states],
    'programs': stream.program.traces,
    'evaluate_ms': _milliseconds(
      interleaved(lambda _: stream.evaluate_seconds(), 2).ravel()
    ),
  }
  if stream.looks:
    ends = interleaved(stream.end_task_seconds, config.pairs)
    line['end_task_ms'] = [_milliseconds(column) for column in ends.T]
  return line


def _milliseconds(seconds: np.ndarray) -> float:
  return round(1e3 * float(np.median(seconds)), 1)


def run(config: Config, context: Context) -> dict:
  """Prints a JSON line per row."""
  del context
  check(config)
  lines = []
  for row in config.rows:
    lines.append(measure(row, config))
    print(json.dumps(lines[-1]), flush=True)
  return {
    'metrics': {line['row']: line['ratio'] for line in lines},
    'ci95': {line['row']: line['ci95'] for line in lines},
  }
