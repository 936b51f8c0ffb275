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

import numpy as np
import torch
from torch.nn import functional as F

from fmeta import tree
from fmeta.pretrained.bert import their_name

# (support inputs, support label, query inputs, query label), each with a
# leading task axis; inputs are tuples of what the model takes.
Episodes = tuple[tuple, torch.Tensor, tuple, torch.Tensor]
# Their name -> (our leaf, how it is laid out there).
Places = dict[str, tuple[Any, Callable]]
Run = Callable[[Episodes], Any]


class Norm(torch.nn.BatchNorm2d):
  """Batch normalisation in elementary operations.

  torch's own has a wrong second derivative under `torch.func.vmap` (2.13, by
  the gradients of all other ways and finite differences).
  """

  def forward(self, input: torch.Tensor) -> torch.Tensor:
    """[B, C, H, W] -> the same, by the statistics of the batch."""
    var, mean = torch.var_mean(input, (0, 2, 3), correction=0, keepdim=True)
    shape = (1, -1, 1, 1)
    scale = self.weight.reshape(shape) * torch.rsqrt(var + self.eps)
    return (input - mean) * scale + self.bias.reshape(shape)


class Conv4(torch.nn.Module):
  """`models.Conv4` with its transductive norm.

  Args:
    ways: outputs of the head.
    filters: of each convolution.
    peer: the name of the way it is for.
  """

  def __init__(self, ways: int, filters: int, peer: str):
    super().__init__()
    norm = Norm if peer == 'func_vmap' else torch.nn.BatchNorm2d
    blocks, channels = [], 1
    for _ in range(4):
      blocks += [
        torch.nn.Conv2d(channels, filters, 3, stride=2, padding=1),
        norm(filters, eps=1e-3, track_running_stats=False),
        torch.nn.ReLU(),
      ]
      channels = filters
    self.body = torch.nn.Sequential(*blocks)
    self.head = torch.nn.Linear(filters, ways)

  def forward(self, image: torch.Tensor) -> torch.Tensor:
    """[B, C, H, W] -> [B, ways]."""
    return self.head(self.body(image).mean((2, 3)))


def turned(image: np.ndarray) -> torch.Tensor:
  """[..., H, W, C] -> [..., C, H, W], turned by 180 degrees.

  A stride-2 window of ours starts at row 0, SAME padding being at the end of
  an even side; torch's padding=1 starts it at row -1. With images and kernels
  turned by 180 degrees both see the same windows at the same cost.
  """
  image = np.moveaxis(image[..., ::-1, ::-1, :], -1, -3)
  return torch.tensor(np.ascontiguousarray(image))


def conv4_places(params: Mapping) -> Places:
  """Their name -> (our leaf, how ours is laid out there)."""
  same, transposed = np.asarray, np.transpose
  head = params['head']
  found: Places = {
    'head.weight': (head['kernel'], transposed),
    'head.bias': (head['bias'], same),
  }
  for k in range(4):
    conv, norm = (params['body'][f'block_{k}'][n] for n in ('conv', 'norm'))
    found[f'body.{3 * k}.weight'] = conv['kernel'], kernel_of
    found[f'body.{3 * k}.bias'] = conv['bias'], same
    found[f'body.{3 * k + 1}.weight'] = norm['scale'], same
    found[f'body.{3 * k + 1}.bias'] = norm['bias'], same
  return found


def kernel_of(kernel: np.ndarray) -> np.ndarray:
  """[H, W, in, out] -> [out, in, H, W], turned by 180 degrees."""
  return np.transpose(np.asarray(kernel)[::-1, ::-1], (3, 2, 0, 1))


class LoraBert(torch.nn.Module):
  """transformers' BERT under peft's LoRA, mean pooling, a head."""

  def __init__(self, folder: Any, layers: list[int], rank: int, ways: int):
    super().__init__()
    import peft
    import transformers

    body: Any = transformers.BertModel.from_pretrained(
      folder,
      add_pooling_layer=False,
      hidden_dropout_prob=0.0,
      attention_probs_dropout_prob=0.0,
      # torch's fused attention has no second derivative on CPU.
      attn_implementation='eager',
    )
    self.head = torch.nn.Linear(body.config.hidden_size, ways)
    config = peft.LoraConfig(
      r=rank,
      lora_alpha=16,
      target_modules=['query', 'key', 'value', 'dense'],
      layers_to_transform=layers,
    )
    self.body = peft.get_peft_model(body, config)

  def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """[B, L] -> [B, ways]."""
    # As torch wants it inside: what transformers does with a mask of two axes
    # reads values, which vmap refuses.
    bias = torch.where(mask == 0, -1e9, 0.0)[:, None, None, :]
    out = self.body(input_ids=ids, attention_mask=bias.to(self.head.weight))
    weights = mask[:, :, None].to(out.last_hidden_state.dtype)
    pooled = (out.last_hidden_state * weights).sum(1) / weights.sum(1)
    return self.head(pooled)


def lora_places(params: Any) -> Places:
  """As `conv4_places`, of factors and head."""
  head = params['head']
  found: Places = {
    'head.weight': (head['kernel'], np.transpose),
    'head.bias': (head['bias'], np.asarray),
  }
  for name in tree.names(params):
    kernel, _, factor = name.partition('.')
    if factor:
      place = their_name(kernel).removesuffix('.weight')
      theirs = {'lora_a': 'lora_A', 'lora_b': 'lora_B'}[factor]
      place = f'body.base_model.model.{place}.{theirs}.default.weight'
      found[place] = tree.get(params, name), np.transpose
  return found


def episodes(batch: Mapping) -> Episodes:
  """A meta-batch of numpy arrays as tensors."""
  parts = []
  for side in ('support', 'query'):
    columns = batch[side]
    if 'image' in columns:
      inputs = (turned(columns['image']),)
    else:
      names = ('input_ids', 'attention_mask')
      inputs = tuple(torch.tensor(columns[name]).long() for name in names)
    parts += [inputs, torch.tensor(columns['label']).long()]
  return tuple(parts)


def places(params: Any) -> Places:
  """`conv4_places` or `lora_places`, whichever model `params` are of."""
  is_conv4 = 'block_0' in params['body']
  return (conv4_places if is_conv4 else lora_places)(params)


def copy_into(model: torch.nn.Module, params: Any) -> None:
  """Sets what moves to our leaves."""
  theirs = dict(model.named_parameters())
  with torch.no_grad():
    for name, (leaf, layout) in places(params).items():
      value = np.array(layout(np.asarray(leaf)))  # writable, contiguous
      assert theirs[name].shape == value.shape, name
      theirs[name].copy_(torch.from_numpy(value))


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
