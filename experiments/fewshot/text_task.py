"""Episodes of texts on MiniLM: what the few-shot text tables share.

All but the last blocks are frozen and run once per text. `Bench` holds what
all rows have in common: cached states, classes by split, the start.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import fmeta
from experiments import minilm
from experiments.common import placement
from fmeta import (
  baselines,
  controls,
  data,
  episodes,
  evaluate,
  train,
  tree,
)
from fmeta.models import BertClassifier, forward
from fmeta.workdir import Context

# Seeds of the fixed lists of tasks; no sweep touches them.
LISTS = {'validation': 1001, 'test': 1002}
_SHUFFLE = 1003


class Bench:
  """Cached states, classes by split and the pre-trained start.

  Args:
    config: has `model`, `seed`, the sizes of episodes and lists, `max_length`
      and `blocks`, how many of the last blocks may move.
    context: of the run.
    texts: `text` and `name`, the class.
    classes: names of 'train', 'validation' and 'test'.
  """

  def __init__(
    self,
    config: Any,
    context: Context,
    texts: data.Columns,
    classes: Mapping[str, Sequence[str]],
  ):
    self.config, self.context = config, context
    self.texts, self.classes = texts, classes
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

  @property
  def test_texts(self) -> data.Columns:
    """Where the tests come from."""
    return self.texts

  @property
  def test_ways(self) -> int:
    """Classes of a task in validation and testing."""
    return self.config.ways

  def for_test(self, params: Any) -> Any:
    """Outer parameters `{'model', 'hyper'}` as a task of `test_ways` needs."""
    return params

  def scored(self, right: np.ndarray) -> np.ndarray:
    """[episodes, steps, queries] to [n, steps]: what is paired and counted."""
    return right.mean(-1)

  def of(self, classes: Mapping[str, Sequence[str]]) -> 'Bench':
    """The same states with other classes."""
    other = copy.copy(self)
    other.classes = classes
    return other

  def embed(self, params, batch):
    """Embeddings [B, H], raw length; without dropout, supports are tiny."""
    return self.run({'body': params['body']}, {}, batch, None)[0]

  def unit(self, params, model_state, batch, rng):
    """Unit-length embeddings: a `Forward`."""
    del rng
    return baselines.unit_length(self.embed(params, batch)), model_state

  def classify(self, params, model_state, batch, rng):
    """The head on unit-length embeddings: a `Forward`."""
    vectors, model_state = self.unit(params, model_state, batch, rng)
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

  def controls(self) -> list[episodes.Episode]:
    """The first test episodes with shuffled support labels."""
    count = self.config.control_episodes // self.config.tasks
    batches = self.held_out('test')[:count]
    return [controls.shuffle_support_labels(b, _SHUFFLE) for b in batches]

  def meta_fit(
    self,
    name: str,
    learner: fmeta.Learner,
    state: fmeta.TrainState,
    seed: int,
    *,
    whole: bool = False,
    **options: Any,
  ) -> train.Fitted:
    """`fit` on meta-batches of training names, see `train_tasks`."""
    config = self.config
    return train.fit(
      learner,
      state,
      [train.Stage(name, self.train_tasks(seed, whole), config.iterations)],
      jax.random.key(config.seed.train + seed),
      steps_per_dispatch=config.steps_per_dispatch,
      **options,
      **placement(self.context),
    )


def nearest_mean(
  bench: Bench, batches: Sequence[episodes.Episode] | None = None
) -> np.ndarray:
  """Scores [n] of the frozen model, by cosine."""
  predict = baselines.nearest_mean_episodes(
    bench.embed, baselines.nearest_mean_cosine, bench.test_ways
  )
  given = bench.held_out('test') if batches is None else batches
  return head_scores(bench, predict, bench.start, given)


def head_scores(
  bench: Bench,
  predict: evaluate.PredictEpisode,
  params: Any,
  batches: Sequence[episodes.Episode],
) -> np.ndarray:
  """What `bench.scored` makes of a method without inner steps, [n]."""
  count = len(batches) * len(batches[0]['query']['label'])
  answers = evaluate.answer_episodes(
    predict, params, batches.__getitem__, count
  )
  right = answers.logits.argmax(-1) == answers.labels
  return bench.scored(right[:, None])[:, 0]
