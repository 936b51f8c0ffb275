"""Runs every row over its seeds, chooses strengths, and shows the table.

A strength is chosen once, by the accuracy on held-out training rows after a
stream over the others with a seed of its own; the final runs train on all
rows. The whole grid is printed.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

import fmeta
from experiments.common import Seeds, best_setting, placement, trial
from experiments.continual import methods, rows
from experiments.continual.bench import SCENARIOS, Bench
from fmeta import data, metrics, report, train
from fmeta.workdir import Context

SEARCH_SEED = 1000  # no final run has it


@dataclasses.dataclass
class Config:
  """What one would sweep in either stream."""

  seed: Seeds = dataclasses.field(default_factory=Seeds)
  seeds: int = 5
  scenario: str = 'domain'
  methods: tuple[str, ...] = tuple(rows.ROWS)
  sizes: tuple[int, ...] = (400, 400)
  iterations: int = 2000  # per task
  batch_size: int = 128
  rate: float = 1e-3
  memory_size: int = 500
  fisher_examples: int = 1000  # first images of a task
  # `method:value` instead of a search.
  strengths: tuple[str, ...] = ()
  steps_per_dispatch: int = 250
  train_examples: int = 60_000
  test_examples: int = 10_000


SMALL = {
  'seeds': 2,
  'methods': ('none', 'ewc', 'er'),
  'sizes': (8,),
  'iterations': 4,
  'batch_size': 8,
  'memory_size': 20,
  'fisher_examples': 8,
  'strengths': ('ewc:100',),
  'steps_per_dispatch': 2,
  'train_examples': 400,
  'test_examples': 200,
}

Splits = dict[str, data.Columns]


class Table:
  """The rows of one stream.

  Args:
    config: of the experiment.
    context: of the job.
    splits: 'train' and 'test'.
    held_out: the last training rows, which a search validates on.
    bench_of: `splits -> Bench`.
  """

  def __init__(
    self,
    config: Config,
    context: Context,
    splits: Splits,
    held_out: float,
    bench_of: Callable[[Splits], Bench],
  ):
    self.config, self.context, self.splits = config, context, splits
    self.held_out, self.bench_of = held_out, bench_of
    self.given = strengths_of(config.strengths)
    self.bench = bench_of(splits)

  def fit(
    self, bench: Bench, name: str, strength: float, seed: int
  ) -> train.Fitted:
    """Moves through a stream once."""
    config, row = self.config, rows.ROWS[name]
    recipe = rows.Recipe(
      bench, config.rate, config.batch_size, config.memory_size
    )
    learner = row.learner(recipe, strength)
    key = jax.random.key(config.seed.init + seed)
    last = len(bench.tasks.train) - 1
    return train.fit(
      learner,
      learner.init(bench.start(key), key),
      self.stages(bench, row, config.seed.data + seed),
      jax.random.key(config.seed.train + seed),
      forward=bench.answers,
      after_stage=lambda params, state, stage: bench.accuracies(
        params, last if row.at_once else stage
      ),
      steps_per_dispatch=config.steps_per_dispatch,
      log_every=config.iterations,
      program=bench.program(learner),
      quiet=True,
      **placement(self.context),
    )

  def stages(self, bench: Bench, row: rows.Row, seed: int) -> list[train.Stage]:
    """One per task, or one with all their steps."""
    config, tasks = self.config, bench.tasks.train
    size = int(config.batch_size * row.share)
    everything = range(len(tasks))
    if row.at_once:
      batches = bench.batches(everything, size, seed)
      return [train.Stage('all', batches, config.iterations * len(tasks))]
    made = []
    for k, task in enumerate(tasks):
      # Nothing comes after the last task that would need it.
      last = k == len(tasks) - 1
      looked_at = row.remembers and not last
      made.append(
        train.Stage(
          task.name,
          bench.batches([k], size, seed),
          config.iterations,
          bench.remembered(k, config.fisher_examples) if looked_at else (),
          ends_task=row.ends_task and not last,
        )
      )
    return made

  def choose(self, name: str) -> tuple[float, dict[str, float]]:
    """A strength, and the validation accuracy of each of the grid."""
    row = rows.ROWS[name]
    if name in self.given or not row.grid:
      return self.given.get(name, 0.0), {}
    whole = self.splits['train']
    cut = int(len(whole['label']) * (1 - self.held_out))
    held = {
      'train': data.take(whole, slice(cut)),
      'test': data.take(whole, slice(cut, None)),
    }
    bench, tried = self.bench_of(held), {}
    for strength in row.grid:

      def run(strength=strength):
        try:
          fitted = self.fit(bench, name, strength, SEARCH_SEED)
        except train.Diverged:
          return {'value': 0.0}  # a strength too many
        return {'value': float(np.mean(fitted.matrix[-1]))}

      where = f'{self.config.scenario}/{name}/strength_{strength:g}'
      tried[f'{strength:g}'] = trial(self.context, where, run)['value']
    return float(best_setting(tried)), tried

  def final(self, name: str, strength: float, seed: int) -> dict[str, Any]:
    """The whole stream with one seed."""

    def run():
      fitted = self.fit(self.bench, name, strength, seed)
      state = fitted.state
      return {
        'matrix': fitted.matrix,
        'steps': fitted.steps,
        'examples_per_second': fitted.examples_per_second,
        'flops_per_step': fitted.flops_per_step,
        'peak_bytes': fitted.peak_bytes,
        'trainable': fmeta.tree.size(state.trainable),
        'memory_bytes': fmeta.tree.num_bytes(state.memory),
        'penalty_bytes': fmeta.tree.num_bytes(state.penalty_state),
      }

    where = f'{self.config.scenario}/{name}/seed_{seed}'
    return trial(self.context, where, run)

  def measure(self, name: str) -> dict[str, Any]:
    """A row: what was chosen, and a run per seed."""
    strength, tried = self.choose(name)
    if tried:
      edge = _at_an_edge(strength, rows.ROWS[name].grid)
      print(f'{name}: validation by strength {tried}{edge}', flush=True)
    runs = []
    for seed in range(self.config.seeds):
      runs.append(self.final(name, strength, seed))
      average = 100 * np.mean(runs[-1]['matrix'][-1])
      print(
        f'{name}, seed {seed}: {average:.2f} % in {runs[-1]["seconds"]:.0f} s',
        flush=True,
      )
    return {'strength': strength, 'tried': tried, 'runs': runs}


def check(config: Config) -> None:
  """Raises `UsageError` for what does not exist, before data are read."""
  rows.check(config.methods)
  strengths_of(config.strengths)
  if config.scenario not in SCENARIOS:
    raise fmeta.UsageError(
      f'no scenario {config.scenario!r}; possible: {", ".join(SCENARIOS)}'
    )


def strengths_of(given: Sequence[str]) -> dict[str, float]:
  """`method:value` of a config as numbers."""
  found = {}
  for item in given:
    name, _, value = item.partition(':')
    rows.check((name,))
    try:
      found[name] = float(value)
    except ValueError as error:
      raise fmeta.UsageError(
        f'strength {item!r}; give method:number, for example ewc:1e5'
      ) from error
  return found


def _at_an_edge(strength: float, grid: Sequence[float]) -> str:
  return ' (an edge of the grid)' if strength in (grid[0], grid[-1]) else ''


def standard_error(runs: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
  """Mean final accuracy over seeds and its standard error."""
  finals = [np.mean(run['matrix'][-1]) for run in runs]
  spread = np.std(finals, ddof=1) / len(finals) ** 0.5 if finals[1:] else 0.0
  return float(np.mean(finals)), float(spread)


def shown(
  table: Table, name: str, measured: dict[str, Any], published: float | None
) -> tuple[report.Row, dict[str, float], dict[str, tuple[float, float]]]:
  """The table's row, its numbers and their intervals."""
  row, runs = rows.ROWS[name], measured['runs']
  average, error = standard_error(runs)
  ends = average - 1.96 * error, average + 1.96 * error
  # Trained on all at once, a method has no matrix over time.
  matrices = [] if row.at_once else [run['matrix'] for run in runs]
  learned = methods.summary(matrices) if matrices else {}
  numbers = {name: average, f'{name} standard error': error}
  numbers |= {f'{name} {key}': value for key, value in learned.items()}
  first = runs[0]
  made = report.Row(
    row.title,
    average,
    ends,
    setting=f'{measured["strength"]:g}' if row.grid else '',
    trainable=first['trainable'],
    seconds=float(np.mean([run['seconds'] for run in runs])),
    baseline=name == 'none',
    ceiling=row.at_once,
    more={
      'published': published,
      'forgetting': learned.get('forgetting (Chaudhry)'),
    },
  )
  return made, numbers, {name: ends}


def run(
  table: Table, title: str, published: Mapping[str, float], picture: str
) -> dict:
  """All rows, the table and the matrices as a picture."""
  config, bench = table.config, table.bench
  made, numbers, ci95, matrices, last = [], {}, {}, {}, {}
  for name in config.methods:
    measured = table.measure(name)
    row, values, ends = shown(table, name, measured, published.get(name))
    made.append(row)
    numbers, ci95, last = numbers | values, ci95 | ends, measured['runs'][0]
    if not rows.ROWS[name].at_once:
      matrices[row.name] = np.mean(
        [metrics.accuracy_matrix(r['matrix']) for r in measured['runs']], axis=0
      )
  names = tuple(task.name for task in bench.tasks.train)
  panel = report.Panel(
    title,
    f'How much is forgotten in the {config.scenario} scenario?',
    made,
    f'mean over {config.seeds} seeds, 1.96 standard errors; '
    f'{config.iterations} iterations a task, batches of {config.batch_size}, '
    f'Adam {config.rate:g}; memory of {config.memory_size} rows; importance '
    f'over {config.fisher_examples} rows of a task',
    report.stream(made, matrices, names) if matrices else None,
    metric='average accuracy',
  )
  print(report.terminal_table(panel))
  if panel.figure:
    (table.context.workdir / picture).write_bytes(panel.figure.png)
  costs = 'steps', 'examples_per_second', 'flops_per_step', 'peak_bytes'
  return {
    'metrics': numbers,
    'ci95': ci95,
    **{key: last[key] for key in costs},
    'trainable_parameters': last['trainable'],
    'total_parameters': last['trainable'],
    'data_sha256': data.fingerprint(table.splits['train']),
  }
