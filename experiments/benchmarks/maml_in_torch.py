"""Second-order MAML in torch, five ways: what fmeta is held against.

A way is a function `(model, rate, steps) -> run`; `run(episodes)` leaves the
meta-gradient of every moving parameter in its `.grad` and returns the mean
query loss. Inner steps are SGD on the parameters that require a gradient.
Imported only where torch is there.
"""

import importlib
import importlib.util
import pathlib
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch.nn import functional as F

from experiments.benchmarks.torch_models import Episodes

Run = Callable[[Episodes], Any]


def moving(model: torch.nn.Module) -> dict[str, torch.Tensor]:
  """What the loops move, by name, outside any graph."""
  return {
    name: leaf.detach()
    for name, leaf in model.named_parameters()
    if leaf.requires_grad
  }


def one_by_one(episodes: Episodes) -> Iterator[Episodes]:
  """The tasks of a meta-batch."""
  support, label, query, query_label = episodes
  for k in range(len(label)):
    rows = tuple(x[k] for x in support), tuple(x[k] for x in query)
    yield rows[0], label[k], rows[1], query_label[k]


def _task_loss(model, rate: float, steps: int) -> Callable:
  """`(moving, *episode) -> query loss`, in torch.func's functional style."""
  func = torch.func

  def loss(moving, inputs, label):
    return F.cross_entropy(func.functional_call(model, moving, inputs), label)

  def task(moving, support, label, query, query_label):
    for _ in range(steps):
      grads = func.grad(loss)(moving, support, label)
      moving = {k: leaf - rate * grads[k] for k, leaf in moving.items()}
    return loss(moving, query, query_label)

  return task


def _give(model: torch.nn.Module, grads: Mapping[str, torch.Tensor]) -> None:
  for name, leaf in model.named_parameters():
    if name in grads:
      leaf.grad = grads[name]


def func_vmap(model: torch.nn.Module, rate: float, steps: int) -> Run:
  """torch.func, all tasks at once."""
  task = _task_loss(model, rate, steps)

  def total(moving, episodes):
    over_tasks = torch.func.vmap(task, in_dims=(None, 0, 0, 0, 0))
    return over_tasks(moving, *episodes).mean()

  def run(episodes):
    compute = torch.func.grad_and_value(total)
    grads, value = compute(moving(model), episodes)
    _give(model, grads)
    return value

  return run


def func_loop(model: torch.nn.Module, rate: float, steps: int) -> Run:
  """torch.func, one task after the other."""
  task = _task_loss(model, rate, steps)

  def run(episodes):
    start, tasks = moving(model), len(episodes[1])
    sums = {name: torch.zeros_like(leaf) for name, leaf in start.items()}
    total = 0.0
    for episode in one_by_one(episodes):
      grads, value = torch.func.grad_and_value(task)(start, *episode)
      total = total + value / tasks
      for name, grad in grads.items():
        sums[name] += grad / tasks
    _give(model, sums)
    return total

  return run


def _summed(episodes: Episodes, query_loss: Callable) -> Any:
  """Backward through each task's loss; gradients add up in `.grad`."""
  total, tasks = 0.0, len(episodes[1])
  for episode in one_by_one(episodes):
    loss = query_loss(*episode) / tasks
    loss.backward()
    total = total + loss.detach()
  return total


def with_higher(model: torch.nn.Module, rate: float, steps: int) -> Run:
  """higher (Grefenstette et al. 2019), its loop over tasks."""
  import higher

  inner = torch.optim.SGD(model.parameters(), rate)

  def query_loss(support, label, query, query_label):
    context = higher.innerloop_ctx(model, inner, copy_initial_weights=False)
    with context as (fast, inner_step):
      for _ in range(steps):
        inner_step.step(F.cross_entropy(fast(*support), label))
      return F.cross_entropy(fast(*query), query_label)

  return lambda episodes: _summed(episodes, query_loss)


def _learn2learn_maml() -> Any:
  """Their MAML without importing the rest of their package.

  That wants compiled readers of data, which its source (2023) no longer builds
  for Python 3.11, gym and torchvision; none of them takes part in MAML.
  """
  found = importlib.util.find_spec('learn2learn')
  assert found is not None and found.submodule_search_locations
  root = pathlib.Path(found.submodule_search_locations[0])
  for name in ('learn2learn', 'learn2learn.algorithms'):
    shell = types.ModuleType(name)
    shell.__path__ = [str(root.joinpath(*name.split('.')[1:]))]
    sys.modules.setdefault(name, shell)
  return importlib.import_module('learn2learn.algorithms.maml').MAML


def with_learn2learn(model: torch.nn.Module, rate: float, steps: int) -> Run:
  """learn2learn's MAML (Arnold et al. 2020), its loop over tasks."""
  maml = _learn2learn_maml()(model, lr=rate, first_order=False)

  def query_loss(support, label, query, query_label):
    fast = maml.clone()
    for _ in range(steps):
      fast.adapt(F.cross_entropy(fast(*support), label))
    return F.cross_entropy(fast(*query), query_label)

  return lambda episodes: _summed(episodes, query_loss)


def with_torchopt(model: torch.nn.Module, rate: float, steps: int) -> Run:
  """TorchOpt's MetaSGD (Ren et al. 2022), its loop over tasks."""
  import torchopt

  inner = torchopt.MetaSGD(model, lr=rate)

  def query_loss(support, label, query, query_label):
    start = torchopt.extract_state_dict(model, by='reference')
    slots = torchopt.extract_state_dict(inner, by='reference')
    for _ in range(steps):
      inner.step(F.cross_entropy(model(*support), label))
    loss = F.cross_entropy(model(*query), query_label)
    torchopt.recover_state_dict(model, start)
    torchopt.recover_state_dict(inner, slots)
    return loss

  return lambda episodes: _summed(episodes, query_loss)


WAYS: Mapping[str, Callable[..., Run]] = types.MappingProxyType(
  {
    'func_vmap': func_vmap,
    'func_loop': func_loop,
    'higher': with_higher,
    'learn2learn': with_learn2learn,
    'torchopt': with_torchopt,
  }
)
