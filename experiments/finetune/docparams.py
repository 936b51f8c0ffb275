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

import jax
import numpy as np
import optax

import fmeta
from experiments import minilm
from experiments.common import Seeds, best_setting, placement, trial
from fmeta import (
  baselines,
  data,
  evaluate,
  metrics,
  models,
  optim,
  predict,
  pretrained,
  table,
  train,
  tree,
)
from fmeta.datasets import docparams
from fmeta.pretrained import MINILM
from fmeta.report import Panel, Row, bars, terminal_table
from fmeta.workdir import Context

REFERENCE = 'TF-IDF + linear SVM'


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


@dataclasses.dataclass
class Bench:
  """The encoded splits and the model, loaded once for all methods."""

  config: Config
  context: Context
  splits: dict[str, dict[str, np.ndarray]]
  module: models.BertClassifier
  params: dict
  forward: fmeta.Forward
  num_layers: int
  # layer -> split -> columns with the cached states that enter it
  after: dict[int, dict[str, dict[str, np.ndarray]]]

  @property
  def groups(self) -> np.ndarray:
    """Source file of each test text, the unit of resampling."""
    return self.splits['test']['file']


def open_bench(config: Config, context: Context) -> Bench:
  """Loads texts and model."""
  module, params, tokenizer = minilm.load_model(
    config.model, len(docparams.LABELS), config.seed.init
  )
  splits = minilm.load_texts(
    {
      'train': config.train_examples,
      'validation': config.validation_examples,
      'test': config.test_examples,
    }
  )
  for columns in splits.values():
    data.check_labels(columns['label'], len(docparams.LABELS))
  encoded = {
    name: minilm.encode(tokenizer, columns, config.max_length)
    for name, columns in splits.items()
  }
  last = module.config.num_layers
  layers = (last - config.surgical_blocks, last)
  cached = {
    name: minilm.with_prefixes(module, params, columns, layers)
    for name, columns in encoded.items()
  }
  return Bench(
    config,
    context,
    encoded,
    module,
    params,
    models.forward(module),
    last,
    {layer: {n: c[layer] for n, c in cached.items()} for layer in layers},
  )


def tuning_of(bench: Bench, method: str) -> tuple[fmeta.Tuning, int]:
  """What moves, and the layer below which everything is frozen."""
  last = bench.num_layers
  first = last - bench.config.surgical_blocks
  if method == 'probe':
    return fmeta.select('head/.*'), last
  if method == 'surgical':
    blocks = '|'.join(map(str, range(first, last)))
    return fmeta.select(f'body/layer_({blocks})/.*', 'head/.*'), first
  if method == 'lora':
    return (
      fmeta.lora(
        r'body/layer_\d+/.*kernel',
        rank=bench.config.lora_rank,
        also=('head/.*',),
      ),
      0,
    )
  if method == 'full':
    return fmeta.full(), 0
  raise fmeta.UsageError(
    f'no method {method!r}; possible: probe, surgical, lora, full'
  )


class Method:
  """One row: a tuning, its cached inputs and its compiled programs."""

  def __init__(self, bench: Bench, name: str):
    self.bench, self.name = bench, name
    self.tuning, self.first_layer = tuning_of(bench, name)
    self.rates = getattr(bench.config, f'rates_{name}')
    self.columns = bench.splits
    self.forward = bench.forward
    if self.first_layer:
      self.forward = minilm.from_layer(bench.module, self.first_layer)
      self.columns = bench.after[self.first_layer]
    self.validation = minilm.eval_batches(
      minilm.by_length(self.columns['validation'])
    )
    self.multipliers = (
      ('head/.*', bench.config.head_multiplier),
      ('.*', 1.0),
    )
    # Rate and length live in the state: one compiled step for all trials.
    self.program = train.Program(
      fmeta.finetune(
        fmeta.supervised(self.forward, fmeta.softmax_cross_entropy),
        optax.inject_hyperparams(self._optimizer)(rate=0.0, num_steps=1.0),
        tuning=self.tuning,
      )
    )

  def _optimizer(self, rate, num_steps):
    return optim.adamw(
      optim.warmup_linear(rate, num_steps), multipliers=self.multipliers
    )

  def fit(self, rate: float, examples: int, epochs: int, seed: int, **options):
    """Trains once and keeps the epoch that is best on validation."""
    config = self.bench.config
    batches = minilm.train_batches(
      data.take(self.columns['train'], slice(0, examples)),
      config.batch_size,
      config.seed.data + seed,
    )
    steps = batches.steps_per_epoch * epochs
    _, params, _ = minilm.load_model(
      config.model, len(docparams.LABELS), config.seed.init + seed
    )
    learner = self.program.learner
    state = learner.init(params, jax.random.key(config.seed.init + seed))
    return train.fit(
      learner,
      optim.set_hyper(state, rate=rate, num_steps=steps),
      [train.Stage(self.name, batches, steps)],
      jax.random.key(config.seed.train + seed),
      evaluate=self.measure,
      evaluate_every=batches.steps_per_epoch,
      restore_best=True,
      log_every=10,
      program=self.program,
      **placement(self.bench.context),
      **options,
    )

  def measure(self, params, model_state) -> dict[str, float]:
    """Validation accuracy."""
    accuracy = evaluate.accuracy_of(
      self.forward, params, model_state, self.validation
    )
    return {'accuracy': accuracy}

  def search(self) -> dict[str, float]:
    """Validation accuracy of each rate after one short epoch."""
    tried = {}
    for rate in self.rates:
      name = f'finetune/{self.name}/rate_{rate:g}'

      def run(rate=rate):
        fitted = self.fit(
          rate, self.bench.config.search_examples, 1, 0, quiet=True
        )
        return {'value': fitted.evaluations[-1]['evaluation']['accuracy']}

      tried[f'{rate:g}'] = trial(self.bench.context, name, run)['value']
    return tried

  def final(self, rate: float, seed: int, keep: bool) -> dict:
    """One full run: test correctness, the epoch kept, its cost."""
    config, context = self.bench.config, self.bench.context

    def run():
      options = {}
      if seed == 0:
        options = {
          'workdir': context.workdir / 'fit' / f'finetune_{self.name}',
          'resume': context.resume,
          'keep': 1,
        }
      fitted = self.fit(
        rate, config.train_examples, config.epochs, seed, **options
      )
      if keep:
        save_model(self.bench, fitted.params)
      predictions = evaluate.evaluate(
        self.forward,
        fitted.params,
        {},
        minilm.eval_batches(self.columns['test']),
      )
      epoch = fitted.best_step // (fitted.steps // config.epochs)
      return {
        'correct': predictions.correct.tolist(),
        'predicted': predictions.classes.tolist(),
        'calibration_error': metrics.expected_calibration_error(
          predictions.probabilities, predictions.labels
        ),
        'epoch': int(epoch),
        'steps': fitted.steps,
        'trainable': tree.size(fitted.state.trainable),
        'examples_per_second': fitted.examples_per_second,
        'flops_per_step': fitted.flops_per_step,
        'peak_bytes': fitted.peak_bytes,
      }

    return trial(context, f'finetune/{self.name}/seed_{seed}', run)

  def table(self) -> str:
    """What moves, how fast, by which pattern."""
    return table.parameter_table(
      self.bench.params,
      self.tuning,
      jax.random.key(0),
      rates=self.multipliers,
    )


def save_model(bench: Bench, params: dict) -> None:
  """Writes `model/`, what `fmeta.predict` reads."""
  predict.save_run(
    bench.context.workdir,
    bench.module,
    params,
    pretrained.find(bench.config.model),
    docparams.LABELS,
    bench.config.max_length,
  )


def baseline_rows(bench: Bench) -> dict[str, tuple[np.ndarray, str]]:
  """Name -> (test correctness [N], setting)."""
  config, splits = bench.config, bench.splits
  labels = splits['test']['label']
  grid = len(config.rates_full) * config.epochs
  most = baselines.majority(splits['train']['label'], len(labels))
  vectors = {
    name: minilm.embeddings(bench.after[bench.num_layers][name])
    for name in ('train', 'test')
  }
  mean = baselines.nearest_mean(
    baselines.nearest_mean_cosine,
    vectors['train'],
    splits['train']['label'],
    vectors['test'],
    len(docparams.LABELS),
  )
  texts = [
    (list(splits[name]['text']), splits[name]['label'])
    for name in ('train', 'validation')
  ]
  svm = baselines.tfidf_svm(
    *texts,
    list(splits['test']['text']),
    strengths=tuple(np.geomspace(0.02, 5.0, grid).round(3).tolist()),
  )
  return {
    'majority class': (most.correct(labels), ''),
    'nearest class mean': (mean.correct(labels), 'cosine, frozen'),
    'TF-IDF + linear SVM': (svm.correct(labels), f'{svm.setting}, grid {grid}'),
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
    out[name] = f'rate {rate}, epoch {epochs} of {config.epochs}', runs
  return out


class Scores:
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


def row_of(scores: Scores, name: str, setting: str, runs: list[dict]) -> Row:
  """A line of the table; baselines have no runs."""
  interval = scores.accuracy(name)
  difference = scores.difference(name, REFERENCE)
  cost = {}
  if runs:
    scores.difference(name, 'probe')
    cost = {
      'trainable': runs[0]['trainable'],
      'seconds': float(np.mean([run['seconds'] for run in runs])),
      'more': {'macro F1': scores.macro_f1(name, runs)},
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
  scores = Scores(bench, correct)
  rows = [
    row_of(scores, n, setting, []) for n, (_, setting) in baseline.items()
  ]
  rows += [
    row_of(scores, n, *setting_runs) for n, setting_runs in trained.items()
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
  last = trained[config.methods[-1]][1][0]
  cost = ('steps', 'examples_per_second', 'flops_per_step', 'peak_bytes')
  outcome = {
    'metrics': scores.metrics,
    'ci95': scores.ci95,
    **{key: last[key] for key in cost},
    'trainable_parameters': last['trainable'],
    'total_parameters': total,
    'data_sha256': data_sha256(bench),
  }
  return shown, outcome


def run(config: Config, context: Context) -> dict:
  """Prints the table and writes the picture."""
  shown, outcome = panel(config, context)
  print(terminal_table(shown))
  (context.workdir / 'panel_a.png').write_bytes(shown.figure.png)
  return outcome
