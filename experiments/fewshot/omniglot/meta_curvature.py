"""Meta-curvature on Omniglot: learned matrices turn the inner gradient.

  python -m experiments.run \\
    --config=experiments/fewshot/omniglot/meta_curvature.py

`maml` with a matrix along every axis of a gradient, identities at the start,
learned beside the weights (Park & Oliva 2019,
https://arxiv.org/abs/1902.03356). Measured: experiments/README.md.
"""

import dataclasses

import optax

import fmeta
from experiments.fewshot.omniglot import maml, task
from fmeta import fewshot, optim
from fmeta.workdir import Context

SMALL = maml.SMALL


@dataclasses.dataclass
class Config(maml.Config):
  """MAML's."""


def run(config: Config, context: Context) -> dict:
  """MAML whose outer parameters are the weights and the matrices."""

  def make_inner(loss):
    def inner(matrices):
      turned = fewshot.meta_curvature(matrices)
      return fmeta.finetune(
        loss, optax.chain(turned, optim.sgd(config.inner_lr))
      )

    return inner

  model = task.start(config, config.ways)
  params = {'model': model, 'hyper': fewshot.curvature_init(model)}
  method = maml.method(config, context, make_inner, params)
  return task.run(config, context, method)
