"""How well does one model fine-tune? Four tunings and three baselines.

  python -m experiments.run --config=experiments/finetune/docparams.py

all-MiniLM-L6-v2 infers a parameter's declared type (ten classes) from its
description: linear probe, surgical (the last two blocks), LoRA and full
fine-tuning, all the same step, beside the majority class, nearest class mean
and TF-IDF with a linear SVM. 4,000 training texts, 800 for every choice, 2,000
for the numbers, split by source file; intervals resample test files.

Every trained row tries the same number of rates for one epoch on the first
`search_examples` texts, then trains with the best for up to `epochs`, keeping
the epoch that is best on validation; the SVM tries rates x epochs values of
C. Expected and measured: experiments/README.md.
"""

import dataclasses

import numpy as np

from experiments.common import Seeds, best_setting
from experiments.finetune.methods import (
  Bench,
  Method,
  baseline_rows,
  open_bench,
)
from fmeta import data, metrics, tree
from fmeta.datasets import docparams
from fmeta.pretrained import MINILM
from fmeta.report import Panel, Row, bars, terminal_table
from fmeta.scores import Scores
from fmeta.workdir import Context

REFERENCE = 'TF-IDF + linear SVM'
TITLES = {'lora': 'LoRA'}  # where a method's title is not its name


@dataclasses.dataclass
class Config:
  """What one would sweep."""

  seed: Seeds = dataclasses.field(default_factory=Seeds)
  seeds: int = 1
  model: str = MINILM
  methods: tuple[str, ...] = ('probe', 'surgical', 'lora', 'full')
  epochs: int = 2
  batch_size: int = 32
  max_length: int = 32
  surgical_blocks: int = 2
  lora_rank: int = 8
  # The fresh head moves faster than what it stands on (untuned).
  head_multiplier: float = 10.0
  rates_probe: tuple[float, ...] = (1e-3, 3e-3, 1e-2)
  rates_surgical: tuple[float, ...] = (1e-4, 2e-4, 4e-4)
  rates_lora: tuple[float, ...] = (5e-4, 1e-3, 2e-3)
  rates_full: tuple[float, ...] = (5e-5, 1e-4, 2e-4)
  search_examples: int = 800
  train_examples: int = 4000
  validation_examples: int = 800
  test_examples: int = 2000


SMALL = {
  'methods': ('probe', 'lora'),
  'epochs': 1,
  'rates_probe': (1e-3,),
  'rates_lora': (1e-3,),
  'search_examples': 64,
  'train_examples': 96,
  'validation_examples': 64,
  'test_examples': 64,
}


def trained_rows(bench: Bench) -> dict[str, tuple[str, list[dict]]]:
  """Name -> (setting, one result per seed), printed as they come."""
  config, out = bench.config, {}
  for name in config.methods:
    method = Method(bench, name)
    print(f'\n{name}\n{method.table()}', flush=True)
    tried = method.search()
    rate = best_setting(tried)
    print(f'{name}: validation accuracy by rate {tried}', flush=True)
    runs = [
      method.final(float(rate), seed, keep=name == 'full' and seed == 0)
      for seed in range(config.seeds)
    ]
    epochs = '/'.join(str(run['epoch']) for run in runs)
    out[TITLES.get(name, name)] = (
      f'rate {rate}, epoch {epochs} of {config.epochs}',
      runs,
    )
  return out


class Numbers:
  """Intervals over test files, kept by name for `result.json`."""

  def __init__(self, bench: Bench, correct: dict[str, np.ndarray]):
    self.groups, self.correct = bench.groups, correct
    self.labels = bench.splits['test']['label']
    self.metrics, self.ci95 = {}, {}

  def _keep(self, name: str, interval: metrics.Interval):
    self.metrics[f'finetune/{name}'] = interval.mean
    self.ci95[f'finetune/{name}'] = interval.ci95
    return interval

  def accuracy(self, name: str) -> metrics.Interval:
    """Seed-averaged accuracy of a row."""
    interval = metrics.bootstrap_ci(self.correct[name], self.groups)
    return self._keep(name, interval)

  def difference(self, name: str, other: str) -> metrics.Interval | None:
    """Paired difference of two rows; None if one of them is absent."""
    if name == other or other not in self.correct:
      return None
    interval = metrics.paired_bootstrap(
      self.correct[name], self.correct[other], self.groups
    )
    return self._keep(f'{name} minus {other}', interval)

  def macro_f1(self, name: str, runs: list[dict]) -> float:
    """Mean over seeds; also keeps the calibration error."""
    size = len(docparams.LABELS)
    value = np.mean(
      [metrics.macro_f1(run['predicted'], self.labels, size) for run in runs]
    )
    error = np.mean([run['calibration_error'] for run in runs])
    self.metrics[f'finetune/{name} macro F1'] = float(value)
    self.metrics[f'finetune/{name} calibration error'] = float(error)
    return float(value)


def row_of(kept: Numbers, name: str, setting: str, runs: list[dict]) -> Row:
  """A line of the table; baselines have no runs."""
  interval = kept.accuracy(name)
  difference = kept.difference(name, REFERENCE)
  cost = {}
  if runs:
    kept.difference(name, 'probe')
    cost = {
      'trainable': runs[0]['trainable'],
      'seconds': float(np.mean([run['seconds'] for run in runs])),
      'more': {'macro F1': kept.macro_f1(name, runs)},
    }
  return Row(
    name,
    interval.mean,
    interval.ci95,
    setting=setting,
    baseline=not runs,
    difference=difference and tuple(difference),
    **cost,
  )


def note(config: Config, groups: np.ndarray) -> str:
  """The protocol in a paragraph."""
  return (
    f'{config.train_examples:,} training texts, {config.test_examples:,} test '
    f'texts from {len(np.unique(groups))} files, split by file; accuracy is '
    f'the mean of {config.seeds} seed(s), its interval and the paired '
    'differences resample test files. Every trained row tried '
    f'{len(config.rates_full)} rates x {config.epochs} epochs on '
    f'{config.validation_examples} validation texts, the SVM as many values '
    'of C. Frozen blocks run once per text; there is no dropout.'
  )


def data_sha256(bench: Bench) -> str:
  """sha256 of the example stream: text, label and file, split by split."""
  return data.fingerprint(
    {
      key: np.concatenate([bench.splits[s][key] for s in bench.splits])
      for key in ('text', 'label', 'file')
    }
  )


def panel(config: Config, context: Context) -> tuple[Panel, dict]:
  """Trains every method and returns the panel and its numbers."""
  bench = open_bench(config, context)
  baseline, trained = baseline_rows(bench), trained_rows(bench)
  correct = {name: right[None] for name, (right, _) in baseline.items()}
  for name, (_, runs) in trained.items():
    correct[name] = np.array([run['correct'] for run in runs])
  kept = Numbers(bench, correct)
  rows = [row_of(kept, n, setting, []) for n, (_, setting) in baseline.items()]
  rows += [
    row_of(kept, n, *setting_runs) for n, setting_runs in trained.items()
  ]
  total = tree.size(bench.params)
  shown = Panel(
    'Fine-tuning',
    'How well does the model fine-tune?',
    rows,
    note(config, bench.groups),
    bars(rows, total=total),
    reference=REFERENCE,
    total=total,
  )
  tested_on = data.fingerprint(bench.splits['test'])
  last = list(trained.values())[-1][1][0]
  cost = ('steps', 'examples_per_second', 'flops_per_step', 'peak_bytes')
  outcome = {
    'metrics': kept.metrics,
    'ci95': kept.ci95,
    **{key: last[key] for key in cost},
    'trainable_parameters': last['trainable'],
    'total_parameters': total,
    'data_sha256': data_sha256(bench),
    'scores': {
      f'finetune/{name}': Scores(right, tested_on, bench.groups)
      for name, right in correct.items()
    },
  }
  return shown, outcome


def run(config: Config, context: Context) -> dict:
  """Prints the table and writes the picture."""
  shown, outcome = panel(config, context)
  print(terminal_table(shown))
  (context.workdir / 'panel_a.png').write_bytes(shown.figure.png)
  return outcome
