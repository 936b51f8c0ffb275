"""Tasks of `learned_rates.py`: which of five types has this parameter?

A task has five of docparams' ten types in random order, a few descriptions of
each to fine-tune on and others to answer for. Training, validation and test
tasks come from different files. What a type is called is nothing that a text
says, so the frozen model's similarities are not enough and the body has to
move, unlike in the few-shot panel, whose classes are names.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import fmeta
from experiments import minilm
from fmeta import baselines, data, episodes, tree
from fmeta.datasets import docparams
from fmeta.models import BertClassifier, forward
from fmeta.workdir import Context

SPLITS = ('train', 'validation', 'test')


class Tasks:
  """Cached states by split, the pre-trained start and lists of tasks."""

  def __init__(self, config: Any, context: Context):
    self.config, self.context = config, context
    self.texts = docparams.load(subset=False)
    module, params, tokenizer = minilm.load_model(
      config.model, config.ways, config.seed.init
    )
    first = module.config.num_layers - config.blocks
    self.columns = {
      split: self._states(module, params, tokenizer, self.texts[split], first)
      for split in SPLITS
    }
    self.classes = {
      split: episodes.classes_with(columns, config.shots + config.queries)
      for split, columns in self.columns.items()
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

  def _states(self, module, params, tokenizer, columns, first):
    """Label, mask and the state that enters layer `first`, per text."""
    length = self.config.max_length
    encoded = minilm.encode(tokenizer, columns, length)
    cached = minilm.with_prefix(module, params, encoded, first)
    seen = np.arange(length)[None] < cached['length'][:, None]
    return {
      'label': cached['label'],
      'hidden': cached['hidden'],
      'attention_mask': seen.astype(np.int32),
    }

  def embed(self, params, batch):
    """Embeddings [B, H], raw length; without dropout, supports are tiny."""
    return self.run({'body': params['body']}, {}, batch, None)[0]

  def classify(self, params, model_state, batch, rng):
    """The head on unit-length embeddings: a `Forward`."""
    del rng
    vectors = baselines.unit_length(self.embed(params, batch))
    head = params['head']
    return vectors @ head['kernel'] + head['bias'][None], model_state

  def training(self, seed: int) -> episodes.Episodes:
    """Endless meta-batches of training files."""
    config = self.config
    return self._episodes('train', config.seed.data + seed, config.meta_batch)

  def held_out(self, split: str, seed: int) -> episodes.EpisodeList:
    """A seed's own fixed list of tasks of a split."""
    # Apart from the seeds of training, and of each other.
    number = 1000 * (1 + SPLITS.index(split)) + seed
    return episodes.EpisodeList(
      self._episodes(split, number, 1),
      getattr(self.config, f'{split}_episodes'),
    )

  def _episodes(self, split, seed, tasks):
    config = self.config
    return episodes.episodes(
      self.columns[split],
      config.ways,
      config.shots,
      config.queries,
      seed,
      tasks=tasks,
      classes=self.classes[split],
    )

  def files(self, seed: int) -> np.ndarray:
    """The file of each query of a seed's test tasks [episodes, queries]."""
    tasks = self.held_out('test', seed)
    rows = [tasks.source.rows(i)[1] for i in range(len(tasks))]
    return self.texts['test']['file'].astype(str)[np.concatenate(rows)]

  def fingerprint(self) -> str:
    """sha256 of all texts."""
    return data.fingerprint(
      {
        key: np.concatenate([self.texts[split][key] for split in SPLITS])
        for key in self.texts['train']
      }
    )
