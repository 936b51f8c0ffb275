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
import functools
import os
import time

import jax
import numpy as np

import fmeta
from experiments.common import Seeds, trial
from experiments.fewshot import text_table, text_task
from experiments.fewshot.intent_methods import METHODS, Methods
from experiments.fewshot.text_table import REFERENCE
from fmeta import evaluate, report, result
from fmeta.datasets import banking77, clinc150, intents
from fmeta.pretrained import MINILM
from fmeta.workdir import Context

DATASETS = {'banking77': banking77, 'clinc150': clinc150}


@dataclasses.dataclass
class Config:
  """What one would sweep; what has no source is untuned."""

  seed: Seeds = dataclasses.field(default_factory=Seeds)
  model: str = MINILM
  dataset: str = 'banking77'
  folds: tuple[int, ...] = (1,)
  methods: tuple[str, ...] = METHODS
  # The protocol's: Dopierre et al. 2021.
  ways: int = 5
  shots: int = 1
  queries: int = 5
  test_episodes: int = 600
  # 94 % of BANKING77's texts and all but one in 10,000 of CLINC150's are not
  # longer.
  max_length: int = 32
  blocks: int = 1
  rank: int = 4
  inner_steps: int = 3
  # Inner rates that `rate_factors` multiply; bracketed on 60 validation
  # episodes of BANKING77's fold 1 (1 shot, no meta-training, 2026-11-24). The
  # head's is large because embeddings have unit length.
  head_rate: float = 30.0
  block_rate: float = 1.0
  norm_rate: float = 10.0
  lora_rate: float = 3.0
  rate_factors: tuple[float, ...] = (0.1, 0.3, 1.0)
  test_steps: tuple[int, ...] = (1, 3, 5)
  iterations: int = 120
  meta_batch: int = 4
  outer_lr: float = 3e-4
  # Factors start at nothing and have farther to go.
  lora_outer_lr: float = 1e-3
  reptile_lr: float = 0.3
  # ProtoNet's scale of cosines, see `fewshot.cosine_prototypes`.
  scale: float = 10.0
  protonet_rates: tuple[float, ...] = (1e-4, 3e-4, 1e-3)
  checkpoints: int = 3
  tasks: int = 10
  validation_episodes: int = 60
  control_episodes: int = 50
  steps_per_dispatch: int = 5


SMALL = {
  'methods': ('ProtoNet', 'LoRA-MAML'),
  'max_length': 16,
  'iterations': 2,
  'meta_batch': 2,
  'inner_steps': 1,
  'rank': 2,
  'rate_factors': (0.3,),
  'test_steps': (1, 2),
  'protonet_rates': (1e-3,),
  'checkpoints': 2,
  'steps_per_dispatch': 1,
  'validation_episodes': 10,
  'test_episodes': 20,
  'control_episodes': 10,
}


def check(config: Config) -> None:
  """Refuses what cannot run, before anything is loaded."""
  if config.dataset not in DATASETS:
    raise fmeta.UsageError(
      f'no data set {config.dataset!r}; possible: {", ".join(DATASETS)}'
    )
  for name in config.methods:
    if name not in METHODS:
      raise fmeta.UsageError(
        f'no method {name!r}; possible: {", ".join(METHODS)}'
      )
  if not config.folds:
    raise fmeta.UsageError('no folds; give some of 1 to 5: --config.folds=1,2')
  if config.iterations % config.checkpoints:
    raise fmeta.UsageError(
      f'{config.iterations} iterations have no {config.checkpoints} equal '
      'parts; give a multiple'
    )


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
    here = bench.of(classes)
    for name, runs in results.items():
      place = f'{config.dataset}_{config.shots}shot/fold_{fold:02d}/{name}'
      run = methods.result_of if name in METHODS else nearest_mean
      made = trial(bench.context, place, functools.partial(run, here, name))
      runs.append(made)
      print(
        f'{place}: {100 * np.mean(made["correct"]):.2f} %, '
        f'{made["seconds"]:.0f} s',
        flush=True,
      )
      if name in METHODS:
        text_table.show_grid(name, made)
  return results


def nearest_mean(bench: text_task.Bench, name: str) -> dict:
  """The reference, with true and with shuffled labels."""
  del name
  controls = bench.controls(bench.config.control_episodes)
  return {
    'correct': text_task.nearest_mean(bench).tolist(),
    'shuffled': text_task.nearest_mean(bench, controls).tolist(),
  }


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
  merged = {key: text_table.merged(runs) for key, runs in results.items()}
  reference = merged.pop(REFERENCE)
  table = text_table.compare(
    name,
    {key: [made] for key, made in merged.items()},
    np.array(reference['correct']),
    config.test_steps,
    ('fine-tuning', 'LN-tuning', 'LoRA'),
    np.array(reference['shuffled']),
  )
  for key, runs in results.items():
    for fold, made in zip(folds, runs, strict=True):
      summary = evaluate.summarize(np.array(made['correct']))
      table.numbers[f'{name}/fold_{fold:02d}/{key}'] = summary.mean
  shown = report.Panel(
    f'{config.dataset}, {config.ways}-way {config.shots}-shot',
    'Which method beats the nearest class mean of the frozen encoder?',
    table.rows,
    note_of(config, folds),
    report.curves(table.lines, xlabel='inner steps'),
    reference=REFERENCE,
    total=bench.total,
  )
  print(report.terminal_table(shown), flush=True)
  outcome = text_table.outcome_of(table, bench)
  report.write_report(
    context.workdir / 'report.html',
    f'Few-shot intents: MiniLM on {config.dataset}',
    [shown],
    {
      'hardware': f'{len(jax.devices())} x {jax.devices()[0].device_kind}',
      'seconds': round(time.perf_counter() - began),
      'date': time.strftime('%Y-%m-%d'),
      'commit': result.commit(),
      'data sha256': outcome['data_sha256'],
      'versions': result.versions(),
    },
  )
  return outcome
