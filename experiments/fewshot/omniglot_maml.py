"""MAML on Omniglot: five characters from one example each.

  python -m experiments.run --config=experiments/fewshot/omniglot_maml.py

The protocol of Finn et al. 2017 (https://arxiv.org/abs/1703.03400, section 5.2
and their code), see `omniglot_task`: four stride-2 convolutions of 64 filters,
statistics of the batch in every norm; meta-batch 32, inner SGD 0.4, one step,
outer Adam 1e-3. The paper: 98.7 +- 0.4 % after up to 60,000 iterations;
measured: experiments/README.md.
"""

import dataclasses

import jax

import fmeta
from experiments.fewshot import omniglot_task
from fmeta import fewshot, optim
from fmeta.models import IMAGE, Conv4, forward
from fmeta.workdir import Context

SMALL = omniglot_task.SMALL


@dataclasses.dataclass
class Config(omniglot_task.Task):
  """The task's fields and MAML's; defaults are the paper's."""

  inner_lr: float = 0.4
  inner_steps: int = 1
  first_order: bool = False
  chunk: int = 0  # tasks at a time, 0: all
  test_steps: int = 3


def method(config: Config, tuning: fmeta.Tuning) -> omniglot_task.Method:
  """MAML with `tuning` in the inner loop."""
  model = forward(Conv4(config.ways, config.filters), IMAGE)
  loss = fmeta.supervised(model, fmeta.softmax_cross_entropy)
  how = fmeta.first_order() if config.first_order else fmeta.gradients.plain
  inner = fmeta.finetune(
    loss, optim.sgd(config.inner_lr), tuning=tuning, value_and_grad=how
  )
  over = fmeta.in_chunks(config.chunk) if config.chunk else jax.vmap
  meta_loss = fmeta.episode_loss(inner, loss, config.inner_steps, over=over)
  alone = omniglot_task.by_support(config, config.ways)
  return omniglot_task.Method(
    fmeta.finetune(meta_loss, optim.adam(config.outer_lr)),
    omniglot_task.start(config, config.ways),
    fmeta.predict_episodes(inner, model, config.test_steps),
    fmeta.predict_episodes(inner, alone, config.test_steps),
    train_ways=config.ways,
    by_step=fewshot.predict_by_step(inner, model, config.curve_steps),
  )


def run(
  config: Config, context: Context, tuning: fmeta.Tuning | None = None
) -> dict:
  """Meta-trains, then tests three ways; `tuning` is the inner loop's."""
  return omniglot_task.run(
    config, context, method(config, tuning or fmeta.full())
  )
