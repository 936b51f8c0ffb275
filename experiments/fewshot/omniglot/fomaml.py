"""First-order MAML on Omniglot: the inner gradient is a constant.

  python -m experiments.run --config=experiments/fewshot/omniglot/fomaml.py

Everything is `maml` but for one argument (Finn et al. 2017, section 5.2;
Nichol et al. 2018, https://arxiv.org/abs/1803.02999, Table 2: 98.3 +- 0.5 % at
5 ways, 1 shot, transductive, against 98.7 for MAML). Measured:
experiments/README.md.
"""

import dataclasses

from experiments.fewshot.omniglot import maml, task
from fmeta import through
from fmeta.workdir import Context

SMALL = maml.SMALL


@dataclasses.dataclass
class Config(maml.Config):
  """MAML's."""


def run(config: Config, context: Context) -> dict:
  """MAML without second derivatives."""
  inner = maml.sgd_inner(config)
  method = maml.method(config, context, inner, how=through.first_order)
  return task.run(config, context, method)
