"""A relation network on Omniglot: how to compare is learned, too.

  python -m experiments.run --config=experiments/fewshot/omniglot/relation.py

Everything is `protonet` but for the head, its loss and the ways (Sung et al.
2018, https://arxiv.org/abs/1711.06025: 99.6 +- 0.2 % at 5 ways, 1 shot with 19
queries a class; here the embedding has no map over space). Measured:
experiments/README.md.
"""

import dataclasses

import jax

from experiments.fewshot.omniglot import protonet, task
from fmeta import fewshot
from fmeta.workdir import Context

SMALL = {**protonet.SMALL, 'train_ways': 5}


@dataclasses.dataclass
class Config(protonet.Config):
  """A head's."""

  train_ways: int = 5
  meta_batch: int = 8
  hidden: int = 64  # 8 in the paper, on top of two convolutions


def run(config: Config, context: Context) -> dict:
  """Trains embedding and comparison, then tests three ways."""
  key = jax.random.fold_in(jax.random.key(config.seed.init), 1)
  hyper = fewshot.relation_init(key, config.filters, config.hidden)
  method = protonet.method(
    config,
    context,
    fewshot.Learned(fewshot.relation),
    hyper=hyper,
    criterion=fewshot.relation_error,
  )
  return task.run(config, context, method)
