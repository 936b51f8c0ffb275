"""A T-Net on Omniglot: layers that only the outer loop moves.

  python -m experiments.run --config=experiments/fewshot/omniglot/t_net.py

`maml` with a linear map after every layer, an identity at the start; the inner
loop holds them still, so that what they learn is its metric (Lee & Choi 2018,
https://arxiv.org/abs/1801.05558: T-Nets; Flennerhag et al. 2020,
https://arxiv.org/abs/1909.00025: WarpGrad). Measured: experiments/README.md.
"""

import dataclasses

import fmeta
from experiments.fewshot.omniglot import maml, task
from fmeta import fewshot
from fmeta.workdir import Context

SMALL = maml.SMALL
KERNELS = ('.*/kernel',)
MOVING = '.*/(kernel|bias|scale)'


@dataclasses.dataclass
class Config(maml.Config):
  """MAML's."""


def run(config: Config, context: Context) -> dict:
  """MAML of the warped model; the warps are outer parameters alone."""
  params = fewshot.warp_init(task.start(config, config.ways), KERNELS)
  inner = maml.sgd_inner(config, fmeta.select(MOVING))
  method = maml.method(config, context, inner, params, model_of=fewshot.warped)
  return task.run(config, context, method)
