"""Streams of MNIST, as van de Ven & Tolias 2018 ask them.

(https://arxiv.org/abs/1809.10635.) ReLU networks trained with Adam at a
constant rate, a fixed number of iterations per task, every test image after
every task. Pixels are bytes on the device, in the memory too.
"""

from collections.abc import Callable, Sequence

import numpy as np

from experiments.continual.bench import Bench, Labelled, Scenario
from experiments.continual.images import as_bytes, scaled
from fmeta import data, models, stream
from fmeta.datasets import mnist
from fmeta.models import Mlp
from fmeta.workdir import Context

Splits = dict[str, data.Columns]


def load(context: Context, train: int, test: int) -> Splits:
  """The first images of each split, as bytes."""
  splits, counts = mnist.load(context.data_dir), {'train': train, 'test': test}
  return {
    name: as_bytes(data.take(splits[name], slice(count)))
    for name, count in counts.items()
  }


def split_tasks(
  splits: dict[str, data.Columns], scenario: Scenario
) -> Labelled:
  """Five tasks of two digits each: 0/1, 2/3, 4/5, 6/7, 8/9."""
  pairs = {f'{a}/{a + 1}': (a, a + 1) for a in range(0, 10, 2)}
  made = {
    name: stream.by_classes(columns, pairs, relabel=scenario == 'domain')
    for name, columns in splits.items()
  }
  allowed = stream.class_mask(pairs, 10)
  if scenario == 'domain':
    allowed = np.ones((len(pairs), 2), bool)
  return Labelled(made['train'], made['test'], allowed)


def permuted_tasks(
  splits: dict[str, data.Columns], scenario: Scenario, tasks: int, seed: int
) -> Labelled:
  """Tasks of ten digits whose pixels lie in another order each."""
  made = {'train': [], 'test': []}
  for task in range(tasks):
    for name, columns in splits.items():
      columns = stream.permuted(columns, seed * tasks + task)
      if scenario != 'domain':
        columns = {**columns, 'label': columns['label'] + 10 * task}
      made[name].append(stream.Task(f'order {task}', columns))
  allowed = np.ones((tasks, 10), bool)
  if scenario != 'domain':
    allowed = np.repeat(np.eye(tasks, dtype=bool), 10, axis=1)
  return Labelled(made['train'], made['test'], allowed)


def bench_of(
  tasks_of: Callable[[Splits], Labelled],
  scenario: Scenario,
  sizes: Sequence[int],
) -> Callable[[Splits, int], Bench]:
  """A stream of images and its network, of any splits, in one order."""

  def make(splits, order):
    del order
    tasks = tasks_of(splits)
    module = Mlp(tuple(sizes), tasks.allowed.shape[1])
    shape = tasks.train[0].columns['image'].shape[1:]
    one = {'image': np.zeros((1, *shape), np.float32)}
    return Bench(
      tasks,
      scenario,
      scaled(models.forward(module, models.IMAGE)),
      lambda key: models.init(module, key, one, models.IMAGE)[0],
    )

  return make
