"""ANIL on Omniglot: MAML whose inner loop moves the head alone.

  python -m experiments.run --config=experiments/fewshot/omniglot/anil.py

Everything is `maml` but for one line, which is the paper (Raghu et al. 2020,
https://arxiv.org/abs/1909.09157: 98.0 +- 0.2 % at 5 ways, 1 shot, against 98.7
for MAML). Measured: experiments/README.md.
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
