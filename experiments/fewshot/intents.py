"""Intents from a few examples: who beats nearest mean on MiniLM?

  python -m experiments.run --config=experiments/fewshot/intents.py \\
    --data_dir=DIR --config.dataset=banking77 --config.folds=1 \\
    --config.shots=1 --config.test_episodes=200

Protocol of ProtAugment (Dopierre et al. 2021,
https://arxiv.org/abs/2105.12995): five folds of disjoint train,
validation and test intents of BANKING77 or CLINC150, episodes of 5 ways, 1 or
5 shots and 5 queries, 600 test episodes a fold. `DIR` has `banking77/` or
`clinc150/` with their `episodic/01` to `05`.

All but the last block of MiniLM is frozen and run once per text; a linear head
reads unit-length embeddings. It is zero (Proto-MAML: the prototypes) at the
start of every episode, for intents come in random order. Rows:

  nearest class mean  frozen, by cosine; no setting
  fine-tuning         the inner loop moves the last block and the head
  LN-tuning           its norms and the head
  LoRA                factors on its kernels and the head
  ProtoNet            the block is trained on episodes of the train intents
  MAML                fine-tuning, from where second-order MAML starts it
  Proto-MAML          that with a head that begins as the prototypes
  LoRA-MAML           LoRA, from factors that MAML has learned
  Reptile             fine-tuning, from where Reptile starts it

Each row chooses among nine settings on episodes of the fold's validation
intents: three factors on its inner rates x three numbers of inner steps;
ProtoNet, which has no inner loop, three outer rates x three lengths. Test
episodes are one fixed list a fold. With shuffled support labels every row has
to be at one over the ways. Reference by torch, nearest mean, five folds:
BANKING77 .869 (1 shot) .959 (5), CLINC150 .945, .988. Measured:
experiments/README.md.
"""

import dataclasses
import os
import time

import numpy as np

import fmeta
from experiments.fewshot import intent_table, text_table, text_task
from experiments.fewshot.intent_methods import (
  DATASETS,
  METHODS,
  SMALL_ROWS,
  Methods,
  Settings,
  check_settings,
  run_row,
)
from experiments.fewshot.text_table import REFERENCE
from fmeta import evaluate
from fmeta.datasets import intents
from fmeta.workdir import Context


@dataclasses.dataclass
class Config(Settings):
  """Those of all rows and what is ours."""

  folds: tuple[int, ...] = (1,)
  methods: tuple[str, ...] = METHODS
  test_episodes: int = 600
  tasks: int = 10
  validation_episodes: int = 60
  control_episodes: int = 50


SMALL = {
  'methods': ('ProtoNet', 'LoRA-MAML'),
  **SMALL_ROWS,
  'validation_episodes': 10,
  'test_episodes': 20,
  'control_episodes': 10,
}


def check(config: Config) -> None:
  """Refuses what cannot run, before anything is loaded."""
  check_settings(config)
  tasks, control = config.tasks, config.control_episodes
  if control < 1 or control % tasks or control > config.test_episodes:
    raise fmeta.UsageError(
      f'{control} control episodes of {config.test_episodes}; give a multiple '
      f'of the {tasks} tasks at a time'
    )
  if not config.folds:
    raise fmeta.UsageError('no folds; give some of 1 to 5: --config.folds=1,2')


def load(config: Config, context: Context):
  """All texts, and fold -> split -> its intents."""
  folder = context.data_dir or os.environ.get('FMETA_SHARED_DATA')
  module = DATASETS[config.dataset]
  splits = module.load(folder)
  folds = {
    fold: {
      split: sorted(set(columns['intent']))
      for split, columns in module.episodic_folds(splits, fold, folder).items()
    }
    for fold in config.folds
  }
  every = intents.pooled(splits)
  return {'text': every['text'], 'name': every['intent']}, folds


def run_folds(methods: Methods, folds: dict) -> dict[str, list[dict]]:
  """Method -> a result per fold; prints each grid."""
  bench, config = methods.bench, methods.bench.config
  results = {name: [] for name in (REFERENCE, *config.methods)}
  for fold, classes in folds.items():
    place = f'{config.dataset}_{config.shots}shot/fold_{fold:02d}'
    for name, runs in results.items():
      runs.append(run_row(methods, bench.of(classes), name, place))
  return results


def note_of(config: Config, folds: dict) -> str:
  """The protocol in words."""
  sizes = next(iter(folds.values()))
  train, validation, test = (len(sizes[split]) for split in intents.SPLITS)
  return (
    f'{config.dataset}, fold(s) {", ".join(map(str, folds))}: {config.ways} '
    f'intents an episode, {config.shots} text(s) of each to adapt to and '
    f'{config.queries} to answer for; {config.test_episodes} episodes a fold '
    f'of {test} intents that neither the {train} of meta-training '
    f'({config.iterations} iterations of {config.meta_batch} episodes) nor the '
    f'{validation} of validation contain. Intervals are 1.96 standard errors '
    'over episodes; differences are paired by episode. Every row chose among '
    f'{len(config.rate_factors) * len(config.test_steps)} settings on '
    f'{config.validation_episodes} validation episodes. Shuffled support '
    f'labels: the first {config.control_episodes} test episodes a fold, '
    f'{100 / config.ways:.0f} % expected. Trained parameters are those of the '
    "inner loop, ProtoNet's of the outer one."
  )


def run(config: Config, context: Context) -> dict:
  """Runs every row on every fold, prints the table and writes the page."""
  began = time.perf_counter()
  check(config)
  texts, folds = load(config, context)
  bench = text_task.Bench(config, context, texts, next(iter(folds.values())))
  results = run_folds(Methods(bench), folds)
  name = f'{config.dataset}_{config.shots}shot'
  numbers = ', '.join(map(str, folds))
  outcome = intent_table.present(
    bench,
    {key: text_table.merged(runs) for key, runs in results.items()},
    name=name,
    title=f'{config.dataset}, {config.ways}-way {config.shots}-shot',
    note=note_of(config, folds),
    tested_on=f'{intent_table.episodes_of(config)}, folds {numbers}',
    began=began,
  )
  for key, runs in results.items():
    for fold, made in zip(folds, runs, strict=True):
      summary = evaluate.summarize(np.array(made['correct']))
      outcome['metrics'][f'{name}/fold_{fold:02d}/{key}'] = summary.mean
  return outcome
