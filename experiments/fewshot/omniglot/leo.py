"""LEO on Omniglot: latents adapt, a head is decoded from them.

  python -m experiments.run --config=experiments/fewshot/omniglot/leo.py

Rusu et al. 2019 (https://arxiv.org/abs/1807.05960), whose embeddings are
pre-trained and fixed; here Conv4 is trained with the rest, at `task`'s outer
rate. Their gradients are clipped at a norm of 0.1, and so are ours; their
dropout and their weight decay of 1e-8 are left out. They report other data
sets. Measured: experiments/README.md.
"""

import dataclasses

import jax

from experiments.fewshot.omniglot import measure, task
from experiments.fewshot.omniglot.proto_maml import body_alone
from fmeta import fewshot, optim
from fmeta.workdir import Context

SMALL = {**task.SMALL, 'latents': 4, 'latent_steps': 2, 'head_steps': 1}


@dataclasses.dataclass
class Config(task.Task):
  """The task's fields and LEO's; sizes and steps are the authors'."""

  meta_batch: int = 12
  latents: int = 64
  latent_steps: int = 5
  head_steps: int = 5
  clip_norm: float = 0.1
  kl: float = 1e-3  # weight of the latents' divergence


def run(config: Config, context: Context) -> dict:
  """Meta-trains, then tests three ways."""
  embed = body_alone(task.model(config, None))
  alone = body_alone(measure.by_support(config, None))
  steps = {
    'latent_steps': config.latent_steps,
    'head_steps': config.head_steps,
  }
  loss = fewshot.leo_loss(embed, config.ways, kl=config.kl, **steps)
  key = jax.random.fold_in(jax.random.key(config.seed.init), 1)
  params = fewshot.leo_init(key, config.filters, config.latents)
  params['model'] |= task.start(config, None)
  optimizer = optim.adamw(
    task.outer_rate(config), weight_decay=0.0, clip_norm=config.clip_norm
  )
  method = task.Method(
    task.meta_learner(config, context, loss, optimizer),
    params,
    fewshot.predict_leo(embed, config.ways, **steps),
    fewshot.predict_leo(alone, config.ways, **steps),
    train_ways=config.ways,
  )
  return task.run(config, context, method)
