"""The CIFAR ResNets against torch, and their weights' loader."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fmeta import (
  data,
  evaluate,
  losses,
  models,
  optim,
  pretrained,
  tree,
  tuning,
)
from fmeta.datasets import cifar
from fmeta.errors import UsageError
from fmeta.learner import finetune
from fmeta.models.resnet import ResNet, shortcut
from fmeta.pretrained.resnet import from_tensors, their_name

FORWARD = models.forward


def tensors_of(module, seed=0):
  """Random weights of a module under torch names."""
  image = jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32)
  shapes = jax.eval_shape(module.init, jax.random.key(0), image)
  rng = np.random.default_rng(seed)
  out = {}
  for part in shapes.values():
    for name, leaf in zip(tree.names(part), jax.tree.leaves(part), strict=True):
      value = rng.uniform(0.1, 0.5, leaf.shape).astype(np.float32)
      if name.endswith('kernel'):
        value = value - 0.3
      if value.ndim == 4:
        value = value.transpose(3, 2, 0, 1)
      out[their_name(name)] = value.T if value.ndim == 2 else value
  return {name: np.ascontiguousarray(value) for name, value in out.items()}


def images(rows=2, side=8, seed=0):
  rng = np.random.default_rng(seed)
  return rng.uniform(size=(rows, side, side, 3)).astype(np.float32)


@pytest.fixture(scope='module')
def tiny():
  tensors = tensors_of(ResNet(8, 10, 4))
  return (*from_tensors(tensors, 'memory'), tensors)


def test_resnet_20_has_the_published_number_of_parameters():
  image = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
  shapes = jax.eval_shape(ResNet(20).init, jax.random.key(0), image)
  # 0.27 M in He et al. 2016, table 6; 269,722 by the layers' sizes.
  assert tree.size(shapes['params']) == 269_722
  assert {n.split('/')[1] for n in tree.names(shapes['params']['body'])} >= {
    'conv',
    'block_0',
    'block_2',
  }


def test_shortcut_takes_every_second_pixel_and_pads_channels():
  x = images(1, 4)
  y = np.asarray(shortcut(jnp.asarray(x), 7, 2))
  np.testing.assert_array_equal(y[..., 2:5], x[:, ::2, ::2])
  assert not y[..., :2].any() and not y[..., 5:].any()


def test_depth_that_is_no_resnet_is_refused():
  with pytest.raises(UsageError, match='depth=18'):
    ResNet(18)


def test_frozen_stages_keep_weights_and_statistics(tiny):
  module, params, state, _ = tiny
  loss = losses.supervised(
    FORWARD(module, models.IMAGE), losses.softmax_cross_entropy
  )
  learner = finetune(
    loss, optim.sgd(0.1), tuning=tuning.select('body/stage_2/.*')
  )
  batch = {'image': images(), 'label': np.array([1, 2])}
  before = learner.init(params, jax.random.key(0), state)
  after, aux = jax.jit(learner.step)(before, batch, jax.random.key(1))
  assert np.isfinite(aux.metrics['loss'])
  moved = {
    name
    for name, a, b in zip(
      tree.names(state),
      jax.tree.leaves(state),
      jax.tree.leaves(after.model_state),
      strict=True,
    )
    if bool(np.any(a != b))
  }
  assert moved and all('/stage_2/' in name for name in moved)
  assert all('/stage_2/' in name for name in tree.names(after.trainable))


def test_names_shapes_and_strangers_are_checked(tmp_path, tiny):
  tensors = dict(tiny[3])
  path = tmp_path / 'a.safetensors'

  def fails(changed, words):
    save_file(changed, path)
    with pytest.raises(UsageError, match=words):
      pretrained.load_resnet(path)

  name = 'layer2.0.bn1.running_var'
  fails({k: v for k, v in tensors.items() if k != name}, f'no tensor {name!r}')
  fails({**tensors, 'layer4.0.x': np.ones(2)}, "'layer4.0.x' is no tensor")
  fails({**tensors, 'linear.weight': np.ones((10, 3))}, 'has the shape')
  fails({'fc.weight': np.ones(2)}, 'no layer1.0.conv1.weight')
  save_file({**tensors, 'bn1.num_batches_tracked': np.ones(1)}, path)
  assert pretrained.load_resnet(path)[0].depth == 8
  with pytest.raises(UsageError, match='sha256'):
    pretrained.load_resnet(path, sha256='0' * 64)


def torch_logits(tensors, x):
  """He et al.'s network from torch's own functions, weights by name."""
  import torch
  from torch.nn import functional

  weights = {k: torch.tensor(v) for k, v in tensors.items()}

  def normed(x, name):
    keys = ('running_mean', 'running_var', 'weight', 'bias')
    return functional.batch_norm(x, *(weights[f'{name}.{k}'] for k in keys))

  def convolved(x, name, stride=1):
    return functional.conv2d(x, weights[f'{name}.weight'], None, stride, 1)

  mean = torch.tensor([0.485, 0.456, 0.406]).reshape(1, 3, 1, 1)
  std = torch.tensor([0.229, 0.224, 0.225]).reshape(1, 3, 1, 1)
  x = (torch.tensor(x.transpose(0, 3, 1, 2)) - mean) / std
  x = torch.relu(normed(convolved(x, 'conv1'), 'bn1'))
  for stage in (1, 2, 3):
    block = 0
    while f'layer{stage}.{block}.conv1.weight' in weights:
      name = f'layer{stage}.{block}'
      stride = 2 if stage > 1 and block == 0 else 1
      y = torch.relu(
        normed(convolved(x, f'{name}.conv1', stride), f'{name}.bn1')
      )
      y = normed(convolved(y, f'{name}.conv2'), f'{name}.bn2')
      if stride == 2:
        more = x.shape[1] // 2
        x = functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, more, more))
      x, block = torch.relu(x + y), block + 1
  x = x.mean((2, 3))
  return (x @ weights['linear.weight'].T + weights['linear.bias']).numpy()


def check_against_torch(module, params, state, tensors, x):
  run = jax.jit(FORWARD(module, models.IMAGE), static_argnums=3)
  ours, _ = run(params, state, {'image': x}, None)
  theirs = torch_logits(tensors, x)
  np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.oracle
def test_logits_equal_torch_on_random_weights(tiny):
  check_against_torch(*tiny, images(3, 9))


@pytest.mark.oracle
@pytest.mark.parametrize('depth', [20, 32, 56])
def test_logits_equal_torch_on_published_weights(shared_data, depth):
  path = shared_data / 'checkpoints' / f'cifar10_resnet{depth}.safetensors'
  loaded = pretrained.load_resnet(path, sha256=pretrained.CIFAR10_SHA256[depth])
  test = cifar.read_mosaic(shared_data / 'cifar10' / 'test.webp')
  x = test['image'][::2500].astype(np.float32) / 255
  check_against_torch(*loaded, load_file(path), x)


@pytest.mark.oracle
def test_resnet_20_is_right_on_92_percent_of_500_test_images(shared_data):
  # All 10,000: 91.73 %, see experiments/README.md.
  path = shared_data / 'checkpoints' / 'cifar10_resnet20.safetensors'
  module, params, state = pretrained.load_resnet(path)
  test = cifar.load(shared_data)['test']
  rows = data.take(test, np.random.default_rng(0).permutation(10_000)[:500])
  accuracy = evaluate.accuracy_of(
    FORWARD(module, models.IMAGE), params, state, data.eval_batches(rows, 250)
  )
  # Three standard errors of 500 draws are 3.7 points.
  assert abs(accuracy - 0.9173) < 0.037


def test_without_a_head_come_the_features_that_the_head_reads(tiny):
  module, params, state, _ = tiny
  bare = module.clone(num_classes=None)
  body = {'params': {'body': params['body']}, **state}
  features = bare.apply(body, images())
  assert features.shape == (2, 16)
  head = params['head']
  logits = module.apply({'params': params, **state}, images())
  # A product of the same arrays outside the program; sums in another order.
  found = features @ head['kernel'] + head['bias'][None]
  np.testing.assert_allclose(found, logits, rtol=1e-5, atol=1e-6)
