"""A relation network on Omniglot: how to compare is learned, too.

  python -m experiments.run --config=experiments/fewshot/omniglot/relation.py

Everything is `protonet` but for the head, its loss, the ways, which are those
of the test, and eight episodes a step (Sung et al. 2018,
https://arxiv.org/abs/1711.06025: 99.6 +- 0.2 % at 5 ways, 1 shot with 19
queries a class; here the embedding has no map over space). A class is the sum
of its support, so a net knows the shots it was trained with and no others; and
its answers are scores of pairs, not probabilities of classes, so there is no
calibration error. Measured: experiments/README.md.
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

  train_ways: int = 0
  meta_batch: int = 8
  curve_shots: tuple[int, ...] = ()
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
  return task.run(config, context, method._replace(probabilities=False))
