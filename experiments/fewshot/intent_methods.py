"""The rows of the few-shot intent table: how each is trained and tested."""

import dataclasses
import functools
import re
from typing import Any

import jax
import numpy as np
import optax

import fmeta
from experiments.common import Seeds, best_setting, require, trial
from experiments.fewshot.text_family import Family, choose_and_test, cost_of
from experiments.fewshot.text_table import REFERENCE, show_grid
from experiments.fewshot.text_task import Bench, head_scores, nearest_mean
from fmeta import adapters, fewshot, optim, train, tree
from fmeta.datasets import banking77, clinc150
from fmeta.pretrained import MINILM

DATASETS = {'banking77': banking77, 'clinc150': clinc150}

# What small settings of these experiments share.
SMALL_ROWS = {
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
}
METHODS = (
  'fine-tuning',
  'LN-tuning',
  'LoRA',
  'ProtoNet',
  'MAML',
  'Proto-MAML',
  'LoRA-MAML',
  'Reptile',
)
# What the inner loop of a possible row moves, see `families_of`.
INNER = {
  'linear probe': 'head',
  'fine-tuning': 'block',
  'LN-tuning': 'norms',
  'LoRA': 'factors',
  'MAML': 'block',
  'Proto-MAML': 'block from prototypes',
  'LoRA-MAML': 'factors',
  'Reptile': 'block',
}
# The smallest value of each setting of the two tables.
LEAST = {
  **dict.fromkeys(('shots', 'queries', 'meta_batch', 'iterations'), 1),
  **dict.fromkeys(('max_length', 'blocks', 'rank', 'inner_steps'), 1),
  **dict.fromkeys(('steps_per_dispatch', 'tasks', 'folds'), 1),
  'ways': 2,
  'test_steps': 0,
}
POSITIVE = (
  *('head_rate', 'block_rate', 'norm_rate', 'lora_rate', 'rate_factors'),
  *('outer_lr', 'lora_outer_lr', 'reptile_lr', 'protonet_rates', 'scale'),
)
UNTRAINED = ('linear probe', 'fine-tuning', 'LN-tuning', 'LoRA')


@dataclasses.dataclass
class Settings:
  """What all rows need; what has no source is untuned."""

  seed: Seeds = dataclasses.field(default_factory=Seeds)
  model: str = MINILM
  dataset: str = 'banking77'
  # The protocol's: Dopierre et al. 2021.
  ways: int = 5
  shots: int = 1
  queries: int = 5
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
  # Texts per inner step of Reptile's training, a multiple of the ways; 0: all.
  reptile_batch: int = 0
  # ProtoNet's scale of cosines, see `fewshot.cosine_prototypes`.
  scale: float = 10.0
  protonet_rates: tuple[float, ...] = (1e-4, 3e-4, 1e-3)
  checkpoints: int = 3
  steps_per_dispatch: int = 5


def families_of(bench: Bench) -> dict[str, Family]:
  """The inner loops; each is SGD on the support set."""
  config = bench.config
  kernels, norms = ('body/.*/kernel',), 'body/.*/norm/.*'
  head = ('head/.*', config.head_rate)
  block = fmeta.select('body/.*', 'head/.*'), (head, ('.*', config.block_rate))
  start = fewshot.prototype_start(bench.unit, config.ways)
  return {
    'head': Family(bench, fmeta.select('head/.*'), (head,)),
    'block': Family(bench, *block),
    'block from prototypes': Family(
      bench, *block, begin=fewshot.of_model(start)
    ),
    'norms': Family(
      bench, fmeta.select(norms, 'head/.*'), (head, ('.*', config.norm_rate))
    ),
    'factors': Family(
      bench,
      fmeta.lora(*kernels, rank=config.rank, also=('head/.*',)),
      (head, ('.*', config.lora_rate)),
      # Born among the outer parameters, so that MAML learns them.
      lambda model, key: adapters.lora_init(model, key, kernels, config.rank),
    ),
  }


def check_settings(config: Any) -> None:
  """Refuses what cannot run, before anything is loaded."""
  require(config, LEAST, POSITIVE)
  steps = config.test_steps
  if list(steps) != sorted(set(steps)) or not steps or not config.rate_factors:
    raise fmeta.UsageError(
      f'config.test_steps is {steps}, config.rate_factors '
      f'{config.rate_factors}; give numbers of steps that grow, and a factor'
    )
  if config.dataset not in DATASETS:
    raise fmeta.UsageError(
      f'no data set {config.dataset!r}; possible: {", ".join(DATASETS)}'
    )
  if config.checkpoints < 1 or config.iterations % config.checkpoints:
    raise fmeta.UsageError(
      f'{config.iterations} iterations have no {config.checkpoints} equal '
      'parts; give a multiple'
    )
  if config.reptile_batch < 0 or config.reptile_batch % config.ways:
    raise fmeta.UsageError(
      f'batches of {config.reptile_batch} texts do not hold {config.ways} '
      'intents evenly; give a multiple of the ways, or 0 for all texts'
    )
  possible = 'ProtoNet', *INNER
  for name in config.methods:
    if name not in possible:
      raise fmeta.UsageError(
        f'no method {name!r}; possible: {", ".join(possible)}'
      )


class Methods:
  """All rows on one set of states; programs are compiled once for all folds."""

  def __init__(self, bench: Bench):
    self.bench = bench
    config = bench.config
    self.families = families_of(bench)
    head = fewshot.cosine_prototypes(config.scale)
    loss = fewshot.head_loss(head, bench.unit, config.ways)

    def adamw(rate):
      return optim.adamw(optim.warmup_linear(rate, config.iterations))

    self.protonet = train.Program(
      # The rate lives in the state: one program for three of them.
      fmeta.finetune(loss, optax.inject_hyperparams(adamw)(rate=0.0))
    )
    self.by_prototypes = fewshot.predict_head(head, bench.unit, bench.test_ways)

  def result_of(self, bench: Bench, name: str) -> dict[str, Any]:
    """Trains, chooses on the validation intents, tests: one trial."""
    if name == 'ProtoNet':
      return self._prototypes(bench)
    family, cost = self.families[INNER[name]], {}
    params = family.start(0)
    if name not in UNTRAINED:
      learner = self.outer(name)
      state = learner.init(params, jax.random.key(bench.config.seed.init))
      fitted = bench.meta_fit(name, learner, state, 0, whole=name == 'Reptile')
      params, cost = fitted.params, cost_of(fitted)
    return {**cost, **choose_and_test(family, bench, params, controls=True)}

  def outer(self, name: str) -> fmeta.Learner:
    """The outer learner of a row with an inner loop.

    It moves what the inner loop moves but for the head, whose classes are
    drawn anew in every episode.
    """
    family, config = self.families[INNER[name]], self.bench.config
    rate = config.outer_lr
    if name == 'LoRA-MAML':
      rate = config.lora_outer_lr
    optimizer = optim.adamw(optim.warmup_linear(rate, config.iterations))
    loss = family.loss()
    if name == 'Reptile':
      loss = fmeta.reptile_loss(
        family.inner(),
        config.inner_steps,
        batch_size=config.reptile_batch or None,
      )
      optimizer = optim.sgd(config.reptile_lr)
    moving = tree.names(family.moving(family.start(0)['model']))
    body = [f'model/{re.escape(n)}' for n in moving if n.startswith('body/')]
    return fmeta.finetune(loss, optimizer, tuning=fmeta.select(*body))

  def _prototypes(self, bench: Bench) -> dict[str, Any]:
    """ProtoNet: three rates, each judged at three lengths."""
    config, learner = bench.config, self.protonet.learner
    validation = bench.held_out('validation')

    def scores(params, batches):
      return head_scores(bench, self.by_prototypes, params, batches)

    def judge(params, model_state):
      del model_state
      return {'accuracy': float(scores(params, validation).mean())}

    tried, fits = {}, {}
    for rate in config.protonet_rates:
      key = jax.random.key(config.seed.init)
      state = learner.init({'body': bench.start['body']}, key)
      fitted = bench.meta_fit(
        'ProtoNet',
        learner,
        optim.set_hyper(state, rate=rate),
        0,
        evaluate=judge,
        evaluate_every=config.iterations // config.checkpoints,
        restore_best=True,
        program=self.protonet,
      )
      for record in fitted.evaluations:
        setting = f'rate {rate:g}, {record["step"]} iterations'
        tried[setting] = record['evaluation']['accuracy']
        fits[setting] = fitted
    setting = best_setting(tried)
    best = fits[setting]
    return {
      **cost_of(best),
      'tried': tried,
      'setting': setting,
      'correct': scores(best.params, bench.held_out('test')).tolist(),
      'shuffled': scores(best.params, bench.controls()).tolist(),
      'trainable': tree.size(best.params),
    }


def run_row(
  methods: Methods, bench: Bench, name: str, place: str
) -> dict[str, Any]:
  """One row's trial, or what is known of it; prints its grid."""
  run = _reference if name == REFERENCE else methods.result_of
  place = f'{place}/{name}'
  made = trial(bench.context, place, functools.partial(run, bench, name))
  print(
    f'{place}: {100 * np.mean(made["correct"]):.2f} %, {made["seconds"]:.0f} s',
    flush=True,
  )
  if name != REFERENCE:
    show_grid(name, made)
  return made


def _reference(bench: Bench, name: str) -> dict:
  """The reference, with true and with shuffled labels."""
  del name
  return {
    'correct': nearest_mean(bench).tolist(),
    'shuffled': nearest_mean(bench, bench.controls()).tolist(),
  }
