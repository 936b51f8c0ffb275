"""The rows of the few-shot intent table: how each is trained and tested."""

import re
from typing import Any

import jax
import numpy as np
import optax

import fmeta
from experiments.common import best_setting
from experiments.fewshot.text_family import Family, choose_and_test, cost_of
from experiments.fewshot.text_task import Bench
from fmeta import adapters, evaluate, fewshot, optim, train, tree

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
# What the inner loop moves, see `families_of`.
INNER = {
  'fine-tuning': 'block',
  'LN-tuning': 'norms',
  'LoRA': 'factors',
  'MAML': 'block',
  'Proto-MAML': 'block from prototypes',
  'LoRA-MAML': 'factors',
  'Reptile': 'block',
}
UNTRAINED = ('fine-tuning', 'LN-tuning', 'LoRA')


def families_of(bench: Bench) -> dict[str, Family]:
  """The four inner loops; each is SGD on the support set."""
  config = bench.config
  kernels, norms = ('body/.*/kernel',), 'body/.*/norm/.*'
  head = ('head/.*', config.head_rate)
  block = fmeta.select('body/.*', 'head/.*'), (head, ('.*', config.block_rate))
  start = fewshot.prototype_start(bench.unit, config.ways)
  return {
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
    self.by_prototypes = fewshot.predict_head(head, bench.unit, config.ways)

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
    controls = bench.config.control_episodes
    return {**cost, **choose_and_test(family, bench, params, controls)}

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
      loss = fmeta.reptile_loss(family.inner(), config.inner_steps)
      optimizer = optim.sgd(config.reptile_lr)
    moving = tree.names(family.moving(family.start(0)['model']))
    body = [f'model/{re.escape(n)}' for n in moving if n.startswith('body/')]
    return fmeta.finetune(loss, optimizer, tuning=fmeta.select(*body))

  def accuracies(self, params: Any, batches: Any) -> np.ndarray:
    """ProtoNet's accuracy [episodes]."""
    count = len(batches) * self.bench.config.tasks
    return evaluate.evaluate_episodes(
      self.by_prototypes, params, batches.__getitem__, count
    )

  def _prototypes(self, bench: Bench) -> dict[str, Any]:
    """ProtoNet: three rates, each judged at three lengths."""
    config, learner = bench.config, self.protonet.learner
    validation = bench.held_out('validation')

    def judge(params, model_state):
      del model_state
      return {'accuracy': float(self.accuracies(params, validation).mean())}

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
    controls = bench.controls(config.control_episodes)
    return {
      **cost_of(best),
      'tried': tried,
      'setting': setting,
      'correct': self.accuracies(best.params, bench.held_out('test')).tolist(),
      'shuffled': self.accuracies(best.params, controls).tolist(),
      'trainable': tree.size(best.params),
    }
