"""BOIL on Omniglot: MAML whose inner loop moves the body and not the head.

  python -m experiments.run --config=experiments/fewshot/omniglot/boil.py

Everything is `maml` but for one line, which is the paper (Oh et al. 2021,
https://arxiv.org/abs/2008.08882; they report other data sets). Measured:
experiments/README.md.
"""

import dataclasses

import fmeta
from experiments.fewshot.omniglot import maml, task
from fmeta.workdir import Context

SMALL = maml.SMALL


@dataclasses.dataclass
class Config(maml.Config):
  """MAML's."""


def run(config: Config, context: Context) -> dict:
  """MAML with the head held still in the inner loop."""
  inner = maml.sgd_inner(config, fmeta.select('body/.*'))
  return task.run(config, context, maml.method(config, context, inner))
