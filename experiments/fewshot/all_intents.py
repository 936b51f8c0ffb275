"""All intents at once from 5 or 10 texts of each, on MiniLM.

  python -m experiments.run --config=experiments/fewshot/all_intents.py \\
    --data_dir=DIR --config.dataset=banking77 --config.shots=5

One task of 77 (CLINC150: 150) ways: trained on the published file of 5 or 10
texts an intent (Few-Shot-Intent-Detection), tested on the whole test set. `DIR`
has `banking77/` and `clinc150/`, both with `few_shot/`.

Rows are those of `intents` and a linear probe. MAML, LoRA-MAML, Reptile and
ProtoNet learn from 5-way episodes of the *other* data set's training texts
(some of CLINC150's intents are about banks and cards too). ProtoNet then takes
the file's prototypes, the others descend on the whole file. Inner rates, steps
and ProtoNet's rates are chosen inside the file: one text of each intent is held
out, `validation_folds` times. Intervals and differences are over test texts.

Published: fine-tuned RoBERTa-base 74.0 / 84.3 on BANKING77, 88.0 / 91.6 on
CLINC150; CPFT 80.9 / 87.2, 92.3 / 94.2 (Zhang et al. 2021,
https://arxiv.org/abs/2109.06349). By torch on frozen MiniLM: nearest mean .784
/ .815 and .859 / .875, logistic regression .807 / .858 and .874 / .901.
Measured: experiments/README.md.
"""

import dataclasses
import math
import os
import time
from typing import Any

import numpy as np

import fmeta
from experiments.fewshot import intent_table, text_table, text_task
from experiments.fewshot.intent_methods import (
  DATASETS,
  SMALL_ROWS,
  Methods,
  Settings,
  check_settings,
  run_row,
)
from fmeta import controls, data, episodes
from fmeta.datasets import base
from fmeta.datasets.intents import SHOTS
from fmeta.workdir import Context

OTHER = {'banking77': 'clinc150', 'clinc150': 'banking77'}
_SHUFFLE = 1004


@dataclasses.dataclass
class Config(Settings):
  """Those of all rows and what is ours."""

  methods: tuple[str, ...] = (
    'linear probe',
    'fine-tuning',
    'LN-tuning',
    'LoRA',
    'ProtoNet',
    'MAML',
    'LoRA-MAML',
    'Reptile',
  )
  shots: int = 5
  rate_factors: tuple[float, ...] = (0.3, 1.0, 3.0)
  test_steps: tuple[int, ...] = (5, 20, 50)
  validation_folds: int = 2


SMALL = {
  **SMALL_ROWS,
  'validation_folds': 1,
  'methods': ('linear probe', 'ProtoNet', 'LoRA-MAML'),
}


class Bench(text_task.Bench):
  """The file as one task; meta-training on another data set's intents.

  Args:
    config: ours.
    context: of the run.
    parts: 'meta', 'train' and 'test' -> `text` and `name`.
  """

  def __init__(
    self, config: Config, context: Context, parts: dict[str, data.Columns]
  ):
    texts = {
      key: np.concatenate([columns[key] for columns in parts.values()])
      for key in ('text', 'name')
    }
    names = {part: sorted(set(parts[part]['name'])) for part in parts}
    super().__init__(config, context, texts, {'train': names['meta']})
    ends = np.cumsum([len(columns['name']) for columns in parts.values()])
    spans = np.split(np.arange(ends[-1]), ends[:-1])
    self.rows = dict(zip(parts, spans, strict=True))
    self.label_of = {name: k for k, name in enumerate(names['train'])}
    self.names = self.columns['name']

  @property
  def test_texts(self) -> data.Columns:
    """The test set; whatever was trained on, a run is paired by it."""
    return data.take(self.texts, self.rows['test'])

  @property
  def test_ways(self) -> int:
    """All intents of the file."""
    return len(self.label_of)

  def for_test(self, params: Any) -> Any:
    """A zero head of `test_ways`, at a rate in proportion.

    The loss is a mean over texts, so the gradient for one intent's weights
    falls as intents are added.
    """
    wide = {
      name: np.zeros((*leaf.shape[:-1], self.test_ways), leaf.dtype)
      for name, leaf in params['model']['head'].items()
    }
    more = math.log(self.test_ways / self.config.ways)
    hyper = params['hyper']
    head = {name: rate + more for name, rate in hyper['head'].items()}
    return {
      **params,
      'model': {**params['model'], 'head': wide},
      'hyper': {**hyper, 'head': head},
    }

  def scored(self, right: np.ndarray) -> np.ndarray:
    """Every test text counts by itself."""
    return np.moveaxis(right, -1, 1).reshape(-1, right.shape[1])

  def held_out(self, split: str) -> list[episodes.Episode]:
    """The file with its test set, or with texts held out of the file."""
    file = self.rows['train']
    if split == 'test':
      return [self._task(file, self.rows['test'])]
    # Which text of its intent a row is: 0, 1, ...
    order = np.zeros(len(file), int)
    for name in self.label_of:
      mine = self.names[file] == name
      order[mine] = np.arange(mine.sum())
    return [
      self._task(file[order != fold], file[order == fold])
      for fold in range(self.config.validation_folds)
    ]

  def controls(self) -> list[episodes.Episode]:
    """The whole task with shuffled labels."""
    return [
      controls.shuffle_support_labels(task, _SHUFFLE)
      for task in self.held_out('test')
    ]

  def _task(self, support: np.ndarray, query: np.ndarray) -> episodes.Episode:
    """An episode of one task."""

    def part(rows):
      columns = {
        key: self.columns[key][rows][None]
        for key in ('hidden', 'attention_mask')
      }
      labels = [self.label_of[name] for name in self.names[rows]]
      return {**columns, 'label': np.array([labels], np.int32)}

    return {'support': part(support), 'query': part(query)}


def check(config: Config) -> None:
  """Refuses what cannot run, before anything is loaded."""
  check_settings(config)
  if 'Proto-MAML' in config.methods:
    raise fmeta.UsageError(
      'Proto-MAML starts from a head of as many ways as it was trained with; '
      'it has no row here'
    )
  if config.shots not in SHOTS:
    raise fmeta.UsageError(
      f'{config.shots} shots; there are files for 5 and 10'
    )
  if not 1 <= config.validation_folds <= config.shots:
    raise fmeta.UsageError(
      f'{config.validation_folds} validation folds of {config.shots} texts an '
      f'intent; give 1 to {config.shots}'
    )


def load(config: Config, context: Context) -> dict[str, data.Columns]:
  """What `Bench` takes."""
  folder = context.data_dir or os.environ.get('FMETA_SHARED_DATA')
  other = OTHER[config.dataset]
  module = DATASETS[config.dataset]
  splits = module.load(folder)
  file = module.few_shot(splits, config.shots, folder)
  meta = DATASETS[other].load(folder)['train']

  def named(columns: base.Columns, dataset: str) -> data.Columns:
    names = [f'{dataset}: {name}' for name in columns['intent']]
    return {'text': columns['text'], 'name': np.array(names, object)}

  return {
    'meta': named(meta, other),
    'train': named(file, config.dataset),
    'test': named(splits['test'], config.dataset),
  }


def run(config: Config, context: Context) -> dict:
  """Runs every row, prints the table and writes the page."""
  began = time.perf_counter()
  check(config)
  bench = Bench(config, context, load(config, context))
  methods = Methods(bench)
  name = f'{config.dataset}_all_{config.shots}shot'
  results = {
    row: run_row(methods, bench, row, name)
    for row in (text_table.REFERENCE, *config.methods)
  }
  title = f'{config.dataset}, all intents, {config.shots} texts of each'
  return intent_table.present(
    bench,
    results,
    name=name,
    title=title,
    note=note_of(config, bench),
    tested_on=f'all of the test set, {config.max_length} tokens',
    began=began,
  )


def note_of(config: Config, bench: Bench) -> str:
  """The protocol in words."""
  grid = len(config.rate_factors) * len(config.test_steps)
  return (
    f'{bench.test_ways} intents, {len(bench.rows["train"])} texts to adapt to, '
    f'{len(bench.rows["test"])} to test on. MAML, LoRA-MAML, Reptile and '
    f'ProtoNet were trained on {config.ways}-way episodes of '
    f'{OTHER[config.dataset]} ({config.iterations} iterations of '
    f'{config.meta_batch}). Intervals are 1.96 standard errors over test '
    'texts; differences are paired by text. Every row chose among '
    f'{grid} settings on {config.validation_folds} text(s) of each intent, '
    'held out of the file one by one. Shuffled support labels: '
    f'{100 / bench.test_ways:.1f} % expected.'
  )
