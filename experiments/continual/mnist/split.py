"""Split MNIST: five tasks of two digits each, in three scenarios.

  python -m experiments.run --config=experiments/continual/mnist/split.py \\
    --config.scenario=class

Protocol of van de Ven & Tolias 2018 (https://arxiv.org/abs/1809.10635): 2 x
400 ReLU units, Adam 1e-3, 2,000 iterations of 128 images a task. Published
average accuracy task / domain / class over 20 seeds (its Table 3): none 85.15
/ 57.33 / 19.90, SI 99.14 / 63.77 / 20.04, LwF 99.60 / 71.02 / 24.17, joint
99.64 / 98.41 / 97.93; EWC with its strength tuned again 98.64 / 63.95 / 20.01
(van de Ven & Tolias 2019, https://arxiv.org/abs/1904.07734). Measured:
experiments/README.md.
"""

import dataclasses

from experiments.continual import settings, show, table
from experiments.continual.mnist import protocol
from fmeta.workdir import Context

SMALL = settings.SMALL
PUBLISHED = {
  'task': {
    'none': 0.8515,
    'joint': 0.9964,
    'ewc': 0.9864,
    'si': 0.9914,
    'lwf': 0.9960,
  },
  'domain': {
    'none': 0.5733,
    'joint': 0.9841,
    'ewc': 0.6395,
    'si': 0.6377,
    'lwf': 0.7102,
  },
  'class': {
    'none': 0.1990,
    'joint': 0.9793,
    'ewc': 0.2001,
    'si': 0.2004,
    'lwf': 0.2417,
  },
}


@dataclasses.dataclass
class Config(settings.Config):
  """The defaults of `settings.Config` are this protocol's."""


def run(config: Config, context: Context) -> dict:
  """All rows and seeds, a table and a picture."""
  settings.check(config)
  made = table.Table(
    config,
    context,
    protocol.load(context, config.train_examples, config.test_examples),
    1 / 6,
    protocol.bench_of(
      lambda splits: protocol.split_tasks(splits, config.scenario),
      config.scenario,
      config.sizes,
    ),
  )
  same = settings.as_published(config)
  published = PUBLISHED[config.scenario] if same else {}
  return show.run(made, 'Split MNIST', published, 'split_mnist.png')
