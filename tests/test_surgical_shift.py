"""The ten shifts, and the experiment at its small setting."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file
from test_experiments_finetune import execute
from test_resnet import tensors_of

from experiments.finetune import shifts, surgical_shift
from experiments.finetune.shift_trials import BLOCKS
from fmeta import models, tree
from fmeta.errors import UsageError
from fmeta.models import ResNet

RANDOM = np.random.default_rng(0)
COLUMNS = {
  'image': RANDOM.uniform(size=(6, 32, 32, 3)).astype(np.float32),
  'label': np.array([0, 1, 4, 5, 8, 9], np.int32),
}


@pytest.mark.parametrize('name', shifts.SHIFTS)
def test_a_shift_changes_images_labels_or_features_and_repeats(name):
  found = shifts.shifted(name, COLUMNS, 4)
  again = shifts.shifted(name, COLUMNS, 4)
  for key in found:
    np.testing.assert_array_equal(found[key], again[key])
  image = (found['image'] != COLUMNS['image']).any()
  label = (found['label'] != COLUMNS['label']).any()
  scaled = [(found[f'scale_{k}'] != 1).any() for k in (1, 2)]
  assert (image, label, *scaled) == (
    name in shifts.CORRUPTIONS,
    name in shifts.RELABELLINGS,
    name == 'stage_1_scaled',
    name == 'stage_2_scaled',
  )
  assert 0 <= found['image'].min() and found['image'].max() <= 1
  assert found['image'].dtype == np.float32
  assert found['label'].dtype == np.int32
  assert found['scale_1'].shape == (6, 4) and found['scale_2'].shape == (6, 8)


def test_there_are_ten_shifts_six_of_the_image():
  assert len(shifts.SHIFTS) == 10 and len(shifts.CORRUPTIONS) == 6
  assert surgical_shift.Config().shifts == shifts.SHIFTS


def test_corruptions_do_what_they_are_called():
  image = COLUMNS['image'][:1]
  assert abs((shifts.gaussian_noise(0.5 + 0 * image) - 0.5).std() - 0.1) < 0.01
  assert shifts.CORRUPTIONS['gaussian_blur'](image).std() < 0.5 * image.std()
  np.testing.assert_allclose(
    shifts.CORRUPTIONS['contrast'](image).std((1, 2)),
    0.15 * image.std((1, 2)),
    rtol=1e-5,
  )
  colour = np.zeros((1, 1, 2, 3))
  colour[0, 0, 0] = 0.4, 0.2, 0.0
  bright = shifts.brightness(colour)[0, 0]
  np.testing.assert_allclose(bright, [[0.7, 0.35, 0], [0.3, 0.3, 0.3]])
  small = Image.fromarray(np.round(255 * image[0]).astype(np.uint8))
  small = np.asarray(small.resize((20, 20), Image.Resampling.BOX))
  colours = {tuple(c) for c in small.reshape(-1, 3)}
  blocks = np.round(255 * shifts.CORRUPTIONS['pixelate'](image)[0]).astype(
    np.uint8
  )
  assert {tuple(c) for c in blocks.reshape(-1, 3)} <= colours
  assert shifts.label_merge(np.arange(4)).tolist() == [0, 0, 2, 2]
  assert shifts.label_flip(np.arange(4)).tolist() == [9, 8, 7, 6]


@pytest.fixture(scope='module')
def weights():
  tensors = tensors_of(ResNet(8, 10, 4))
  # Smaller activations: logits of some units, not of thousands.
  return {k: v * 0.3 if 'conv' in k else v for k, v in tensors.items()}


@pytest.fixture(scope='module')
def folder(tmp_path_factory, weights):
  """CIFAR-10's mosaics with sixty images each, and a tiny ResNet."""
  root = tmp_path_factory.mktemp('data')
  (root / 'cifar10').mkdir()
  for split in ('train', 'test'):
    pixels = RANDOM.integers(0, 256, (3 * 32, 32 * 32, 3), np.uint8)
    tiles = np.zeros((32, 100 * 32, 3), np.uint8)
    tiles[:, : 32 * 32] = pixels[:32]
    tiles[:, 32 * 32 : 64 * 32] = pixels[32:64]
    labels = (np.arange(100) % 10).tolist()
    Image.fromarray(tiles).save(
      root / 'cifar10' / f'{split}.webp', lossless=True
    )
    (root / 'cifar10' / f'{split}.json').write_text(
      json.dumps({'labels': labels})
    )
  save_file(weights, root / 'tiny.safetensors')
  return root


def test_the_scaled_model_is_the_model_with_scaled_weights(weights):
  from fmeta.pretrained.resnet import from_tensors

  module, params, state = from_tensors(weights, 'memory')
  batch = shifts.shifted('stage_1_scaled', COLUMNS, 4)
  run = jax.jit(
    lambda p, b: shifts.forward_of(module)(p, state, b, None)[0],
  )
  plain = jax.jit(
    lambda p, b: models.forward(module, models.IMAGE)(p, state, b, None)[0]
  )
  ones = shifts.shifted('label_merge', COLUMNS, 4)
  np.testing.assert_allclose(
    run(params, ones), plain(params, ones), rtol=1e-5, atol=1e-5
  )
  # The scaled stage feeds stage 2: its first kernel, and the shortcut around
  # it. Without the shortcut's share the logits differ, so it is scaled, too.
  assert not np.allclose(run(params, batch), plain(params, batch), atol=1e-3)
  kernel = params['body']['stage_2']['block_0']['conv_1']['kernel']
  scale = jnp.asarray(batch['scale_1'][0]).reshape(1, 1, -1, 1)
  params['body']['stage_2']['block_0']['conv_1']['kernel'] = kernel / scale
  undone = run(params, batch)
  assert not np.allclose(undone, plain(params, batch), atol=1e-3)


def test_blocks_cover_the_model_once():
  image = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
  shapes = jax.eval_shape(ResNet(8).init, jax.random.key(0), image)
  pairs = [(pattern, name) for name, pattern in BLOCKS.items()]
  for name in tree.names(shapes['params']):
    matches = [tree.first_match(name, [pair]) for pair in pairs]
    assert matches.count(0) == 1, name


def answers(accuracies):
  """Right answers [seeds, 10] of these accuracies."""
  return np.arange(10)[None] < 10 * np.array(accuracies)[:, None]


def test_summary_counts_auto_among_the_best_two():
  config = surgical_shift.Config(seeds=2)
  accuracies = {
    'early': [0.5, 0.7],
    'stage_2': [0.4, 0.4],
    'stage_3': [0.8, 0.6],
    'head': [0.1, 0.2],
    'full': [0.9, 0.9],
    'none': [0.1, 0.1],
  }
  result = {
    'rows': {row: answers(given) for row, given in accuracies.items()},
    'ratios': [
      {'early': 2.0, 'stage_2': 1.0, 'stage_3': 0.1, 'head': 0.2},
      {'early': 2.0, 'stage_2': 1.0, 'stage_3': 0.1, 'head': 2.2},
    ],
  }
  found = surgical_shift.summary(config, result)
  assert found['order'] == ['stage_3', 'early', 'stage_2', 'head']
  assert found['picks'] == ['early', 'head']
  assert found['hits'] == [True, False]
  assert found['found']['auto'].mean == pytest.approx((0.5 + 0.2) / 2)
  # Of twenty answers three are won and one is lost: 0.1 +- 1.96 x 0.0975.
  assert found['lead'] == pytest.approx((0.1, -0.09, 0.29), abs=0.02)


def test_the_experiment_reports_every_row(folder, tmp_path):
  workdir = tmp_path / 'run'
  small = {**surgical_shift.SMALL, 'checkpoint': folder / 'tiny.safetensors'}
  data_dir = f'--data_dir={folder}'
  assert execute(surgical_shift, workdir, data_dir, **small) == 0
  result = json.loads((workdir / 'result.json').read_text())['metrics']
  for shift in small['shifts']:
    for row in ('none', 'early', 'head', 'auto'):
      assert 0 <= result[f'{shift}/{row}'] <= 1
    auto = result[f'{shift}/auto']
    assert auto in (result[f'{shift}/early'], result[f'{shift}/head'])
    assert result[f'{shift}/best minus second'] >= 0
  assert result['auto in the best two'] == 1  # Of two blocks.


@pytest.mark.parametrize(
  'flags, words',
  [
    ({'shifts': ('fog',)}, "no shift 'fog'"),
    ({'rows': ('stem',)}, "no row 'stem'"),
    ({'rows': ('full',)}, 'name no block'),
    ({}, '--data_dir=DIR'),
    ({'checkpoint': 'x.safetensors'}, 'no weights at'),
  ],
)
def test_bad_settings_are_one_line(tmp_path, capsys, monkeypatch, flags, words):
  monkeypatch.delenv('FMETA_DATA_DIR', raising=False)
  assert execute(surgical_shift, tmp_path / 'run', **flags) == 2
  error = capsys.readouterr().err.strip()
  assert words in error and '\n' not in error


def test_too_few_images_are_counted(folder, tmp_path):
  config = surgical_shift.Config(
    checkpoint=str(folder / 'tiny.safetensors'), test_examples=80
  )
  config.tune_examples = config.validation_examples = 16
  from experiments.finetune.shift_trials import open_bench, splits_of
  from fmeta.workdir import Context

  context = Context(tmp_path, data_dir=str(folder))
  bench = open_bench(config, context, folder / 'tiny.safetensors')
  with pytest.raises(UsageError, match='112 images .* there are 100'):
    splits_of(bench, 'label_flip', 0)
