"""The rows of the fine-tuning panel: one tuning each, the same step."""

import dataclasses
from typing import Any

import jax
import numpy as np
import optax

import fmeta
from experiments import minilm
from experiments.common import placement, trial
from experiments.finetune import saved
from fmeta import (
  baselines,
  data,
  evaluate,
  metrics,
  models,
  optim,
  table,
  train,
  tree,
)
from fmeta.datasets import docparams
from fmeta.workdir import Context


@dataclasses.dataclass
class Bench:
  """The encoded splits and the model, loaded once for all methods."""

  config: Any
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


def open_bench(config: Any, context: Context) -> Bench:
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
        saved.save(self.bench, self.multipliers, rate, seed, fitted)
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
