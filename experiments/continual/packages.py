"""The stream of packages: cached states, splits and what is measured.

The texts of docparams, package by package, encoded once and run through the
frozen layers once; and the recipe that all rows of the table share.
"""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

import fmeta
from experiments import minilm
from experiments.common import require
from experiments.continual import methods
from fmeta import baselines, data, evaluate, text
from fmeta import stream as streams
from fmeta.datasets import docparams
from fmeta.models import BertClassifier, forward

CLASSES = len(docparams.LABELS)
# The smallest values that mean something.
LEAST = dict.fromkeys(
  (
    'seeds',
    'blocks',
    'epochs',
    'batch_size',
    'max_length',
    'memory_size',
    'fisher_examples',
    'train_examples',
    'search_examples',
    'validation_examples',
    'matrix_examples',
  ),
  1,
) | {'strengths_ewc': 0}


def check(config: Any) -> None:
  """Raises `UsageError` for what does not exist, before anything is loaded."""
  rates = (f'rates_{name}' for name in methods.NAMES)
  require(config, LEAST, (*rates, 'head_multiplier'))
  methods.check(config.methods)


def first_of_each(
  columns: data.Columns, packages: Sequence[str], count: int | None
) -> dict[str, np.ndarray]:
  """The first `count` rows of every package, package by package."""
  tasks = streams.by_column(columns, 'package', packages)
  return streams.joint(
    [streams.Task(t.name, data.take(t.columns, slice(count))) for t in tasks]
  ).columns


def full_width(max_length: int) -> data.Collate:
  """One shape for all batches, so that a memory can hold their rows."""
  widen = text.bucket_collate((max_length,))

  def collate(batch):
    batch = widen(batch)
    return {k: batch[k] for k in (*minilm.HIDDEN, 'label')}

  return collate


@functools.lru_cache(maxsize=1)
def initial_params(model: str, seed: int) -> dict:
  """The published body under a head drawn from `seed`."""
  return minilm.load_model(model, CLASSES, seed)[1]


class Bench:
  """The stream as cached states, and the compiled evaluation."""

  def __init__(self, config: Any):
    self.config = config
    seed = config.seed.init
    self.module, params, tokenizer = minilm.load_model(
      config.model, CLASSES, seed
    )
    self.first = self.module.config.num_layers - config.blocks
    counts = {
      'train': config.train_examples,
      'validation': config.validation_examples,
      'test': config.test_examples,
    }
    splits = minilm.load_texts({})
    for name, count in counts.items():
      columns = first_of_each(splits[name], config.packages, count)
      data.check_labels(columns['label'], CLASSES)
      columns = minilm.encode(tokenizer, columns, config.max_length)
      splits[name] = minilm.with_prefix(
        self.module, params, columns, self.first
      )
    self.train, self.parameters = splits['train'], params
    self.fingerprint = data.fingerprint(
      {
        key: np.concatenate([splits[s][key] for s in counts])
        for key in ('text', 'label', 'file')
      }
    )
    self.validation = minilm.by_length(splits['validation'])
    self.test = minilm.by_length(splits['test'])
    self.measured = first_of_each(
      splits['test'], config.packages, config.matrix_examples
    )
    self.forward = minilm.from_layer(self.module, self.first)
    self.recipe = self._recipe()
    self.rows = self.recipe.row(self.train)

  def _recipe(self) -> methods.Recipe:
    config = self.config
    blocks = '|'.join(str(self.first + i) for i in range(config.blocks))
    return methods.Recipe(
      loss=fmeta.supervised(self.forward, fmeta.softmax_cross_entropy),
      tuning=fmeta.select(f'body/layer_({blocks})/.*', 'head/.*'),
      importance=methods.SAMPLED,
      batch_size=config.batch_size,
      steps_per_task=lambda examples: (
        config.epochs * -(-examples // config.batch_size)
      ),
      memory_size=config.memory_size,
      replayed=config.batch_size,
      fisher_examples=config.fisher_examples,
      multipliers=(('head/.*', config.head_multiplier), ('.*', 1.0)),
      collate=full_width(config.max_length),
    )

  def tasks(self, count: int | None = None) -> list[streams.Task]:
    """The stream, its packages cut to `count` texts."""
    packages = self.config.packages
    columns = first_of_each(self.train, packages, count)
    return streams.by_column(columns, 'package', packages)

  def predict(self, params: dict, columns: data.Columns):
    """Answers to texts with cached states."""
    batches = minilm.eval_batches(columns)
    return evaluate.evaluate(self.forward, params, {}, batches)

  def accuracies(self, params: dict, seen: int) -> list[float]:
    """Test accuracy on each of the first `seen` packages."""
    packages = self.config.packages[:seen]
    columns = minilm.by_length(first_of_each(self.measured, packages, None))
    correct = self.predict(params, columns).correct
    return [
      float(correct[columns['package'] == name].mean()) for name in packages
    ]

  def nearest_mean(self) -> np.ndarray:
    """Test correctness of nearest class means, all packages seen."""
    bare = BertClassifier(self.module.config, None, self.module.pooling)
    embed = forward(
      bare, minilm.HIDDEN, method='resume', first_layer=self.first
    )
    params = {'body': self.parameters['body']}
    vectors = [
      evaluate.evaluate(embed, params, {}, minilm.eval_batches(columns)).logits
      for columns in (self.train, self.test)
    ]
    mean = baselines.nearest_mean(
      baselines.nearest_mean_cosine,
      vectors[0],
      self.train['label'],
      vectors[1],
      CLASSES,
    )
    return mean.correct(self.test['label'])


def protocol(bench: Bench) -> str:
  """What was done, in words, for the note under the table."""
  config, tasks = bench.config, bench.tasks()
  fewest = min(len(task.columns['label']) for task in tasks)
  row = fmeta.tree.num_bytes(bench.rows)
  texts, files = len(bench.test['label']), len(set(bench.test['file']))
  return (
    f'Packages in the order {", ".join(config.packages)}, '
    f'{fewest} to {config.train_examples} training texts each, '
    f'{config.epochs} epoch(s); '
    f'accuracy over all {texts:,} test texts after the last package, its '
    'interval and the paired differences resample the '
    f'{files} test files; "average" is the mean over packages and '
    '"forgetting" the mean drop from the best earlier accuracy (Chaudhry et '
    f'al. 2018), both on at most {config.matrix_examples} test texts per '
    'package. Every trained row tried '
    f'{len(config.rates_naive)} settings on a stream of '
    f'{config.search_examples} texts per package, judged on validation texts '
    'of all packages. EWC: Fisher with sampled labels over '
    f'{config.fisher_examples} texts per package. Replay: a reservoir of '
    f'{config.memory_size} texts, {config.memory_size * row / 1e6:.1f} MB as '
    f'cached states, {config.batch_size} of them in each step. '
    f'The last {config.blocks} block(s) and the head move.'
  )
