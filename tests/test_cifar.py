"""CIFAR-10 and CIFAR-100 in both of their forms."""

import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image
from test_datasets import raw_file

from fmeta.datasets import cifar, cifar100
from fmeta.errors import UsageError


@pytest.fixture(autouse=True)
def no_default_folders(monkeypatch, tmp_path):
  monkeypatch.delenv('FMETA_DATA_DIR', raising=False)
  monkeypatch.setenv('FMETA_CACHE_DIR', str(tmp_path / 'default-cache'))


def test_cifar_mosaics_are_cut_row_by_row(tmp_path):
  tiles = np.arange(103, dtype=np.uint8).reshape(103, 1, 1, 1)
  tiles = np.concatenate(
    [np.tile(tiles, (1, 32, 32, 3)), np.zeros((97, 32, 32, 3), np.uint8)]
  )
  tiles[:103, 0, 1] = 255
  grid = tiles.reshape(2, 100, 32, 32, 3).transpose(0, 2, 1, 3, 4)
  for split in ('train', 'test'):
    Image.fromarray(grid.reshape(64, 3200, 3)).save(
      tmp_path / f'{split}.webp', lossless=True
    )
    labels = {'labels': [k % 10 for k in range(103)]}
    (tmp_path / f'{split}.json').write_text(json.dumps(labels))
  train = cifar.load(tmp_path)['train']
  assert train['image'].shape == (103, 32, 32, 3)
  np.testing.assert_allclose(train['image'][:, 5, 5, 0] * 255, range(103))
  assert (train['image'][:, 0, 1] == 1).all()
  assert train['label'].tolist() == labels['labels']
  (tmp_path / 'train.json').write_text(json.dumps({'labels': [0] * 201}))
  with pytest.raises(UsageError, match='3200x64 pixels, but 201 labels'):
    cifar.load(tmp_path)
  (tmp_path / 'train.json').write_text('{}')
  with pytest.raises(UsageError, match='train.json cannot be read'):
    cifar.load(tmp_path)


def packed(path, names, images, labels):
  """A tar file with one image in each member, after its label bytes."""
  with tarfile.open(path, 'w:gz') as archive:
    for name, image, label in zip(names, images, labels, strict=True):
      raw = label.tobytes() + image.transpose(2, 0, 1).tobytes()
      member = tarfile.TarInfo(name)
      member.size = len(raw)
      archive.addfile(member, io.BytesIO(raw))


def test_cifar_binary_rows_are_a_label_and_three_planes(tmp_path, monkeypatch):
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (6, 32, 32, 3), np.uint8)
  labels = np.arange(6, dtype=np.uint8)
  path = tmp_path / 'cifar-10-binary.tar.gz'
  names = [f'data_batch_{k}.bin' for k in range(1, 6)] + ['test_batch.bin']
  names = [f'cifar-10-batches-bin/{name}' for name in names]
  packed(path, names, images, labels)
  monkeypatch.setattr(cifar.Cifar10, 'RAW', {path.name: raw_file(path)})
  splits = cifar.load(tmp_path, cache_dir=tmp_path / 'cache')
  both = np.concatenate([splits['train']['image'], splits['test']['image']])
  np.testing.assert_allclose(both * 255, images, rtol=1e-6)
  assert splits['train']['label'].tolist() == [0, 1, 2, 3, 4]
  assert splits['test']['label'].tolist() == [5]
  with pytest.raises(UsageError, match='100 bytes are no rows of 3073'):
    cifar.read_binary(bytes(100))


def test_the_shared_training_images_are_500_of_each_class(shared_data):
  train = cifar.read_mosaic(shared_data / 'cifar10' / 'train.webp')
  assert train['image'].shape == (5000, 32, 32, 3)
  assert (np.bincount(train['label']) == 500).all()


def test_cifar100_binary_rows_have_two_labels_of_which_the_fine_counts(
  tmp_path, monkeypatch
):
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (2, 32, 32, 3), np.uint8)
  labels = np.array([[3, 71], [19, 99]], np.uint8)
  path = tmp_path / 'cifar-100-binary.tar.gz'
  names = [f'cifar-100-binary/{name}.bin' for name in ('train', 'test')]
  packed(path, names, images, labels)
  monkeypatch.setattr(cifar100.Cifar100, 'RAW', {path.name: raw_file(path)})
  splits = cifar100.load(tmp_path, cache_dir=tmp_path / 'cache')
  for k, name in enumerate(('train', 'test')):
    np.testing.assert_allclose(splits[name]['image'][0] * 255, images[k])
    assert splits[name]['label'].tolist() == [labels[k, 1]]


def test_the_shared_part_of_cifar100_has_100_and_50_images_of_each_class(
  shared_data,
):
  # By the folder's name, beside one that holds CIFAR-10.
  splits = cifar100.load(shared_data)
  assert splits['train']['image'].shape == (10_000, 32, 32, 3)
  assert (np.bincount(splits['train']['label']) == 100).all()
  assert (np.bincount(splits['test']['label']) == 50).all()
