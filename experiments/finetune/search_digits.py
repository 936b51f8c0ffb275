"""Four ways to choose hyper-parameters against a fixed grid, at equal compute.

  python -m experiments.run --config=experiments/finetune/search_digits.py

An MLP learns scikit-learn's 8x8 digits with AdamW; what is searched is the
rate, the weight decay and the multiplier of the head's rate. Every row may
spend as many training steps as the grid of 16 settings does, chooses by
accuracy on 300 validation digits and is measured once on the 360 test digits
(other writers than in training):

  fixed grid    4 rates x 2 decays x 2 multipliers over the box below
  random        16 settings, log-uniform over the box
  range test    its suggestion, then 15 settings with rates around it
  halving       96 settings, eta 4, a quarter goes on twice
  population    16 members, 8 rounds, rates, decays and multipliers move

All settings of a row train in one compiled step. The mean is over seeds (each
with its own initial weights, data order and draws); intervals and paired
differences to the grid resample test digits, as digits name no writers.
Measured: experiments/README.md.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

import fmeta
from experiments.common import Seeds, trial
from experiments.finetune.searches import Bench, Search
from fmeta import data, metrics, search
from fmeta.report import Panel, Row, terminal_table
from fmeta.search.halving import num_steps
from fmeta.workdir import Context

REFERENCE = 'fixed grid'


@dataclasses.dataclass
class Config:
  """What one would sweep; the box and the budget are untuned."""

  seed: Seeds = dataclasses.field(default_factory=Seeds)
  seeds: int = 5
  rows: tuple[str, ...] = (
    REFERENCE,
    'random',
    'range test',
    'halving',
    'population',
  )
  hidden: int = 64
  batch_size: int = 32
  steps: int = 320
  trials: int = 16
  halving_trials: int = 96
  eta: int = 4
  depth: int = 2
  rounds: int = 8
  ramp_steps: int = 100
  steps_per_dispatch: int = 20
  train_examples: int = 1137
  rate: tuple[float, float] = (1e-5, 1e-1)
  decay: tuple[float, float] = (1e-3, 1.0)
  head: tuple[float, float] = (0.1, 10.0)


SMALL = {
  'seeds': 1,
  'rows': (REFERENCE, 'range test', 'halving', 'population'),
  'hidden': 8,
  'steps': 16,
  'trials': 4,
  'halving_trials': 4,
  'eta': 2,
  'depth': 1,
  'rounds': 2,
  'ramp_steps': 8,
  'steps_per_dispatch': 8,
}


def fixed_grid(task: Search) -> dict:
  """Rates inside the box's ends, decay and multiplier at two values each."""
  box, size = task.bench.box(), task.bench.config.trials

  def between(name, count):
    # The middles of `count` equal parts of the range's logarithm.
    low, high = np.log(box[name])
    return np.exp(low + (high - low) * (np.arange(count) + 0.5) / count)

  return task.best_of(
    search.grid(
      rate=between('rate', size // 4),
      decay=between('decay', 2),
      head=between('head', 2),
    )
  )


def random(task: Search) -> dict:
  """Settings from the whole box."""
  return task.best_of(task.draw(task.bench.config.trials))


def range_test(task: Search) -> dict:
  """Rates within a factor of three of what a range test suggests."""
  config = task.bench.config
  state = task.bench.learner({'rate': 0.0, 'decay': 0.01, 'head': 1.0}).init(
    task.params, task.rng
  )
  found = search.range_test(
    task.bench.learner,
    state,
    task.batches,
    task.rng,
    hyper={'decay': 0.01, 'head': 1.0},
    num_steps=config.ramp_steps,
  )
  if task.number == 0:
    path = task.bench.context.workdir / 'range.png'
    path.write_bytes(search.figure(found).png)
  print(f'seed {task.number}: range test suggests {found.suggestion:.2g}')
  rates = (found.suggestion / 3, found.suggestion * 3)
  hyper = task.draw(config.trials - 1, rate=rates)
  return task.best_of(hyper, spent=config.ramp_steps)


def halving(task: Search) -> dict:
  """More settings, most of them stopped early."""
  config = task.bench.config
  plan = search.rungs(
    config.halving_trials, config.steps, eta=config.eta, depth=config.depth
  )
  steps = task.bench.afford(num_steps(plan))
  found = task.halve(task.draw(config.halving_trials), plan)
  return task.chosen(found.state, found.score, steps)


def population(task: Search) -> dict:
  """As many members as the grid has settings; all of them train on."""
  config, bench = task.bench.config, task.bench
  hyper = task.draw(config.trials)
  found = search.population(
    bench.trials,
    task.start(hyper),
    hyper,
    task.batches,
    task.rng,
    bench.score,
    search.Exploration(bench.box(), seed=task.number),
    interval=config.steps // config.rounds,
    num_rounds=config.rounds,
    ledger=task.ledger,
  )
  return task.chosen(found.state, found.score, config.trials * config.steps)


ROWS: dict[str, Callable[[Search], dict]] = {
  REFERENCE: fixed_grid,
  'random': random,
  'range test': range_test,
  'halving': halving,
  'population': population,
}


def results(bench: Bench) -> dict[str, list[dict]]:
  """Row -> one result per seed; finished ones are read."""
  found = {}
  for name in bench.config.rows:
    if name not in ROWS:
      raise fmeta.UsageError(f'no row {name!r}; possible: {sorted(ROWS)}')
    slug = name.replace(' ', '_')
    found[name] = [
      trial(
        bench.context,
        f'{slug}/seed_{seed}',
        lambda name=name, slug=slug, seed=seed: ROWS[name](
          Search(bench, seed, slug)
        ),
      )
      for seed in range(bench.config.seeds)
    ]
  return found


def row_of(name: str, runs: list[dict], against: list[dict]) -> Row:
  """A line of the table."""
  correct = np.array([run['correct'] for run in runs])
  interval = metrics.bootstrap_ci(correct)
  difference = metrics.paired_bootstrap(
    correct, np.array([run['correct'] for run in against])
  )
  return Row(
    name,
    interval.mean,
    interval.ci95,
    setting=f'{runs[0]["steps"]:,} steps',
    seconds=float(np.mean([run['seconds'] for run in runs])),
    baseline=name == REFERENCE,
    difference=None if name == REFERENCE else tuple(difference),
    more={'validation': float(np.mean([run['validation'] for run in runs]))},
  )


def run(config: Config, context: Context) -> dict:
  """Searches, prints the table, returns the numbers."""
  bench = Bench(config, context)
  found = results(bench)
  against = found.get(REFERENCE, next(iter(found.values())))
  rows = [row_of(name, runs, against) for name, runs in found.items()]
  panel = Panel(
    'Search',
    'What does a search of equal compute find?',
    rows,
    reference=rows[0].name,
  )
  print(terminal_table(panel))
  for name, runs in found.items():
    each = [f'{100 * np.mean(run["correct"]):.1f}' for run in runs]
    print(f'{name}: by seed {" ".join(each)}')
  print(f'{bench.trials.traces} programs traced for all trials')
  differences = {
    f'{row.name} minus {REFERENCE}': row.difference
    for row in rows
    if row.difference
  }
  return {
    'metrics': {
      **{row.name: row.value for row in rows},
      **{name: mean for name, (mean, _, _) in differences.items()},
    },
    'ci95': {
      **{row.name: row.ci95 for row in rows},
      **{name: ends for name, (_, *ends) in differences.items()},
    },
    'steps': bench.budget() * config.seeds * len(rows),
    'data_sha256': data.fingerprint(bench.train),
  }
