"""Texts, classes and inner learners of the few-shot panel.

`Bench` holds what all rows share: cached states, names by split, the start.
`Family` is an inner learner and the program that tests it.
"""

import hashlib
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import fmeta
from experiments import minilm
from fmeta import baselines, data, episodes, optim, tree
from fmeta.datasets import docparams
from fmeta.models import BertClassifier, forward
from fmeta.workdir import Context

SPLITS = {'train': 0.6, 'validation': 0.75, 'test': 1.0}  # upper ends
# Seeds of the fixed lists of tasks; no sweep touches them.
LISTS = {'validation': 1001, 'test': 1002}


def split_of(name: str) -> str:
  """60 / 15 / 25 by the first 32 bits of the name's sha256."""
  place = int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) / 2**32
  return next(split for split, end in SPLITS.items() if place < end)


class Bench:
  """Cached states, classes by split and the pre-trained start."""

  def __init__(self, config: Any, context: Context):
    self.config, self.context = config, context
    splits = docparams.load(subset=False)
    columns = {
      key: np.concatenate([splits[name][key] for name in splits])
      for key in ('text', 'name')
    }
    names = docparams.few_shot_names(columns['name'], config.min_examples)
    self.texts = data.take(columns, np.isin(columns['name'].astype(str), names))
    self.classes = {
      split: [name for name in names if split_of(name) == split]
      for split in SPLITS
    }
    module, params, tokenizer = minilm.load_model(
      config.model, config.ways, config.seed.init
    )
    first = module.config.num_layers - config.blocks
    encoded = minilm.encode(tokenizer, self.texts, config.max_length)
    cached = minilm.with_prefix(module, params, encoded, first)
    width = np.arange(config.max_length)[None]
    self.columns = {
      'name': cached['name'].astype(str),
      'hidden': cached['hidden'],
      'attention_mask': (width < cached['length'][:, None]).astype(np.int32),
    }
    self.total = tree.size(params)
    self.run = forward(
      BertClassifier(module.config),
      minilm.HIDDEN,
      method='resume',
      first_layer=first,
    )
    moving = {f'layer_{k}' for k in range(first, module.config.num_layers)}
    self.start = {
      'body': {k: v for k, v in params['body'].items() if k in moving},
      # Zero: classes come in random order, so no start can prefer one.
      'head': jax.tree.map(jnp.zeros_like, params['head']),
    }
    self.loss = fmeta.supervised(self.classify, fmeta.softmax_cross_entropy)

  def embed(self, params, batch):
    """Embeddings [B, H], raw length; without dropout, supports are tiny."""
    return self.run({'body': params['body']}, {}, batch, None)[0]

  def classify(self, params, model_state, batch, rng):
    """The head on unit-length embeddings: a `Forward`."""
    del rng
    vectors = baselines.unit_length(self.embed(params, batch))
    head = params['head']
    return vectors @ head['kernel'] + head['bias'][None], model_state

  def train_tasks(self, seed: int, whole: bool) -> Callable[[int], dict]:
    """Meta-batches of training names; `whole`: all texts are support."""
    config = self.config
    shots, queries = config.shots, config.queries
    if whole:
      shots, queries = shots + queries - 1, 1
    return episodes.episodes(
      self.columns,
      config.ways,
      shots,
      queries,
      config.seed.data + seed,
      tasks=config.meta_batch,
      classes=self.classes['train'],
      key='name',
    )

  def held_out(self, split: str) -> episodes.EpisodeList:
    """The fixed list of episodes of a split."""
    config = self.config
    return episodes.evaluation_episodes(
      self.columns,
      config.ways,
      config.shots,
      config.queries,
      LISTS[split],
      getattr(config, f'{split}_episodes'),
      tasks=config.tasks,
      classes=self.classes[split],
      key='name',
    )


class Family:
  """One inner learner and the program that tests it, for several rows.

  Outer parameters are `{'model', 'hyper'}`; `hyper` holds the logarithm of
  each moving leaf's inner rate, so rows with given and with learned rates
  share everything, and test-time rates are an argument.
  """

  def __init__(self, bench: Bench, head_only: bool):
    self.bench = bench
    config = bench.config
    patterns = ('head/.*',) if head_only else (config.adapted, 'head/.*')
    self.tuning = fmeta.select(*patterns)
    self.predict = jax.jit(self._curve)

  def start(self, seed: int) -> dict:
    """Outer parameters before meta-training."""
    config, model = self.bench.config, self.bench.start
    key = jax.random.key(config.seed.init + seed)
    moving, _ = self.tuning.init(model, key)

    def log_rate(name, leaf):
      del leaf
      head = name.startswith('head/')
      return jnp.log(config.head_rate if head else config.norm_rate)

    return {'model': model, 'hyper': tree.map_with_name(log_rate, moving)}

  def inner(self, value_and_grad=fmeta.gradients.plain):
    """`hyper -> learner`: SGD with a rate per leaf."""

    def learner(hyper):
      rates = [
        (re.escape(name), jnp.exp(tree.get(hyper, name)))
        for name in tree.names(hyper)
      ]
      return fmeta.finetune(
        self.bench.loss,
        optim.sgd(1.0, multipliers=rates),
        tuning=self.tuning,
        value_and_grad=value_and_grad,
      )

    return learner

  def _curve(self, params, batch):
    """Query logits [tasks, steps, queries, ways] after each of `test_steps`."""
    learner = self.inner()(params['hyper'])
    steps = self.bench.config.test_steps

    def one(episode):
      key = jax.random.key(0)
      state, outputs = learner.init(params['model'], key), []
      for more in np.diff((0, *steps)):
        state, _ = fmeta.adapt(
          learner, state, lambda _: episode['support'], key, num_steps=int(more)
        )
        with learner.using(state) as adapted:
          outputs.append(
            self.bench.classify(adapted, {}, episode['query'], None)[0]
          )
      return jnp.stack(outputs)

    return jax.vmap(one)(batch)

  def accuracies(self, params, split: str, factor: float) -> np.ndarray:
    """Accuracy [episodes, steps] with the inner rates times `factor`."""
    shift = jnp.log(factor)
    hyper = jax.tree.map(lambda rate: rate + shift, params['hyper'])
    params, rights = {**params, 'hyper': hyper}, []
    for batch in self.bench.held_out(split):
      predicted = np.asarray(self.predict(params, batch)).argmax(-1)
      rights.append((predicted == batch['query']['label'][:, None]).mean(-1))
    return np.concatenate(rights)
