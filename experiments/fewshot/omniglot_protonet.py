"""A prototypical network on Omniglot: five characters, one example each.

  python -m experiments.run --config=experiments/fewshot/omniglot_protonet.py

Snell et al. 2017 (https://arxiv.org/abs/1703.05175, section 3.1): episodes of
60 ways with as many shots as in testing and 5 queries, one per step, Adam
1e-3 (they halve it every 2,000 episodes; here it is constant); 98.8 % at 5
ways, 1 shot. Network, splits and testing are those of `omniglot_task`, so the
numbers are paired with `omniglot_maml`'s: their network pools where this one
has strides. Measured: experiments/README.md.
"""

import dataclasses

import fmeta
from experiments.fewshot import omniglot_task
from fmeta import fewshot, optim
from fmeta.models import IMAGE, Conv4, forward
from fmeta.workdir import Context

SMALL = {**omniglot_task.SMALL, 'train_ways': 10, 'queries': 1}


@dataclasses.dataclass
class Config(omniglot_task.Task):
  """The task's fields; defaults are the paper's."""

  train_ways: int = 60
  queries: int = 5
  meta_batch: int = 1


def run(config: Config, context: Context) -> dict:
  """Trains the embedding, then tests three ways."""
  embed = forward(Conv4(None, config.filters), IMAGE)
  alone = omniglot_task.by_support(config, None)
  head = fewshot.prototypes
  loss = fewshot.head_loss(head, embed, config.train_ways)
  method = omniglot_task.Method(
    fmeta.finetune(loss, optim.adam(config.outer_lr)),
    omniglot_task.start(config, None),
    fewshot.predict_head(head, embed, config.ways),
    fewshot.predict_head(head, alone, config.ways),
    config.train_ways,
  )
  return omniglot_task.run(config, context, method)
