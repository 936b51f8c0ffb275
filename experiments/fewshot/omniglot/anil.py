"""ANIL on Omniglot: MAML whose inner loop moves the head alone.

  python -m experiments.run --config=experiments/fewshot/omniglot/anil.py

Everything is `maml` but for one line, which is the paper (Raghu et al. 2020,
https://arxiv.org/abs/1909.09157, Table 1: 96.2 +- 0.5 % at 20 ways, 1 shot,
against 93.7 +- 0.7 for their MAML; they have no row of 5 ways). Measured:
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
  """MAML with the body held still in the inner loop."""
  inner = maml.sgd_inner(config, fmeta.select('head/.*'))
  return task.run(config, context, maml.method(config, context, inner))
