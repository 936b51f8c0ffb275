"""Baseline++ on Omniglot: plain training, then a new head for each task.

  python -m experiments.run \\
    --config=experiments/fewshot/omniglot/baseline_plus_plus.py

Chen et al. 2019 (https://arxiv.org/abs/1904.04232): a classifier of all
training characters whose logits are scaled cosines, trained without episodes;
for a task the body stays and a new head is fitted to the support set, by 100
full-batch steps of SGD at 0.5 with the scale of training (theirs are batches
of four, momentum 0.9 at 0.01, a scale of 2 and a norm per class). What a
meta-learner has to beat: there is no learning to learn in it. Their Omniglot
runs test on other alphabets of another data set. Measured:
experiments/README.md.
"""

import dataclasses

import jax
import numpy as np

import fmeta
from experiments.fewshot.omniglot import measure, splits, task
from fmeta import data, fewshot, optim
from fmeta.workdir import Context

SMALL = {**task.SMALL, 'batch_size': 16, 'test_steps': 5}


@dataclasses.dataclass
class Config(task.Task):
  """The task's fields and the baseline's; there are no meta-batches."""

  batch_size: int = 64
  scale: float = 10.0  # theirs for more than 200 classes
  inner_lr: float = 0.5
  test_steps: int = 100
  curve_steps: int = 100


def new_head(config: Config) -> fewshot.Start:
  """Each task's own, the same draw for all."""
  draw = jax.nn.initializers.lecun_normal()

  def begin(params, model_state, support, rng):
    del model_state, support, rng
    kernel = draw(jax.random.key(0), (config.filters, config.ways))
    return {**params, 'head': {'kernel': kernel}}

  return begin


def run(config: Config, context: Context) -> dict:
  """Trains a classifier, then adapts its head to each test task."""
  if config.resident or config.chunk:
    raise fmeta.UsageError(
      'the baseline trains on no episodes; leave --config.resident=False and '
      '--config.chunk=0'
    )
  parts = splits.load(config, context)
  classes = len(np.unique(parts['train']['label']))
  embed = task.model(config, None)
  alone = measure.by_support(config, None)
  classify = fewshot.cosine_classifier(embed, config.scale)
  loss = fmeta.supervised(classify, fmeta.softmax_cross_entropy)
  inner = fmeta.finetune(
    loss, optim.sgd(config.inner_lr), tuning=fmeta.select('head/.*')
  )
  begin = new_head(config)

  def predict(embed):
    model = fewshot.cosine_classifier(embed, config.scale)
    answer = fmeta.predict_episodes(inner, model, config.test_steps)
    return fewshot.predict_from(begin, answer)

  head = jax.nn.initializers.lecun_normal()(
    jax.random.fold_in(jax.random.key(config.seed.init), 1),
    (config.filters, classes),
  )
  by_step = fewshot.predict_by_step(inner, classify, config.curve_steps)
  method = task.Method(
    fmeta.finetune(loss, optim.adam(task.outer_rate(config))),
    {**task.start(config, None), 'head': {'kernel': head}},
    predict(embed),
    predict(alone),
    train_ways=config.ways,
    by_step=fewshot.predict_from(begin, by_step),
    source=lambda episodes: batches_of(config, episodes),
  )
  return task.run(config, context, method, parts)


def batches_of(config: Config, episodes) -> data.Batches:
  """Images of all training characters; classes are numbered without gaps."""
  columns = episodes.columns
  label = np.unique(columns['label'], return_inverse=True)[1]
  plain = {'image': columns['image'], 'label': label.astype(np.int32)}
  return data.batches(plain, config.batch_size, config.seed.data)
