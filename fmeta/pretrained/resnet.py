"""The published CIFAR-10 ResNets (torch names) under ours."""

import pathlib
import re
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from fmeta import tree
from fmeta.errors import UsageError, suggest
from fmeta.models.resnet import ResNet
from fmeta.pretrained.files import check_sha256, read_tensors
from fmeta.types import Array, ModelState, Params

# Of github.com/akamaster/pytorch_resnet_cifar10 (BSD-2), as safetensors.
CIFAR10_SHA256 = {
  20: '47c10594b94b59a142973e1f079c4185a4e2595a2318c47642833bd4ad5d4c8d',
  32: '06a5d61303b68076aea712aeb968b2aef99073e4de39fba64327f4a76962dc84',
  56: 'c3809a0f77dfba854cd5fb2e76b31070dbd9ca9160668dfc993c413397e938ed',
}
# What they were trained with, for images in [0, 1].
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

_NAMES = (
  (r'body/stem/conv/(\w+)', r'conv1.\1'),
  (r'body/stem/norm/(\w+)', r'bn1.\1'),
  (r'body/stage_(\d)/block_(\d+)/conv_(\d)/(\w+)', r'layer\1.\2.conv\3.\4'),
  (r'body/stage_(\d)/block_(\d+)/norm_(\d)/(\w+)', r'layer\1.\2.bn\3.\4'),
  (r'head/(\w+)', r'linear.\1'),
)
_LEAVES = {
  'kernel': 'weight',
  'scale': 'weight',
  'mean': 'running_mean',
  'var': 'running_var',
}


def their_name(name: str) -> str:
  """`body/stage_1/block_0/conv_1/kernel` -> `layer1.0.conv1.weight`."""
  for pattern, template in _NAMES:
    if re.fullmatch(pattern, name):
      prefix, _, leaf = re.sub(pattern, template, name).rpartition('.')
      return f'{prefix}.{_LEAVES.get(leaf, leaf)}'
  raise KeyError(name)


def _ours(value: np.ndarray) -> np.ndarray:
  """Their axes to ours: OIHW to HWIO, [out, in] to [in, out]."""
  axes = {4: (2, 3, 1, 0), 2: (1, 0)}.get(value.ndim)
  return value if axes is None else np.transpose(value, axes)


def _take(tensors, name: str, shape: tuple[int, ...], where: str) -> Array:
  theirs = their_name(name)
  if theirs not in tensors:
    raise UsageError(
      f'{where} has no tensor {theirs!r} (our {name}){suggest(theirs, tensors)}'
    )
  value = _ours(tensors[theirs])
  if value.shape != shape:
    raise UsageError(
      f'{where}: {theirs!r} has the shape {list(value.shape)} in our order, '
      f'expected {list(shape)}; it is not a CIFAR ResNet of He et al. 2016'
    )
  # Copied: an aliased numpy buffer cannot be donated.
  return jnp.array(np.ascontiguousarray(value), jnp.float32)


def _module(tensors: Mapping[str, np.ndarray], where: str) -> ResNet:
  blocks = [re.fullmatch(r'layer1\.(\d+)\.conv1\.weight', n) for n in tensors]
  count = sum(found is not None for found in blocks)
  if not count or 'conv1.weight' not in tensors:
    raise UsageError(
      f'{where} has no layer1.0.conv1.weight and conv1.weight; give the '
      'weights of a CIFAR ResNet under their torch names'
    )
  classes = tensors.get('linear.bias', np.zeros(10)).size
  width = tensors['conv1.weight'].shape[0]
  return ResNet(6 * count + 2, classes, width, MEAN, STD)


def from_tensors(
  tensors: Mapping[str, np.ndarray], where: str
) -> tuple[ResNet, Params, ModelState]:
  """Module, parameters and running statistics from torch-named tensors.

  Raises:
    UsageError: for a missing, unknown or wrong-shaped tensor.
  """
  tensors = {
    name.removeprefix('module.'): value
    for name, value in tensors.items()
    if not name.endswith('num_batches_tracked')
  }
  module = _module(tensors, where)
  image = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
  shapes = dict(jax.eval_shape(module.init, jax.random.key(0), image))
  inner = {**shapes['params']}
  wanted = {their_name(n) for n in tree.names(inner)}
  wanted |= {their_name(n) for n in tree.names(shapes['batch_stats'])}
  unknown = sorted(set(tensors) - wanted)
  if unknown:
    raise UsageError(
      f'{where}: {unknown[0]!r} is no tensor of a CIFAR ResNet-{module.depth}'
      f'{suggest(unknown[0], wanted)}'
    )

  def filled(shapes):
    return tree.map_with_name(
      lambda name, leaf: _take(tensors, name, leaf.shape, where), shapes
    )

  return module, filled(inner), {'batch_stats': filled(shapes['batch_stats'])}


def load_resnet(
  path: pathlib.Path | str, *, sha256: str | None = None
) -> tuple[ResNet, Params, ModelState]:
  """A published CIFAR ResNet; it takes images in [0, 1].

  Args:
    path: safetensors under torch names; the depth is read from it.
    sha256: checked when given, see `CIFAR10_SHA256`.

  Returns:
    The module with its normalisation, parameters and running statistics in
    float32.

  Raises:
    UsageError: for a missing, altered, truncated or foreign file, a pickle.
  """
  tensors = read_tensors(path)
  if sha256:
    check_sha256(pathlib.Path(path), sha256)
  return from_tensors(tensors, str(path))
