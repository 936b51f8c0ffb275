"""Streams of Omniglot's characters, and heads learned on them in one pass."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

import fmeta
from fmeta import baselines, data, draw, episodes, evaluate, optim
from fmeta.models import IMAGE, forward
from fmeta.models.conv import Block


class Encoder(nn.Module):
  """Four stride-2 convolutions, group norm, and a wide rectified layer.

  Group norm because a stream brings one image at a time. Features are not
  averaged over space: a head learned online needs many of them.
  """

  filters: int
  width: int

  @nn.compact
  def __call__(self, image, *, deterministic=True):
    """[B, H, W, C] -> [B, width]."""
    x = image
    for k in range(4):
      x = Block(self.filters, 'group', name=f'block_{k}')(x, deterministic)
    x = x.reshape(len(x), -1)
    return nn.relu(nn.Dense(self.width, name='wide')(x))


def embedding(encoder: nn.Module) -> fmeta.Forward:
  """Features of the parameters under `body`."""
  run = forward(encoder, IMAGE)

  def embed(params, model_state, batch, rng):
    return run(params['body'], model_state, batch, rng)

  return embed


def linear(params, model_state, batch, rng):
  """A `Forward`: logits of features under `head`."""
  del rng
  head = params['head']
  logits = batch['x'] @ head['kernel'] + head['bias'].reshape(1, -1)
  return logits, model_state


def classifier(embed: fmeta.Forward) -> fmeta.Forward:
  """The whole network, from images to logits."""

  def run(params, model_state, batch, rng):
    x, model_state = embed(params, model_state, batch, rng)
    return linear(params, model_state, {'x': x}, rng)

  return run


HEAD_LOSS = fmeta.supervised(linear, fmeta.softmax_cross_entropy)


def numbered(columns: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Images with labels 0, 1, ... without gaps."""
  label = np.unique(columns['label'], return_inverse=True)[1]
  return {'image': columns['image'], 'label': label.astype(np.int32)}


@dataclasses.dataclass(frozen=True)
class TrainingStreams:
  """`streams(i)` is the i-th meta-batch of streams, a function of the seed.

  Each stream shows `classes` characters one after the other, `shots` drawings
  each. Its query is the stream itself and `remember` drawings of any
  character, which it must not overwrite.

  Attributes:
    columns: `image` and `label`, numbered.
    classes: per stream.
    shots: drawings of each.
    remember: random rows of the query.
    tasks: streams per meta-batch.
    seed: names the list of streams.
  """

  columns: dict[str, np.ndarray]
  classes: int
  shots: int
  remember: int
  tasks: int
  seed: int

  def __call__(self, i: int) -> episodes.Episode:
    """Arrays [tasks, rows, ...]."""
    drawn = [self._rows(i * self.tasks + t) for t in range(self.tasks)]
    support, query = (np.stack(rows) for rows in zip(*drawn, strict=True))
    return {
      'support': data.take(self.columns, support),
      'query': data.take(self.columns, query),
    }

  @functools.cached_property
  def members(self) -> np.ndarray:
    """Row numbers of each class."""
    return by_class(self.columns)

  def _rows(self, index: int) -> tuple[np.ndarray, np.ndarray]:
    members = self.members
    used = self.classes * (1 + self.shots) + self.remember
    blocks = -(-used // 4)
    words = draw.random_words(self.seed, draw.EPISODE, index * blocks, used)
    first, picks, rest = np.split(
      words, [self.classes, self.classes * (1 + self.shots)]
    )
    chosen = draw.draw_without_replacement(
      first[None], np.array([len(members)])
    )[0]
    picked = draw.draw_without_replacement(
      picks.reshape(self.classes, self.shots),
      np.full(self.classes, members.shape[1]),
    )
    stream = members[chosen[:, None], picked].ravel()
    others = (rest % np.uint64(len(self.columns['label']))).astype(np.int64)
    return stream, np.concatenate([stream, others])


def by_class(columns: Mapping[str, np.ndarray]) -> np.ndarray:
  """Row numbers [classes, drawings]; every class has as many."""
  order = np.argsort(columns['label'], kind='stable')
  return order.reshape(int(columns['label'].max()) + 1, -1)


class Trials(NamedTuple):
  """Streams to test on: `support` in order of the classes, and `query`.

  Leaves are row numbers and labels, [draws, rows].
  """

  support: dict[str, np.ndarray]
  query: dict[str, np.ndarray]


def test_streams(
  columns: Mapping[str, np.ndarray],
  classes: int,
  shots: int,
  asked: int,
  draws: int,
  seed: int,
  *,
  shuffled: bool = False,
) -> Trials:
  """`draws` choices of classes, of their order and of their drawings.

  Args:
    columns: numbered.
    classes: of each stream; the same draw with fewer has the first of them.
    shots: drawings to learn from, of each class.
    asked: drawings to answer for.
    draws: how many.
    seed: of the draws.
    shuffled: the same rows in random order.

  Raises:
    UsageError: if there are too few classes or drawings.
  """
  members = by_class(columns)
  if classes > len(members) or shots + asked > members.shape[1]:
    raise fmeta.UsageError(
      f'{classes} classes of {shots} + {asked} drawings; there are '
      f'{len(members)} of {members.shape[1]}: lower classes or shots'
    )
  label = np.repeat(np.arange(classes, dtype=np.int32), shots)
  asked_label = np.repeat(np.arange(classes, dtype=np.int32), asked)
  support, query, labels = [], [], []
  for k in range(draws):
    order = draw.permutation(seed, draw.VARIED, k, len(members))[:classes]
    drawings = draw.permutation(seed, draw.SPLIT, k, members.shape[1])
    rows = members[order][:, drawings]
    places = np.arange(label.size)
    if shuffled:
      places = draw.permutation(seed, draw.EPOCH, k, label.size)
    support.append(rows[:, :shots].ravel()[places])
    labels.append(label[places])
    query.append(rows[:, shots : shots + asked].ravel())
  return Trials(
    {'row': np.stack(support), 'label': np.stack(labels)},
    {'row': np.stack(query), 'label': np.tile(asked_label, (draws, 1))},
  )


def features(
  embed: fmeta.Forward, params: Any, columns: Mapping[str, np.ndarray]
) -> np.ndarray:
  """Features of all images, [N, width]."""
  batches = data.eval_batches(columns, min(500, len(columns['label'])))
  return evaluate.evaluate(embed, params, {}, batches).logits


def on_features(trials: Trials, known: np.ndarray) -> episodes.Episode:
  """The streams as episodes of features."""
  return {
    name: {'x': known[part['row']], 'label': part['label']}
    for name, part in trials._asdict().items()
  }


@functools.cache  # One function a length: every body finds its program.
def learned_online(steps: int) -> Callable:
  """`({'model', 'hyper': {'rate'}}, episodes, rng) -> logits` of a head."""

  def inner(hyper):
    return fmeta.finetune(HEAD_LOSS, optim.sgd(hyper['rate']))

  return fmeta.predict_episodes(inner, linear, steps, batch_size=1)


def online_accuracy(
  trials: Trials, known: np.ndarray, rate: float
) -> np.ndarray:
  """After one pass of steps on single rows, [draws].

  The head starts at zero and has a column for every class of the stream.
  """
  classes = int(trials.query['label'].max()) + 1
  head = {
    'kernel': jnp.zeros((known.shape[1], classes)),
    'bias': jnp.zeros(classes),
  }
  params = {
    'model': {'head': head},
    'hyper': {'rate': jnp.asarray(rate, jnp.float32)},
  }
  predict = learned_online(trials.support['row'].shape[1])
  batch = on_features(trials, known)
  return evaluate.evaluate_episodes(
    predict, params, lambda _: batch, len(batch['support']['label'])
  )


def nearest_mean_accuracy(trials: Trials, known: np.ndarray) -> np.ndarray:
  """Of the nearest class mean by cosine, [draws]."""
  classes = int(trials.query['label'].max()) + 1
  batch = on_features(trials, known)

  @jax.jit
  def scores(support, query):
    return jax.vmap(
      lambda s, q: baselines.nearest_mean_cosine(
        s['x'], s['label'], q['x'], classes
      )
    )(support, query)

  found = np.asarray(scores(batch['support'], batch['query'])).argmax(-1)
  return (found == trials.query['label']).mean(-1)
