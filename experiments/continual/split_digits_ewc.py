"""Split digits: five tasks of two digits each, in three scenarios.

  python -m experiments.run --config=experiments/continual/split_digits_ewc.py

scikit-learn's 8x8 digits as 0/1, 2/3, 4/5, 6/7, 8/9; an MLP learns one pair
after the other. The scenario says what is asked at test time (van de Ven &
Tolias 2019, https://arxiv.org/abs/1904.07734): 'task', which of the two digits
of a known pair; 'domain', whether the digit is odd; 'class', which of the ten.
Naive, EWC with the exact Fisher, replay and joint training; mean over seeds
and its 95% interval 1.96 std / sqrt(seeds).

Published for split MNIST, average accuracy task / domain / class: none 85.15 /
57.33 / 19.90, joint 99.64 / 98.41 / 97.93 (van de Ven & Tolias 2018,
https://arxiv.org/abs/1809.10635, table 3), EWC with a tuned strength 98.64 /
63.95 / 20.01 (2019). Digits is a smaller problem: the order of the rows is
expected, not the numbers. Measured: experiments/README.md.
"""

import dataclasses
from typing import Any, Literal

import jax
import numpy as np

import fmeta
from experiments.common import Seeds, placement, require, trial
from experiments.continual import methods
from fmeta import continual, data, evaluate, metrics, models, train
from fmeta import stream as streams
from fmeta.datasets import digits
from fmeta.models import Mlp
from fmeta.report import Panel, Row, stream, terminal_table
from fmeta.workdir import Context

PAIRS = {f'{a}/{a + 1}': (a, a + 1) for a in range(0, 10, 2)}


@dataclasses.dataclass
class Config:
  """What one would sweep; rate and batch size are untuned."""

  seed: Seeds = dataclasses.field(default_factory=Seeds)
  seeds: int = 5
  scenario: Literal['task', 'domain', 'class'] = 'task'
  methods: tuple[str, ...] = methods.NAMES
  sizes: tuple[int, ...] = (100, 100)
  steps_per_task: int = 100
  batch_size: int = 32
  rate: float = 1e-3
  strength: float = 1000.0
  memory_size: int = 100
  fisher_examples: int = 200


# The smallest values that mean something.
LEAST = dict.fromkeys(
  (
    'seeds',
    'sizes',
    'steps_per_task',
    'batch_size',
    'memory_size',
    'fisher_examples',
  ),
  1,
) | {'strength': 0}
SMALL = {
  'seeds': 1,
  'methods': ('naive', 'ewc', 'replay'),
  'sizes': (16,),
  'steps_per_task': 6,
  'fisher_examples': 8,
  'memory_size': 40,
}


@dataclasses.dataclass
class Bench:
  """The tasks of a scenario and the model's forward pass."""

  config: Config
  module: Mlp
  forward: fmeta.Forward
  train: list[streams.Task]
  test: list[streams.Task]

  @property
  def recipe(self) -> methods.Recipe:
    """What all rows share."""
    config = self.config
    return methods.Recipe(
      loss=fmeta.supervised(self.forward, fmeta.softmax_cross_entropy),
      tuning=fmeta.full(),
      importance=methods.EXACT,
      batch_size=config.batch_size,
      steps_per_task=lambda examples: config.steps_per_task,
      memory_size=config.memory_size,
      replayed=config.batch_size,
      fisher_examples=config.fisher_examples,
    )


def tasks_of(columns: data.Columns, scenario: str) -> list[streams.Task]:
  """The pairs of digits; each row knows the classes of its task."""
  relabel = scenario == 'domain'
  tasks = streams.by_classes(columns, PAIRS, relabel=relabel)
  if scenario != 'task':
    return tasks
  known = streams.allowed_classes(PAIRS, 10, 'task')
  return streams.with_allowed(tasks, known)


def open_bench(config: Config) -> Bench:
  """Loads digits in the shape of the scenario."""
  module = Mlp(config.sizes, 2 if config.scenario == 'domain' else 10)
  forward = models.forward(module, models.IMAGE)
  splits = digits.load()
  return Bench(
    config,
    module,
    continual.masked_forward(forward) if config.scenario == 'task' else forward,
    tasks_of(splits['train'], config.scenario),
    tasks_of(splits['test'], config.scenario),
  )


def accuracies(bench: Bench, params: dict) -> list[float]:
  """Test accuracy on each task."""
  out = []
  for task in bench.test:
    batches = data.eval_batches(task.columns, 80)
    out.append(evaluate.accuracy_of(bench.forward, params, {}, batches))
  return out


def final(bench: Bench, context: Context, method: str, seed: int) -> dict:
  """One stream with one seed."""
  config, recipe = bench.config, bench.recipe

  def run():
    setting = methods.Setting(
      config.rate, config.strength if method == 'ewc' else 0.0
    )
    rows = recipe.row(bench.train[0].columns)
    learner = methods.learner(recipe, method, setting, rows)
    key = jax.random.key(config.seed.init + seed)
    batch = data.take(bench.train[0].columns, slice(1))
    params, _ = models.init(bench.module, key, batch, models.IMAGE)
    fitted = train.fit(
      learner,
      learner.init(params, key),
      methods.stages(recipe, method, bench.train, config.seed.data + seed),
      jax.random.key(config.seed.train + seed),
      forward=bench.forward,
      after_stage=lambda params, state, stage: accuracies(bench, params),
      steps_per_dispatch=min(50, config.steps_per_task),
      log_every=10,
      quiet=True,
      **placement(context),
    )
    replayed = recipe.replayed if method == 'replay' else 0
    spent = metrics.cost_of(
      fitted, config.batch_size + replayed, fmeta.tree.size(params)
    )
    return {
      'matrix': fitted.matrix,
      'tasks': list(PAIRS),
      'cost': dataclasses.asdict(spent),
      'product': methods.divergence_product(recipe, setting, fitted),
      'steps': fitted.steps,
      'trainable': fmeta.tree.size(fitted.state.trainable),
      'examples_per_second': fitted.examples_per_second,
      'flops_per_step': fitted.flops_per_step,
    }

  return trial(context, f'{method}/seed_{seed}', run)


def row_of(method: str, runs: list[dict[str, Any]]) -> tuple[Row, dict, dict]:
  """The table's row, its numbers and their intervals."""
  average, half = metrics.mean_ci95([np.mean(r['matrix'][-1]) for r in runs])
  numbers = {method: average}
  more = {}
  if method != 'joint':
    kept = methods.summary([run['matrix'] for run in runs])
    numbers |= {f'{method} {name}': value for name, value in kept.items()}
    more['forgetting'] = kept['forgetting (Chaudhry)']
  if method == 'ewc':
    product = max(run['product'] for run in runs)
    numbers['ewc rate * strength * max F'] = product
  ci95 = {method: (average - half, average + half)}
  row = Row(
    method,
    average,
    ci95[method],
    trainable=runs[0]['trainable'],
    seconds=float(np.mean([run['seconds'] for run in runs])),
    ceiling=method == 'joint',
    more=more,
  )
  return row, numbers, ci95


def run(config: Config, context: Context) -> dict:
  """All rows and seeds, a table and a picture."""
  require(config, LEAST, ('rate',))
  methods.check(config.methods)
  bench = open_bench(config)
  rows, numbers, ci95, matrices, last = [], {}, {}, {}, {}
  for method in config.methods:
    runs = [final(bench, context, method, seed) for seed in range(config.seeds)]
    row, values, ends = row_of(method, runs)
    rows.append(row)
    numbers, ci95, last = numbers | values, ci95 | ends, runs[0]
    if method != 'joint':
      matrices[method] = np.mean([r['matrix'] for r in runs], axis=0)
  shown = Panel(
    'Split digits',
    f'How much is forgotten when the {config.scenario} scenario is asked?',
    rows,
    f'mean over {config.seeds} seeds, 1.96 std / sqrt(seeds)',
    stream(rows, matrices, tuple(PAIRS)),
    metric='average accuracy',
  )
  print(terminal_table(shown))
  if shown.figure:
    (context.workdir / 'split_digits.png').write_bytes(shown.figure.png)
  columns = streams.joint(bench.train + bench.test).columns
  costs = ('steps', 'examples_per_second', 'flops_per_step')
  return {
    'metrics': numbers,
    'ci95': ci95,
    **{key: last[key] for key in costs},
    'trainable_parameters': last['trainable'],
    'total_parameters': last['trainable'],
    'data_sha256': data.fingerprint(
      {key: columns[key] for key in ('image', 'label')}
    ),
  }
