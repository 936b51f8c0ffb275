"""A matching network on Omniglot: attention over the support set.

  python -m experiments.run --config=experiments/fewshot/omniglot/matching.py

Everything is `protonet` but for the head, the ways, which are those of the
test, and eight episodes a step (Vinyals et al. 2016,
https://arxiv.org/abs/1606.04080, without full context embeddings: 98.1 % at 5
ways, 1 shot, Table 1; they do not scale the cosines). Measured:
experiments/README.md.
"""

import dataclasses

from experiments.fewshot.omniglot import protonet, task
from fmeta import fewshot
from fmeta.workdir import Context

SMALL = {**protonet.SMALL, 'train_ways': 5}


@dataclasses.dataclass
class Config(protonet.Config):
  """A head's; `scale` multiplies the cosines."""

  train_ways: int = 0
  meta_batch: int = 8
  scale: float = 10.0


def run(config: Config, context: Context) -> dict:
  """Trains the embedding, then tests three ways."""
  head = fewshot.matching(config.scale)
  method = protonet.method(config, context, head)
  return task.run(config, context, method)
