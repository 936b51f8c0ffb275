"""Proto-MAML on Omniglot: the head begins as a prototypical network.

  python -m experiments.run --config=experiments/fewshot/omniglot/proto_maml.py

Before the inner loop a task's linear head is what its prototypes say, and the
outer gradient runs through them (Triantafillou et al. 2020,
https://arxiv.org/abs/1903.03096, section 3; they report Meta-Dataset).
Measured: experiments/README.md.
"""

import dataclasses

import fmeta
from experiments.fewshot.omniglot import maml, measure, task
from fmeta import fewshot
from fmeta.types import Forward
from fmeta.workdir import Context

SMALL = maml.SMALL


@dataclasses.dataclass
class Config(maml.Config):
  """MAML's; the distances are large, so steps are small."""

  inner_lr: float = 0.01


def run(config: Config, context: Context) -> dict:
  """MAML from each task's own start."""
  embed = task.model(config, None)
  model = task.model(config, config.ways)
  loss = fmeta.supervised(model, fmeta.softmax_cross_entropy)
  inner = maml.sgd_inner(config)(loss)
  start = fewshot.prototype_start(body_alone(embed), config.ways)
  adapted = fmeta.episode_loss(inner, loss, config.inner_steps)
  alone = measure.by_support(config, config.ways)

  def predict(model):
    answer = fmeta.predict_episodes(inner, model, config.test_steps)
    return fewshot.predict_from(start, answer)

  by_step = fewshot.predict_by_step(inner, model, config.curve_steps)
  method = task.Method(
    task.meta_learner(config, context, fewshot.starting_from(start, adapted)),
    task.start(config, None),
    predict(model),
    predict(alone),
    train_ways=config.ways,
    by_step=fewshot.predict_from(start, by_step),
  )
  return task.run(config, context, method)


def body_alone(embed: Forward) -> Forward:
  """The embedding of parameters that have a head beside the body."""

  def run(params, model_state, batch, rng):
    return embed({'body': params['body']}, model_state, batch, rng)

  return run
