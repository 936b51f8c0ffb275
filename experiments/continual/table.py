"""Runs every row over its seeds and chooses strengths.

A strength is chosen once, by the accuracy on held-out training rows after a
stream over the others with a seed of its own; the final runs train on all
rows. The whole grid is printed.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import numpy as np

import fmeta
from experiments.common import best_setting, placement, trial
from experiments.continual import rows
from experiments.continual.bench import Bench, by_label
from experiments.continual.measured import Measured
from experiments.continual.settings import Config, rates_of, strengths_of
from fmeta import data, metrics, train
from fmeta.workdir import Context

SEARCH_SEED = 1000  # no final run has it

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
    tunings: what moves in a row called `method@name`.
  """

  def __init__(
    self,
    config: Config,
    context: Context,
    splits: Splits,
    held_out: float,
    bench_of: Callable[[Splits, int], Bench],
    reorders: bool = False,
    tunings: Mapping[str, fmeta.Tuning] = MappingProxyType({}),
  ):
    self.config, self.context, self.splits = config, context, splits
    self.held_out, self.bench_of, self.tunings = held_out, bench_of, tunings
    self.given = strengths_of(config.strengths, tunings)
    self.rates = rates_of(config.rates, tunings)
    self.reorders, self.bench = reorders, bench_of(splits, 0)
    start = jax.eval_shape(self.bench.start, jax.random.key(0))
    self.parameters = fmeta.tree.size(start)
    self._order = 0
    for name in config.methods:  # Not after hours of the rows before.
      row = self.row(name)
      rows.check_sizes(row, self.recipe(self.bench, row))

  def row(self, name: str) -> rows.Row:
    """A method, perhaps with what moves."""
    return rows.find(name, self.tunings)

  def bench_of_seed(self, seed: int) -> Bench:
    """The stream that a seed moves through."""
    if self.reorders and seed != self._order:
      self._order, self.bench = seed, self.bench_of(self.splits, seed)
    return self.bench

  def recipe(self, bench: Bench, row: rows.Row) -> rows.Recipe:
    """What all rows share, and what moves in this one."""
    config = self.config
    tuning = self.tunings[row.tuning] if row.tuning else bench.tuning
    rate = self.rates.get(row.tuning, config.rate)
    return rows.Recipe(
      bench, rate, config.batch_size, config.memory_size, tuning
    )

  def fit(
    self, bench: Bench, name: str, strength: float, seed: int
  ) -> train.Fitted:
    """Moves through a stream once."""
    config, row = self.config, self.row(name)
    learner = row.learner(self.recipe(bench, row), strength)
    key = jax.random.key(config.seed.init + seed)
    last = len(bench.tasks.train) - 1
    return train.fit(
      learner,
      learner.init(bench.start(key), key, bench.model_state),
      self.stages(bench, row, config.seed.data + seed),
      jax.random.key(config.seed.train + seed),
      forward=bench.answers,
      after_stage=lambda params, state, stage: bench.accuracies(
        params, state, last if row.at_once else stage
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
    size = row.new(self.recipe(bench, row))
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
    row = self.row(name)
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
      bench, row = self.bench_of_seed(seed), self.row(name)
      recipe = self.recipe(bench, row)
      fitted = self.fit(bench, name, strength, seed)
      cost = metrics.cost_of(
        fitted, row.new(recipe) + row.replayed(recipe), self.parameters
      )
      answers = {}
      if self.reorders:  # The test rows are then what runs have in common.
        last = len(bench.tasks.test) - 1
        state = fitted.state.model_state
        correct = bench.correct(fitted.params, state, last)
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

  def measure(self, name: str) -> Measured:
    """A row: what was chosen, and a run per seed."""
    strength, tried = self.choose(name)
    if tried:
      edge = _at_an_edge(strength, self.row(name).grid)
      print(f'{name}: validation by strength {tried}{edge}', flush=True)
    runs = []
    for seed in range(self.config.seeds):
      runs.append(self.final(name, strength, seed))
      average = 100 * np.mean(runs[-1]['matrix'][-1])
      print(
        f'{name}, seed {seed}: {average:.2f} % in {runs[-1]["seconds"]:.0f} s',
        flush=True,
      )
    return Measured(self.row(name), strength, runs)


def _at_an_edge(strength: float, grid: Sequence[float]) -> str:
  return ' (an edge of the grid)' if strength in (grid[0], grid[-1]) else ''
