"""How much does it forget over a stream of packages? Panel C.

  python -m experiments.run \\
    --config=experiments/continual/docparams_by_package.py

all-MiniLM-L6-v2 learns to infer a parameter's declared type from its
description, from one package's documentation after the other: the same ten
classes in every task (domain-incremental). The last blocks and the head move,
the frozen rest runs once per text. Rows:

- naive: the step, nothing else;
- EWC: a quadratic penalty per finished package, weighted by the Fisher
  information with labels sampled from the model (Kirkpatrick et al. 2017);
- replay: a reservoir of earlier texts, as many in each step as new ones
  (Chaudhry et al. 2019, https://arxiv.org/abs/1902.10486);
- joint: all packages at once for as many steps, the upper bound;
- nearest class mean of the frozen embeddings.

Every trained row chooses from six settings by the validation accuracy over
all packages after a shorter stream; then it trains once per seed. Rates are
constant: a schedule over the stream would spare the last packages. Rate and
EWC's strength are data to the step, so all settings share a program.
Expected and measured: experiments/README.md.
"""

import dataclasses
from typing import Any

import jax
import numpy as np

import fmeta
from experiments.common import Seeds, best_setting, placement, trial
from experiments.continual import methods, packages
from experiments.continual.packages import Bench, initial_params, protocol
from fmeta import metrics as measures
from fmeta import report, table, train
from fmeta.datasets import docparams
from fmeta.pretrained import MINILM
from fmeta.stream import Task
from fmeta.workdir import Context

TITLES = {'naive': 'naive', 'ewc': 'EWC', 'replay': 'replay', 'joint': 'joint'}
MEAN = 'nearest class mean'
RATES = (1e-4, 2e-4, 4e-4, 8e-4, 16e-4, 32e-4)


@dataclasses.dataclass
class Config:
  """What one would sweep."""

  seed: Seeds = dataclasses.field(default_factory=Seeds)
  seeds: int = 1
  model: str = MINILM
  methods: tuple[str, ...] = ('naive', 'ewc', 'replay', 'joint')
  packages: tuple[str, ...] = tuple(docparams.PACKAGES)
  blocks: int = 1
  epochs: int = 1
  batch_size: int = 16
  max_length: int = 32
  # The fresh head moves faster than what it stands on (untuned).
  head_multiplier: float = 10.0
  # Six settings a row; EWC's strengths are decades (see the README).
  rates_naive: tuple[float, ...] = RATES
  rates_ewc: tuple[float, ...] = (2e-4, 4e-4)
  strengths_ewc: tuple[float, ...] = (100.0, 1000.0, 10000.0)
  rates_replay: tuple[float, ...] = RATES
  rates_joint: tuple[float, ...] = RATES
  memory_size: int = 120
  fisher_examples: int = 64
  # Per package; test examples are all of them unless cut for a test.
  train_examples: int = 256
  search_examples: int = 64
  validation_examples: int = 40
  matrix_examples: int = 100
  test_examples: int | None = None


SMALL = {
  'packages': ('numpy', 'pandas'),
  'methods': ('naive', 'ewc', 'replay'),
  'rates_naive': (1e-3, 2e-3),
  'rates_ewc': (1e-3,),
  'strengths_ewc': (100.0,),
  'rates_replay': (1e-3,),
  'memory_size': 20,
  'fisher_examples': 4,
  'train_examples': 32,
  'search_examples': 16,
  'validation_examples': 16,
  'matrix_examples': 16,
  'test_examples': 16,
}


class Method:
  """One row: its grid, its search and its final runs."""

  def __init__(self, bench: Bench, context: Context, name: str):
    self.bench, self.context, self.name = bench, context, name
    config = bench.config
    rates = getattr(config, f'rates_{name}')
    strengths = config.strengths_ewc if name == 'ewc' else (0.0,)
    grid = [methods.Setting(r, s) for r in rates for s in strengths]
    self.grid = {str(setting): setting for setting in grid}

  def fit(
    self,
    setting: methods.Setting,
    tasks: list[Task],
    seed: int,
    **options: Any,
  ) -> train.Fitted:
    """Moves through the stream once."""
    bench, seeds = self.bench, self.bench.config.seed
    learner = methods.learner(bench.recipe, self.name, setting, bench.rows)
    params = initial_params(bench.config.model, seeds.init + seed)
    return train.fit(
      learner,
      learner.init(params, jax.random.key(seeds.init + seed)),
      methods.stages(bench.recipe, self.name, tasks, seeds.data + seed),
      jax.random.key(seeds.train + seed),
      forward=bench.forward,
      log_every=5,
      **placement(self.context),
      **options,
    )

  def search(self) -> dict[str, float]:
    """Validation accuracy of each setting after a shorter stream."""
    bench, tried = self.bench, {}
    tasks = bench.tasks(bench.config.search_examples)
    for text_of, setting in self.grid.items():

      def run(setting=setting):
        fitted = self.fit(setting, tasks, 0, quiet=True)
        predicted = bench.predict(fitted.params, bench.validation)
        return {'value': predicted.accuracy}

      name = f'continual/{self.name}/{text_of.replace(", ", "_")}'
      name = name.replace(' ', '_')
      tried[text_of] = trial(self.context, name, run)['value']
    return tried

  def final(self, setting: methods.Setting, seed: int) -> dict[str, Any]:
    """The whole stream: accuracy matrix and final test correctness."""
    bench, context = self.bench, self.context

    def run():
      options = {}
      if seed == 0:
        options = {
          'workdir': context.workdir / 'fit' / f'continual_{self.name}',
          'resume': context.resume,
          'keep': 1,
        }
      if self.name != 'joint':
        options['after_stage'] = lambda params, state, stage: bench.accuracies(
          params, stage + 1
        )
      fitted = self.fit(setting, bench.tasks(), seed, **options)
      return {
        'correct': bench.predict(fitted.params, bench.test).correct.tolist(),
        'matrix': fitted.matrix,
        'product': methods.divergence_product(bench.recipe, setting, fitted),
        'steps': fitted.steps,
        'trainable': fmeta.tree.size(fitted.state.trainable),
        'examples_per_second': fitted.examples_per_second,
        'flops_per_step': fitted.flops_per_step,
        'peak_bytes': fitted.peak_bytes,
      }

    return trial(context, f'continual/{self.name}/seed_{seed}', run)

  def measure(self) -> tuple[str, list[dict[str, Any]]]:
    """The chosen setting, and a final run per seed."""
    chosen = next(iter(self.grid))
    if len(self.grid) > 1:
      tried = self.search()
      print(f'{self.name}: validation accuracy by setting {tried}', flush=True)
      chosen = best_setting(tried)
    seeds = range(self.bench.config.seeds)
    runs = [self.final(self.grid[chosen], seed) for seed in seeds]
    product = max(run['product'] for run in runs)
    if product > 2:
      print(
        f'warning: rate * strength * max F = {product:.2g} > 2: plain '
        'gradient descent would diverge; lower the rate or the strength'
      )
    return chosen, runs


def row_of(
  bench: Bench, title: str, correct: dict, chosen: str, runs: list
) -> tuple[report.Row, dict, dict]:
  """The table's row, its numbers and their intervals."""
  groups = bench.test['file']
  interval = measures.bootstrap_ci(correct[title], groups)
  numbers, ci95 = {title: interval.mean}, {title: interval.ci95}
  difference = None
  if title != 'naive' and 'naive' in correct:
    against = measures.paired_bootstrap(
      correct[title], correct['naive'], groups
    )
    difference = tuple(against)
    numbers[f'{title} minus naive'] = against.mean
    ci95[f'{title} minus naive'] = against.ci95
  learned = methods.summary([run['matrix'] for run in runs]) if runs else {}
  for name, value in learned.items():
    numbers[f'{title} {name}'] = value
  if title == TITLES['ewc']:
    numbers[f'{title} rate * strength * max F'] = max(
      run['product'] for run in runs
    )
  row = report.Row(
    title,
    interval.mean,
    interval.ci95,
    setting=chosen,
    trainable=runs[0]['trainable'] if runs else None,
    seconds=float(np.mean([r['seconds'] for r in runs])) if runs else None,
    baseline=not runs,
    ceiling=title == 'joint',
    difference=difference,
    more={
      'average': learned.get('average accuracy'),
      'forgetting': learned.get('forgetting (Chaudhry)'),
    },
  )
  return row, numbers, ci95


def panel(config: Config, context: Context) -> tuple[report.Panel, dict]:
  """Trains every row and returns the panel and its numbers."""
  packages.check(config)
  bench = Bench(config)
  tuned = bench.recipe.tuning
  print(
    table.parameter_table(
      bench.parameters,
      tuned,
      jax.random.key(0),
      rates=bench.recipe.multipliers,
    ),
    flush=True,
  )
  chosen, runs, correct = {MEAN: 'cosine, frozen'}, {MEAN: []}, {}
  for name in config.methods:
    title = TITLES[name]
    method = Method(bench, context, name)
    chosen[title], runs[title] = method.measure()
    correct[title] = np.array([run['correct'] for run in runs[title]])
  correct[MEAN] = bench.nearest_mean()[None]
  rows, numbers, ci95 = [], {}, {}
  for title in correct:
    row, values, ends = row_of(
      bench, title, correct, chosen[title], runs[title]
    )
    rows.append(row)
    numbers |= {f'continual/{key}': value for key, value in values.items()}
    ci95 |= {f'continual/{key}': value for key, value in ends.items()}
  matrices = {
    title: np.mean(
      [measures.accuracy_matrix(run['matrix']) for run in made], axis=0
    )
    for title, made in runs.items()
    if made and len(made[0]['matrix']) > 1
  }
  lost = numbers.get('continual/naive forgetting (Chaudhry)')
  total = fmeta.tree.size(bench.parameters)
  shown = report.Panel(
    'Continual learning',
    'How much does it forget over a stream of packages?',
    rows,
    protocol(bench) + methods.remark(lost),
    report.stream(rows, matrices, config.packages, metric='final accuracy'),
    metric='final accuracy',
    reference='naive' if 'naive' in correct else None,
    total=total,
  )
  last = runs[TITLES[config.methods[-1]]][0]
  costs = ('steps', 'examples_per_second', 'flops_per_step', 'peak_bytes')
  outcome = {
    'metrics': numbers,
    'ci95': ci95,
    **{key: last[key] for key in costs},
    'trainable_parameters': last['trainable'],
    'total_parameters': total,
    'data_sha256': bench.fingerprint,
  }
  return shown, outcome


def run(config: Config, context: Context) -> dict:
  """Prints the table and writes the picture."""
  shown, outcome = panel(config, context)
  print(report.terminal_table(shown))
  print(report.answer(shown))
  if shown.figure:
    (context.workdir / 'panel_c.png').write_bytes(shown.figure.png)
  return outcome
