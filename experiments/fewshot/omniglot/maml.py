"""MAML on Omniglot: five characters from one example each.

  python -m experiments.run --config=experiments/fewshot/omniglot/maml.py

The protocol of Finn et al. 2017 (https://arxiv.org/abs/1703.03400, section 5.2
and their code), see `task`: four stride-2 convolutions of 64 filters,
statistics of the batch in every norm; meta-batch 32, inner SGD 0.4, one step,
outer Adam 1e-3. For 20 ways they have a meta-batch of 16, rate 0.1 and five
steps. The paper: 98.7 +- 0.4 % after up to 60,000 iterations; measured:
experiments/README.md.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import fmeta
from experiments.fewshot.omniglot import measure, task
from fmeta import fewshot, optim, through
from fmeta.workdir import Context

SMALL = task.SMALL
# `loss of the model -> inner learner`, or a function of hyper-parameters to it
MakeInner = Callable[[fmeta.LossFn], Any]


@dataclasses.dataclass
class Config(task.Task):
  """The task's fields and MAML's; defaults are the paper's."""

  inner_lr: float = 0.4
  inner_steps: int = 1  # in training
  test_steps: int = 3  # in testing


def method(
  config: Config,
  context: Context,
  make_inner: MakeInner,
  params: Any = None,
  *,
  model_of: measure.ModelOf = measure.same,
  how: through.Through = through.plain,
) -> task.Method:
  """An inner loop, differentiated.

  Args:
    config: MAML's.
    context: of the job.
    make_inner: `loss -> inner learner`, or `loss -> (hyper -> learner)`.
    params: where outer parameters start; a fresh Conv4 by default.
    model_of: wraps Conv4.
    how: the inner loop is differentiated.
  """
  model = task.model(config, config.ways, model_of)
  alone = measure.by_support(config, config.ways, model_of)
  loss = fmeta.supervised(model, fmeta.softmax_cross_entropy)
  inner = make_inner(loss)
  meta_loss = fmeta.episode_loss(inner, loss, config.inner_steps, through=how)
  return task.Method(
    task.meta_learner(config, context, meta_loss),
    task.start(config, config.ways) if params is None else params,
    fmeta.predict_episodes(inner, model, config.test_steps),
    fmeta.predict_episodes(inner, alone, config.test_steps),
    train_ways=config.ways,
    by_step=fewshot.predict_by_step(inner, model, config.curve_steps),
    per_step=measure.by_training(
      config, config.ways, inner, config.test_steps, model_of
    ),
  )


def sgd_inner(config: Config, tuning: fmeta.Tuning | None = None) -> MakeInner:
  """Gradient descent on what `tuning` moves, by default everything."""

  def make(loss):
    return fmeta.finetune(loss, optim.sgd(config.inner_lr), tuning=tuning)

  return make


def run(config: Config, context: Context) -> dict:
  """Meta-trains, then tests three ways."""
  return task.run(config, context, method(config, context, sgd_inner(config)))
