"""R2D2 on Omniglot: ridge regression is the head.

  python -m experiments.run --config=experiments/fewshot/omniglot/r2d2.py

Everything is `protonet` but for the head, which begins with the authors' scale
of ten (Bertinetto et al. 2019, https://arxiv.org/abs/1805.08136; their code has
Adam at 5e-3, here it is `task`'s 1e-3). The ridge's strength is learned and
counts against a sum over rows: with fewer ways in testing than in training it
weighs more. Measured: experiments/README.md.
"""

import dataclasses

from experiments.fewshot.omniglot import protonet, task
from fmeta import fewshot
from fmeta.workdir import Context

SMALL = {**protonet.SMALL, 'train_ways': 5}


@dataclasses.dataclass
class Config(protonet.Config):
  """A head's."""

  scale: float = 10.0


def run(config: Config, context: Context) -> dict:
  """Trains the embedding and the ridge, then tests three ways."""
  head = fewshot.learned_ridge()
  method = protonet.method(
    config, context, head, hyper=fewshot.ridge_init(scale=config.scale)
  )
  return task.run(config, context, method)
