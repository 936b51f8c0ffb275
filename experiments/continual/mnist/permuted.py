"""Permuted MNIST: ten tasks, each with its own order of the pixels.

  python -m experiments.run --config=experiments/continual/mnist/permuted.py

Protocol of van de Ven & Tolias 2018 (https://arxiv.org/abs/1809.10635): 2 x
1,000 ReLU units, Adam 1e-4, 5,000 iterations of 256 images a task; they pad
images to 32 x 32, here they stay 28 x 28. Published average accuracy of the
domain scenario: none 78.51, EWC 94.31, SI 95.33, joint 97.59. Measured:
experiments/README.md.
"""

import dataclasses

from experiments.continual import settings, show, table
from experiments.continual.mnist import protocol
from fmeta.workdir import Context

PUBLISHED = {
  'domain': {'none': 0.7851, 'joint': 0.9759, 'ewc': 0.9431, 'si': 0.9533}
}


@dataclasses.dataclass
class Config(settings.Config):
  """What one would sweep."""

  sizes: tuple[int, ...] = (1000, 1000)
  iterations: int = 5000
  batch_size: int = 256
  rate: float = 1e-4
  memory_size: int = 1000
  tasks: int = 10


SMALL = {**settings.SMALL, 'tasks': 3}


def run(config: Config, context: Context) -> dict:
  """All rows and seeds, a table and a picture."""
  settings.check(config)
  made = table.Table(
    config,
    context,
    protocol.load(context, config.train_examples, config.test_examples),
    1 / 6,
    protocol.bench_of(
      lambda splits: protocol.permuted_tasks(
        splits, config.scenario, config.tasks, config.seed.data
      ),
      config.scenario,
      config.sizes,
    ),
  )
  same = settings.as_published(config)
  published = PUBLISHED.get(config.scenario, {}) if same else {}
  return show.run(made, 'Permuted MNIST', published, 'permuted_mnist.png')
