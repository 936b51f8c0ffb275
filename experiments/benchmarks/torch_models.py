"""The models of the few-shot benchmark in torch, with fmeta's weights.

Imported only where torch is there.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from fmeta import tree
from fmeta.pretrained.bert import their_name

# (support inputs, support label, query inputs, query label), each with a
# leading task axis; inputs are tuples of what the model takes.
Episodes = tuple[tuple, torch.Tensor, tuple, torch.Tensor]
# Their name -> (our leaf, how it is laid out there).
Places = dict[str, tuple[Any, Callable]]


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
