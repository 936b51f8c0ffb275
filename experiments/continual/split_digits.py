"""Split digits: five tasks of two digits each, in three scenarios.

  python -m experiments.run --config=experiments/continual/split_digits.py

scikit-learn's 8x8 digits as 0/1, 2/3, 4/5, 6/7, 8/9; an MLP learns one pair
after the other. No download and seconds a stream: the stream of
`mnist/split.py`, where methods are tried first. The scenario says what is
asked at test time (van de Ven & Tolias 2019,
https://arxiv.org/abs/1904.07734): 'task', which of the two digits of a known
pair; 'domain', whether the digit is odd; 'class', which of those so far.

Published for split MNIST, average accuracy task / domain / class: none 85.15 /
57.33 / 19.90, joint 99.64 / 98.41 / 97.93 (van de Ven & Tolias 2018,
https://arxiv.org/abs/1809.10635, table 3), EWC with a tuned strength 98.64 /
63.95 / 20.01 (2019). Digits is a smaller problem: the order of the rows is
expected, not the numbers. Measured: experiments/README.md.
"""

import dataclasses

from experiments.continual import images, settings, show, table
from experiments.continual.mnist import protocol
from fmeta.datasets import digits
from fmeta.workdir import Context


@dataclasses.dataclass
class Config(settings.Config):
  """What one would sweep; all of it is untuned."""

  scenario: str = 'task'
  methods: tuple[str, ...] = ('none', 'joint', 'ewc', 'er', 'er_matched')
  sizes: tuple[int, ...] = (100, 100)
  iterations: int = 100
  batch_size: int = 32
  memory_size: int = 100
  fisher_examples: int = 200
  strengths: tuple[str, ...] = ('ewc:1000',)
  steps_per_dispatch: int = 50


SMALL = {
  'seeds': 1,
  'methods': ('none', 'ewc', 'er'),
  'sizes': (16,),
  'iterations': 6,
  'fisher_examples': 8,
  'memory_size': 40,
}


def run(config: Config, context: Context) -> dict:
  """All rows and seeds, a table and a picture."""
  settings.check(config)
  splits = {
    name: images.as_bytes(columns) for name, columns in digits.load().items()
  }
  made = table.Table(
    config,
    context,
    splits,
    1 / 6,
    protocol.bench_of(
      lambda splits: protocol.split_tasks(splits, config.scenario),
      config.scenario,
      config.sizes,
    ),
  )
  return show.run(made, 'Split digits', {}, 'split_digits.png')
