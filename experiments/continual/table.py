"""Runs every row over its seeds, chooses strengths, and shows the table.

A strength is chosen once, by the accuracy on held-out training rows after a
stream over the others with a seed of its own; the final runs train on all
rows. The whole grid is printed.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

import fmeta
from experiments.common import (
  Seeds,
  best_setting,
  placement,
  require,
  trial,
)
from experiments.continual import methods, rows
from experiments.continual.bench import SCENARIOS, Bench, by_label
from fmeta import data, metrics, report, train
from fmeta.workdir import Context

SEARCH_SEED = 1000  # no final run has it
# The smallest values that mean something, in each stream that has them.
LEAST = dict.fromkeys(
  (
    'seeds',
    'sizes',
    'iterations',
    'batch_size',
    'memory_size',
    'fisher_examples',
    'steps_per_dispatch',
    'train_examples',
    'test_examples',
    'tasks',
    'blocks',
    'random_features',
  ),
  1,
)


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
    held_out: share of the training rows, the last, that a search validates on.
    bench_of: `(splits, order) -> Bench`; the order of the tasks is a number.
    reorders: whether each seed has an order of its own.
  """

  def __init__(
    self,
    config: Config,
    context: Context,
    splits: Splits,
    held_out: float,
    bench_of: Callable[[Splits, int], Bench],
    reorders: bool = False,
  ):
    self.config, self.context, self.splits = config, context, splits
    self.held_out, self.bench_of = held_out, bench_of
    self.given = strengths_of(config.strengths)
    self.reorders, self.bench = reorders, bench_of(splits, 0)
    start = jax.eval_shape(self.bench.start, jax.random.key(0))
    self.parameters = fmeta.tree.size(start)
    self._order = 0
    for name in config.methods:  # Not after hours of the rows before.
      rows.check_sizes(rows.ROWS[name], self.recipe(self.bench))

  def bench_of_seed(self, seed: int) -> Bench:
    """The stream that a seed moves through."""
    if self.reorders and seed != self._order:
      self._order, self.bench = seed, self.bench_of(self.splits, seed)
    return self.bench

  def recipe(self, bench: Bench) -> rows.Recipe:
    """What all rows share."""
    config = self.config
    return rows.Recipe(
      bench, config.rate, config.batch_size, config.memory_size
    )

  def fit(
    self, bench: Bench, name: str, strength: float, seed: int
  ) -> train.Fitted:
    """Moves through a stream once."""
    config, row = self.config, rows.ROWS[name]
    learner = row.learner(self.recipe(bench), strength)
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
    size = row.new(self.recipe(bench))
    if row.at_once:
      batches = bench.batches(range(len(tasks)), size, seed)
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

  def choose(self, name: str) -> tuple[float, dict[str, float | None]]:
    """A strength, and the validation accuracy of each; None: it diverged.

    Raises:
      UsageError: if all of them did.
    """
    row = rows.ROWS[name]
    if name in self.given or not row.grid:
      return self.given.get(name, 0.0), {}
    whole = self.splits['train']
    cut = int(len(whole['label']) * (1 - self.held_out))
    held = {
      'train': data.take(whole, slice(cut)),
      'test': data.take(whole, slice(cut, None)),
    }
    bench, tried = self.bench_of(held, SEARCH_SEED), {}
    for strength in row.grid:

      def run(strength=strength):
        try:
          fitted = self.fit(bench, name, strength, SEARCH_SEED)
        except train.Diverged:
          return {'value': None}  # a strength too many
        return {'value': float(np.mean(fitted.matrix[-1]))}

      where = f'{self.config.scenario}/{name}/strength_{strength:g}'
      tried[f'{strength:g}'] = trial(self.context, where, run)['value']
    finite = {k: value for k, value in tried.items() if value is not None}
    if not finite:
      raise fmeta.UsageError(
        f'{name} diverged with every strength of its grid {list(tried)}; lower '
        '--config.rate'
      )
    return float(best_setting(finite)), tried

  def final(self, name: str, strength: float, seed: int) -> dict[str, Any]:
    """The whole stream with one seed."""

    def run():
      bench, row = self.bench_of_seed(seed), rows.ROWS[name]
      recipe = self.recipe(bench)
      fitted = self.fit(bench, name, strength, seed)
      cost = metrics.cost_of(
        fitted, row.new(recipe) + row.replayed(recipe), self.parameters
      )
      answers = {}
      if self.reorders:  # The test rows are then what runs have in common.
        last = len(bench.tasks.test) - 1
        correct = bench.correct(fitted.params, last)
        answers['correct'] = by_label(bench.tasks.test, correct)
      return {
        **answers,
        'matrix': fitted.matrix,
        'tasks': [task.name for task in bench.tasks.train],
        'cost': dataclasses.asdict(cost),
        'steps': fitted.steps,
        'examples_per_second': fitted.examples_per_second,
        'flops_per_step': fitted.flops_per_step,
        'peak_bytes': fitted.peak_bytes,
        'trainable': fmeta.tree.size(fitted.state.trainable),
      }

    where = f'{self.config.scenario}/{name}/seed_{seed}'
    return trial(self.context, where, run)

  def measure(self, name: str) -> 'Measured':
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
    return Measured(rows.ROWS[name], strength, runs)


def check(config: Config) -> None:
  """Raises `UsageError` for what does not exist, before data are read."""
  require(config, LEAST, ('rate',))
  rows.check(config.methods)
  if not config.methods:
    raise fmeta.UsageError(
      f'config.methods is empty; give some of {", ".join(rows.ROWS)}'
    )
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
    if not rows.ROWS[name].grid:
      with_one = [key for key, row in rows.ROWS.items() if row.grid]
      raise fmeta.UsageError(
        f'{name!r} has no strength; possible: {", ".join(with_one)}'
      )
    try:
      found[name] = float(value)
    except ValueError:
      found[name] = np.nan
    if not 0 <= found[name] < np.inf:
      raise fmeta.UsageError(
        f'strength {item!r}; give method:number, for example ewc:1e5'
      )
  return found


def _at_an_edge(strength: float, grid: Sequence[float]) -> str:
  return ' (an edge of the grid)' if strength in (grid[0], grid[-1]) else ''


def standard_error(runs: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
  """Mean final accuracy over seeds and its standard error."""
  finals = [final_accuracy(run['matrix']) for run in runs]
  spread = np.std(finals, ddof=1) / len(finals) ** 0.5 if finals[1:] else 0.0
  return float(np.mean(finals)), float(spread)


def final_accuracy(matrix: Sequence[Sequence[float]]) -> float:
  """Mean over tasks after the last, also of a method without a history."""
  return float(np.mean(matrix[-1]))


class Measured(NamedTuple):
  """A row of the table.

  Attributes:
    row: what it is.
    strength: chosen.
    runs: a result per seed, with `matrix` and `seconds`.
  """

  row: rows.Row
  strength: float
  runs: list[dict[str, Any]]


def _answers(measured: Measured) -> np.ndarray:
  return np.array([run['correct'] for run in measured.runs])


def interval_of(measured: Measured) -> tuple[float, float] | None:
  """95% of the final accuracy.

  Over test rows where orders differ, else over seeds: None for a single one.
  """
  if 'correct' in measured.runs[0]:
    return metrics.bootstrap_ci(_answers(measured)).ci95
  if not measured.runs[1:]:
    return None
  finals = [final_accuracy(run['matrix']) for run in measured.runs]
  return metrics.mean_t(finals).ci95


def difference_of(
  measured: Measured, reference: Measured
) -> metrics.Interval | None:
  """Final accuracy minus the reference's.

  Over test rows, where both answered the same ones (means over orders first);
  else over seeds, None for a single one.
  """
  runs, others = measured.runs, reference.runs
  if 'correct' in runs[0] and 'correct' in others[0]:
    return metrics.paired_bootstrap(_answers(measured), _answers(reference))
  if not runs[1:]:
    return None
  return metrics.paired_difference(
    dict(enumerate(run['matrix'] for run in runs)),
    dict(enumerate(run['matrix'] for run in others)),
    final_accuracy,
  )


def shown(
  name: str,
  measured: Measured,
  published: float | None,
  reference: Measured | None,
) -> tuple[report.Row, dict[str, float], dict[str, tuple[float, float]]]:
  """The table's row, its numbers and their intervals."""
  row, runs = measured.row, measured.runs
  average, error = standard_error(runs)
  ends = interval_of(measured)
  # Trained on all at once, a method has no matrix over time.
  matrices = [] if row.at_once else [run['matrix'] for run in runs]
  learned = methods.summary(matrices) if matrices else {}
  numbers = {name: average, f'{name} standard error': error}
  numbers |= {f'{name} {key}': value for key, value in learned.items()}
  ci95, difference = {} if ends is None else {name: ends}, None
  if reference is not None and (against := difference_of(measured, reference)):
    difference = (against.mean, *against.ci95)
    numbers[f'{name} minus {reference.row.title}'] = against.mean
    ci95[f'{name} minus {reference.row.title}'] = against.ci95
  made = report.Row(
    row.title,
    average,
    ends,
    setting=f'{measured.strength:g}' if row.grid else '',
    trainable=runs[0]['trainable'],
    seconds=float(np.mean([run['seconds'] for run in runs])),
    baseline=reference is None,
    ceiling=row.at_once,
    difference=difference,
    more={
      'published': published,
      'forgetting': learned.get('forgetting (Chaudhry)'),
    },
  )
  return made, numbers, ci95


def run(
  table: Table,
  title: str,
  published: Mapping[str, float],
  picture: str,
  more: Mapping[str, Measured] | None = None,
) -> dict:
  """All rows, the table and the matrices as a picture.

  Args:
    table: with the methods of its config.
    title: of the table.
    published: method -> average accuracy.
    picture: its file name in the workdir.
    more: rows measured otherwise; differences are against the first of them,
      or of all.
  """
  config, measured = table.config, dict(more or {})
  for name in config.methods:
    measured[name] = table.measure(name)
  first = next(iter(measured))
  made, numbers, ci95, matrices = [], {}, {}, {}
  for name, found in measured.items():
    against = None if name == first else measured[first]
    row, values, ends = shown(name, found, published.get(name), against)
    made.append(row)
    numbers, ci95 = numbers | values, ci95 | ends
    if not found.row.at_once:
      every = [metrics.accuracy_matrix(r['matrix']) for r in found.runs]
      matrices[row.name] = np.mean(every, axis=0)
  last = measured[config.methods[-1]].runs[0]
  names = tuple(last['tasks'])
  if table.reorders:
    names = tuple(f'task {k + 1}' for k in range(len(names)))
  panel = report.Panel(
    title,
    f'How much is forgotten in the {config.scenario} scenario?',
    made,
    f'mean over {config.seeds} seeds; '
    + (
      'each with its order of tasks; intervals over test rows; '
      if table.reorders
      else 't-intervals over seeds, of differences pair by pair; '
    )
    + f'{config.iterations} iterations a task, batches of '
    f'{config.batch_size}, Adam {config.rate:g}; memory of '
    f'{config.memory_size} rows; importance over {config.fisher_examples} '
    'rows of a task',
    report.stream(made, matrices, names) if matrices else None,
    metric='average accuracy',
    reference=measured[first].row.title if measured else None,
  )
  print(report.terminal_table(panel))
  print(panel.note)
  if panel.figure:
    (table.context.workdir / picture).write_bytes(panel.figure.png)
  costs = 'steps', 'examples_per_second', 'flops_per_step', 'peak_bytes'
  return {
    'metrics': numbers,
    'ci95': ci95,
    **{key: last[key] for key in costs},
    'trainable_parameters': last['trainable'],
    'total_parameters': table.parameters,
    'data_sha256': data.fingerprint(table.splits['train']),
  }
