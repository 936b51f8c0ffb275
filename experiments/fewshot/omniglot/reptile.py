"""Reptile on Omniglot: towards where plain training goes.

  python -m experiments.run --config=experiments/fewshot/omniglot/reptile.py

Nichol et al. 2018 (https://arxiv.org/abs/1803.02999, section 6 and appendix):
ten examples a class to train with, inner Adam 1e-3 without momentum, five
steps of ten images each; the outer step falls from 1 to 0 over the run; tested
after fifty steps on the support set. 97.68 +- 0.04 % at 5 ways, 1 shot,
transductive, after 100,000 iterations of 5 tasks. In the authors' code Adam's
second moments live on from task to task; here every task begins without, as an
inner loop is a function of its start, so its first step is the sign of the
gradient. Measured: experiments/README.md.
"""

import dataclasses

import optax

import fmeta
from experiments.fewshot.omniglot import measure, task
from fmeta import fewshot, optim
from fmeta.workdir import Context

SMALL = {**task.SMALL, 'train_shots': 2, 'test_steps': 5}


@dataclasses.dataclass
class Config(task.Task):
  """The task's fields and Reptile's; defaults are the authors'."""

  meta_batch: int = 5
  outer_lr: float = 1.0
  inner_lr: float = 1e-3
  inner_steps: int = 5
  inner_batch: int = 10
  train_shots: int = 10
  test_steps: int = 50
  curve_steps: int = 50


def check(config: Config) -> None:
  """Refuses what would do nothing, or teach classes unevenly."""
  if config.inner_batch % config.ways:
    raise fmeta.UsageError(
      f'inner batches of {config.inner_batch} do not hold {config.ways} '
      'classes evenly; give a multiple of the ways'
    )
  if config.final_lr != 1 or config.queries:
    raise fmeta.UsageError(
      'the outer rate of Reptile falls to 0 and it has no queries in training; '
      'leave final_lr and queries'
    )


def run(config: Config, context: Context) -> dict:
  """Meta-trains, then tests three ways."""
  check(config)
  model = task.model(config, config.ways)
  alone = measure.by_support(config, config.ways)
  loss = fmeta.supervised(model, fmeta.softmax_cross_entropy)
  adam = optax.scale_by_adam(b1=0.0, b2=0.999)
  inner = fmeta.finetune(loss, optim.with_rates(adam, config.inner_lr))
  meta_loss = fmeta.reptile_loss(
    inner, config.inner_steps, batch_size=config.inner_batch
  )
  rate = optim.warmup_linear(config.outer_lr, config.iterations, warmup=0.0)
  method = task.Method(
    task.meta_learner(config, context, meta_loss, optim.sgd(rate)),
    task.start(config, config.ways),
    fmeta.predict_episodes(inner, model, config.test_steps),
    fmeta.predict_episodes(inner, alone, config.test_steps),
    train_ways=config.ways,
    train_shots=config.train_shots,
    by_step=fewshot.predict_by_step(inner, model, config.curve_steps),
  )
  return task.run(config, context, method)
