"""The same steps by Avalanche and by a plain torch loop.

Each function gives `run(steps)`. Imported in the peers' processes only.
"""

import importlib.util
import pathlib
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

Run = Callable[[int], None]


def network(params: Any) -> nn.Sequential:
  """The MLP with fmeta's weights."""
  layers = [*params['body'].values(), params['head']]
  made = []
  for layer in layers:
    dense = nn.Linear(*layer['kernel'].shape)
    with torch.no_grad():
      dense.weight.copy_(torch.tensor(np.array(layer['kernel'].T)))
      dense.bias.copy_(torch.tensor(np.array(layer['bias'])))
    made += [dense, nn.ReLU()]
  return nn.Sequential(*made[:-1])


def squared_gradients(
  model: nn.Module, x: torch.Tensor, label: torch.Tensor
) -> list[torch.Tensor]:
  """An importance: only its shape matters to the time of a step."""
  nn.functional.cross_entropy(model(x), label).backward()
  found = [p.grad.detach() ** 2 for p in model.parameters()]
  model.zero_grad()
  return found


class Reservoir:
  """Algorithm R over tensors, a batch at a time."""

  def __init__(self, size: int, x: torch.Tensor, label: torch.Tensor):
    self.x = torch.zeros((size, *x.shape[1:]))
    self.label = torch.zeros(size, dtype=label.dtype)
    self.size, self.seen = size, 0

  def add(self, x: torch.Tensor, label: torch.Tensor) -> None:
    """Each row with its chance."""
    number = self.seen + torch.arange(len(label))
    drawn = (torch.rand(len(label)) * (number + 1)).long()
    slot = torch.where(number < self.size, number, drawn)
    kept = slot < self.size
    self.x[slot[kept]], self.label[slot[kept]] = x[kept], label[kept]
    self.seen += len(label)

  def sample(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows without replacement, fewer while there are fewer."""
    chosen = torch.randperm(min(self.seen, self.size))[:count]
    return self.x[chosen], self.label[chosen]


def plain(row: str, config: Any, params: Any, columns: dict) -> Run:
  """A loop as a careful user writes it, with Adam's fused kernel."""
  model = network(params)
  x = torch.from_numpy(columns['x'])
  label = torch.from_numpy(columns['label']).long()
  optimizer = torch.optim.Adam(model.parameters(), config.rate, fused=True)
  size, held = config.batch_size, Reservoir(config.memory_size, x, label)
  anchor = [p.detach().clone() for p in model.parameters()]
  weights = squared_gradients(model, x[:size], label[:size])
  leaves = list(model.parameters())

  def step(rows):
    own = x[rows], label[rows]
    inputs, answers = own
    if row == 'er' and held.seen:
      past = held.sample(size)
      inputs, answers = (
        torch.cat([own[0], past[0]]),
        torch.cat([own[1], past[1]]),
      )
    loss = nn.functional.cross_entropy(model(inputs), answers)
    if row == 'ewc':
      for leaf, old, weight in zip(leaves, anchor, weights, strict=True):
        loss = loss + config.strength / 2 * (weight * (leaf - old) ** 2).sum()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if row == 'er':
      held.add(*own)

  def run(steps):
    order = torch.randperm(len(label))
    for k in range(steps):
      step(order[k * size : (k + 1) * size])

  run.model = model
  return run


def without_operators() -> None:
  """Lets Avalanche import torchvision, of which it wants the data sets.

  Its compiled operators may be built for another torch; then their names
  have to be known all the same.
  """
  try:
    import torchvision  # noqa: F401
  except RuntimeError:
    spec = importlib.util.find_spec('torchvision')
    folder = pathlib.Path(spec.submodule_search_locations[0])
    source = (folder / '_meta_registrations.py').read_text()
    names = re.findall(r'register_meta\("(\w+)"\)', source)
    names += re.findall(r'torchvision::(\w+)', source)
    library = torch.library.Library('torchvision', 'DEF')
    for name in set(names):
      library.define(f'{name}(Tensor x) -> Tensor')
    without_operators.library = library


def avalanche(row: str, config: Any, params: Any, columns: dict) -> Run:
  """Avalanche's own strategies, their work at a task's end left out."""
  without_operators()
  import warnings

  warnings.simplefilter('ignore')
  from avalanche.training.supervised import EWC, Naive, Replay

  model = network(params)
  common = {
    'model': model,
    'optimizer': torch.optim.Adam(model.parameters(), config.rate),
    'criterion': nn.CrossEntropyLoss(),
    'train_mb_size': config.batch_size,
    'train_epochs': 1,
    'evaluator': None,
  }
  strategy = {
    'naive': lambda: Naive(**common),
    'ewc': lambda: EWC(ewc_lambda=config.strength, **common),
    # As many rows of the memory as new ones.
    'er': lambda: Replay(mem_size=config.memory_size, **common),
  }[row]()
  first, *tasks = _experiences(config, columns, 2)
  strategy.train(first)  # A task before: an importance, a filled memory.
  for plugin in strategy.plugins:
    plugin.after_training_exp = lambda *args, **kwargs: None
  stream = {config.steps: tasks[0]}

  def run(steps):
    if steps not in stream:
      fewer = {k: v[: steps * config.batch_size] for k, v in columns.items()}
      stream[steps] = _experiences(config, fewer, 2)[1]
    strategy.train(stream[steps])

  run.model = model
  return run


def _experiences(config: Any, columns: dict, count: int) -> list:
  from avalanche.benchmarks import benchmark_from_datasets
  from avalanche.benchmarks.utils import (
    _make_taskaware_classification_dataset as dataset_of,
  )
  from torch.utils.data import TensorDataset

  def dataset():
    label = torch.from_numpy(columns['label']).long()
    made = TensorDataset(torch.from_numpy(columns['x']), label)
    made.targets = label.tolist()
    return dataset_of(made, task_labels=0)

  made = benchmark_from_datasets(train=[dataset() for _ in range(count)])
  return list(made.train_stream)


PEERS = {'torch': plain, 'avalanche': avalanche}
