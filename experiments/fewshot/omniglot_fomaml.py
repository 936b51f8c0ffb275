"""First-order MAML on Omniglot: the inner gradient is a constant.

  python -m experiments.run --config=experiments/fewshot/omniglot_fomaml.py

Everything is `omniglot_maml` but for one line (Finn et al. 2017, section 5.2;
Nichol et al. 2018, https://arxiv.org/abs/1803.02999, Table 2: 98.3 +- 0.5 % at
5 ways, 1 shot, transductive, against 98.7 for MAML). Measured:
experiments/README.md.
"""

import dataclasses

from experiments.fewshot import omniglot_maml
from fmeta.workdir import Context

SMALL = omniglot_maml.SMALL


@dataclasses.dataclass
class Config(omniglot_maml.Config):
  """MAML's, first order."""

  first_order: bool = True


def run(config: Config, context: Context) -> dict:
  """MAML without second derivatives."""
  return omniglot_maml.run(config, context)
