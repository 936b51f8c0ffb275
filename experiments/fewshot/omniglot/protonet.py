"""A prototypical network on Omniglot: five characters, one example each.

  python -m experiments.run --config=experiments/fewshot/omniglot/protonet.py

Snell et al. 2017 (https://arxiv.org/abs/1703.05175, section 3.1): episodes of
60 ways with as many shots as in testing and 5 queries, one per step, Adam
1e-3 (they halve it every 2,000 episodes; here it is constant); 98.8 % at 5
ways, 1 shot. Network and splits are those of `task`: their network pools where
this one has strides. Tested with five queries a class, as trained; numbers to
be paired with `maml`'s need `--config.test_queries=1`.
Measured: experiments/README.md.
"""

import dataclasses
from typing import Any

from experiments.fewshot.omniglot import measure, task
from fmeta import fewshot
from fmeta.losses import Criterion, softmax_cross_entropy
from fmeta.workdir import Context

SMALL = {**task.SMALL, 'train_ways': 10, 'queries': 1, 'meta_batch': 1}


@dataclasses.dataclass
class Config(task.Task):
  """The task's fields; defaults are the paper's."""

  train_ways: int = 60  # 0: as in testing
  queries: int = 5
  test_queries: int = 5
  meta_batch: int = 1


def method(
  config: Config,
  context: Context,
  head: fewshot.Head | fewshot.Learned,
  *,
  hyper: Any = None,
  criterion: Criterion = softmax_cross_entropy,
) -> task.Method:
  """An embedding trained under a head in closed form.

  Args:
    config: the task's and the number of ways to train with.
    context: of the job.
    head: what answers.
    hyper: its outer parameters if it is `Learned`.
    criterion: the loss per query.
  """
  embed = task.model(config, None)
  alone = measure.by_support(config, None)
  ways = config.train_ways or config.ways
  loss = fewshot.head_loss(head, embed, ways, criterion)
  model = task.start(config, None)
  return task.Method(
    task.meta_learner(config, context, loss),
    model if hyper is None else {'model': model, 'hyper': hyper},
    fewshot.predict_head(head, embed, config.ways),
    fewshot.predict_head(head, alone, config.ways),
    config.train_ways,
  )


def run(config: Config, context: Context) -> dict:
  """Trains the embedding, then tests three ways."""
  return task.run(config, context, method(config, context, fewshot.prototypes))
