"""Shuffled support labels leave every method at chance."""

import jax.numpy as jnp
import numpy as np
import pytest

from fmeta import (
  baselines,
  controls,
  episodes,
  evaluate,
  fewshot,
  losses,
  meta,
  optim,
)
from fmeta.learner import finetune

WAYS, FEATURES, TASKS = 5, 8, 400


def embed(params, model_state, batch, rng):
  return batch['x'], model_state


def linear(params, model_state, batch, rng):
  return batch['x'] @ params['kernel'], model_state


HEADS = {
  'prototypes': fewshot.prototypes,
  'cosine prototypes': fewshot.cosine_prototypes(),
  'nearest mean': baselines.nearest_mean_cosine,
  'matching': fewshot.matching(10.0),
  'ridge': fewshot.ridge(1.0, 1.0),
}
PREDICT = {
  name: fewshot.predict_head(head, embed, WAYS) for name, head in HEADS.items()
}
PREDICT['inner loop'] = meta.predict_episodes(
  finetune(
    losses.supervised(linear, losses.softmax_cross_entropy), optim.sgd(0.1)
  ),
  linear,
  5,
)


def tasks():
  """Five classes of 20 far-apart ones, two rows each."""
  random = np.random.default_rng(0)
  label = np.repeat(np.arange(20, dtype=np.int32), 10)
  x = 3 * random.normal(size=(20, FEATURES))[label]
  x = x + random.normal(size=x.shape)
  columns = {'x': x.astype(np.float32), 'label': label}
  return episodes.episodes(columns, WAYS, 2, 3, 0, tasks=50)


@pytest.mark.parametrize('name', PREDICT)
def test_shuffled_labels_leave_chance_and_true_ones_do_not(name):
  made, params = tasks(), {'kernel': jnp.zeros((FEATURES, WAYS))}

  def accuracy(source):
    right = evaluate.evaluate_episodes(PREDICT[name], params, source, TASKS)
    return evaluate.summarize(right)

  low, high = accuracy(
    lambda i: controls.shuffle_support_labels(made(i), 0)
  ).ci95
  assert low < 1 / WAYS < high and high - low < 0.06
  assert accuracy(made).mean > 0.8
