"""CAVIA on sinusoids: the inner loop moves five inputs and no weight.

  python -m experiments.run --config=experiments/fewshot/sinusoid_cavia.py

Tasks, network and outer loop are those of `sinusoid_maml`; the network reads
the task's context parameters beside x, they are zero at the start of every
task, and one inner step of rate 1 moves them (Zintgraf et al. 2019,
https://arxiv.org/abs/1810.03642). Expected: below MAML's error
after one step. Measured: experiments/README.md.
"""

import dataclasses

import fmeta
from experiments.fewshot import sinusoid_maml
from fmeta import fewshot, optim
from fmeta.models import forward
from fmeta.models.mlp import Mlp
from fmeta.workdir import Context

SMALL = sinusoid_maml.SMALL


@dataclasses.dataclass
class Config(sinusoid_maml.Config):
  """MAML's fields and CAVIA's."""

  inner_lr: float = 1.0
  context_size: int = 5


def run(config: Config, context: Context) -> dict:
  """Meta-trains, then measures the error after each number of steps."""
  model = Mlp((40, 40), 1)
  reads = fewshot.with_context(forward(model, ('x',)))
  loss = fmeta.supervised(reads, fmeta.squared_error)
  how = fmeta.first_order() if config.first_order else fmeta.gradients.plain
  inner = fmeta.finetune(
    loss,
    optim.sgd(config.inner_lr),
    tuning=fmeta.select('context/.*'),
    value_and_grad=how,
  )
  begin = fewshot.context_start(config.context_size)
  adapted = fmeta.episode_loss(inner, loss, config.inner_steps)

  def predict_after(steps):
    predict = fmeta.predict_episodes(inner, reads, steps)
    return fewshot.predict_from(begin, predict)

  return sinusoid_maml.train_and_test(
    config,
    context,
    fewshot.starting_from(begin, adapted),
    sinusoid_maml.start(config, model, 1 + config.context_size),
    predict_after,
  )
