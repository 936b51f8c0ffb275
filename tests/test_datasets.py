import gzip
import hashlib
import io
import json
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from sklearn.datasets import load_digits

from fmeta.datasets import base, clinc150, digits, mnist, omniglot
from fmeta.errors import UsageError


def raw_file(path):
  raw = path.read_bytes()
  return base.RawFile(
    'http://localhost:9/none', len(raw), hashlib.sha256(raw).hexdigest()
  )


@pytest.fixture(autouse=True)
def no_default_folders(monkeypatch, tmp_path):
  monkeypatch.delenv('FMETA_DATA_DIR', raising=False)
  monkeypatch.setenv('FMETA_CACHE_DIR', str(tmp_path / 'default-cache'))


class Words(base.Dataset):
  """Words and their lengths, from one raw file."""

  FEATURES = {
    'text': tfds.features.Text(),
    'length': tfds.features.Scalar(dtype=np.int32),
  }

  def rows(self, files):
    words = files['words.txt'].read_text().split('\n')
    return {'train': [{'text': w, 'length': len(w)} for w in words]}


@pytest.fixture
def words(tmp_path, monkeypatch):
  folder = tmp_path / 'raw'
  folder.mkdir()
  (folder / 'words.txt').write_text('naïve\n\nthree')
  raw = raw_file(folder / 'words.txt')
  monkeypatch.setattr(Words, 'RAW', {'words.txt': raw})
  return folder


def test_columns_keep_order_types_and_empty_texts(words):
  train = base.load(Words(words))['train']
  assert list(train['text']) == ['naïve', '', 'three']
  assert train['length'].tolist() == [5, 0, 5]
  assert (train['text'].dtype, train['length'].dtype) == (object, np.int32)


def test_a_second_load_needs_no_raw_file(words):
  first = base.load(Words(words))
  (words / 'words.txt').unlink()
  assert base.sha256(base.load(Words(words))) == base.sha256(first)


def test_a_raw_copy_may_lie_in_a_folder_named_like_the_data_set(words):
  (words / 'words').mkdir()
  (words / 'words.txt').rename(words / 'words' / 'words.txt')
  assert len(base.load(Words(words))['train']['text']) == 3


def test_the_environment_names_the_local_copy(words, monkeypatch):
  monkeypatch.setenv('FMETA_DATA_DIR', str(words))
  assert len(base.load(Words())['train']['text']) == 3


def test_an_altered_copy_is_refused_and_nothing_is_prepared(words):
  (words / 'words.txt').write_text('other')
  builder = Words(words)
  with pytest.raises(UsageError, match='words.txt has sha256 .* expected'):
    base.load(builder)
  assert not builder.data_path.exists()


def test_a_data_dir_that_is_none_is_named(tmp_path):
  with pytest.raises(UsageError, match='nowhere.* is no folder'):
    mnist.load(tmp_path / 'nowhere')


def test_without_copy_and_network_the_error_names_the_remedy(words, tmp_path):
  (tmp_path / 'empty').mkdir()
  with pytest.raises(UsageError, match='words.txt.*--data_dir=FOLDER'):
    base.load(Words(tmp_path / 'empty'))


def test_a_cache_that_cannot_be_written_is_named(words, tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(UsageError, match='FMETA_CACHE_DIR'):
    base.load(Words(words, cache_dir=tmp_path / 'file' / 'below'))


def test_whoever_prepares_second_uses_what_the_first_has_written(
  words, monkeypatch
):
  builder = Words(words)
  late = Words(words)
  base.prepare(builder)
  digest = base.sha256(base.load(builder))
  # `late` believes that nothing is there, and its rename finds the folder.
  monkeypatch.setattr(
    Words, 'download_and_prepare', lambda *_, **__: _raise(OSError('exists'))
  )
  assert base.sha256(base.load(late)) == digest


def _raise(error):
  raise error


def test_sha256_sees_order_values_and_names():
  one = {'train': {'x': np.arange(3)}}
  assert base.sha256(one) == base.sha256({'train': {'x': np.arange(3)}})
  others = [
    {'train': {'x': np.array([0, 2, 1])}},
    {'train': {'y': np.arange(3)}},
    {'test': {'x': np.arange(3)}},
    {'train': {'x': np.arange(3, dtype=np.int32)}},
  ]
  assert len({base.sha256(other) for other in [one, *others]}) == 5


def test_digits_are_scikit_learns(tmp_path):
  splits = digits.load(cache_dir=tmp_path)
  image = np.concatenate([splits['train']['image'], splits['test']['image']])
  label = np.concatenate([splits['train']['label'], splits['test']['label']])
  expected = load_digits()
  assert image.shape == (1797, 8, 8, 1) and image.dtype == np.float32
  assert len(splits['test']['label']) == 360
  np.testing.assert_array_equal(image[..., 0] * 16, expected.images)
  np.testing.assert_array_equal(label, expected.target)


def idx(values):
  head = bytes((0, 0, 8, values.ndim))
  sizes = np.array(values.shape, '>i4').tobytes()
  return gzip.compress(head + sizes + values.tobytes())


def test_mnist_reads_idx_files(tmp_path, monkeypatch):
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (3, 28, 28), np.uint8)
  labels = np.array([3, 1, 9], np.uint8)
  folder = tmp_path / 'raw' / 'mnist'
  folder.mkdir(parents=True)
  for part in ('train', 't10k'):
    (folder / f'{part}-images-idx3-ubyte.gz').write_bytes(idx(images))
    (folder / f'{part}-labels-idx1-ubyte.gz').write_bytes(idx(labels))
  raw = {path.name: raw_file(path) for path in folder.iterdir()}
  monkeypatch.setattr(mnist.Mnist, 'RAW', raw)
  splits = mnist.load(tmp_path / 'raw', cache_dir=tmp_path / 'cache')
  assert set(splits) == {'train', 'test'}
  np.testing.assert_array_equal(splits['test']['label'], labels)
  np.testing.assert_allclose(
    splits['train']['image'][..., 0] * 255, images, rtol=1e-6
  )


@pytest.mark.parametrize(
  'raw, complaint',
  [
    (b'\0\0\x0d\1\0\0\0\1\0\0\0\0', 'is not an IDX file'),
    (b'\0\0\x08\1\0\0\0\5ab', 'is cut: 2 values'),
  ],
)
def test_a_broken_idx_file_is_refused(tmp_path, raw, complaint):
  path = tmp_path / 'x.gz'
  path.write_bytes(gzip.compress(raw))
  with pytest.raises(UsageError, match=complaint):
    mnist.read_idx(path)


def test_original_mnist_has_the_recorded_checksums(shared_data):
  for name, raw in mnist.Mnist.RAW.items():
    path = base.find(shared_data, 'mnist', name)
    assert path.stat().st_size == raw.size
    base.check_sha256(path, raw.sha256)
  labels = mnist.read_idx(shared_data / 'mnist' / 't10k-labels-idx1-ubyte.gz')
  assert labels.shape == (10000,)
  assert labels[:5].tolist() == [7, 2, 1, 0, 4]


def png(pixels):
  buffer = io.BytesIO()
  Image.fromarray(pixels).convert('1').save(buffer, 'PNG')
  return buffer.getvalue()


def test_omniglot_pixels_are_the_share_of_ink():
  pixels = np.full((105, 105), 255, np.uint8)
  pixels[:15, :15] = 0  # exactly the first 4 x 4 of 3.75-wide pixels
  image = omniglot.decode(png(pixels))
  assert image.shape == (28, 28, 1) and image.dtype == np.uint8
  expected = np.zeros((28, 28))
  expected[:4, :4] = 255
  np.testing.assert_array_equal(image[..., 0], expected)
  half = np.full((105, 105), 255, np.uint8)
  half[:, ::2] = 0
  assert omniglot.decode(png(half)).mean() == pytest.approx(128.7, abs=1)


@pytest.fixture
def toy_omniglot(tmp_path, monkeypatch):
  content = {}
  rng = np.random.default_rng(1)
  for split, alphabet in (('background', 'Greek'), ('evaluation', 'Angelic')):
    members = {
      f'images_{split}/{alphabet}/character{c:02d}/000{c}_{d:02d}.png': png(
        255 * rng.integers(0, 2, (105, 105), np.uint8)
      )
      for c in (1, 2)
      for d in (1, 2, 3)
    }
    content[split] = omniglot.content_sha256(members)
    with zipfile.ZipFile(tmp_path / f'images_{split}.zip', 'w') as archive:
      archive.writestr(f'__MACOSX/images_{split}/x.png', b'')
      for name in reversed(members):  # another container, the same content
        archive.writestr(name, members[name])
  monkeypatch.setattr(omniglot, '_CONTENT', content)
  return tmp_path


def test_omniglot_labels_are_global(toy_omniglot):
  splits = omniglot.load(toy_omniglot, cache_dir=toy_omniglot / 'cache')
  background, evaluation = splits['background'], splits['evaluation']
  assert background['label'].tolist() == [0, 0, 0, 1, 1, 1]
  assert evaluation['label'].tolist() == [964] * 3 + [965] * 3
  assert evaluation['drawer'].tolist() == [0, 1, 2, 0, 1, 2]
  assert set(background['alphabet']) == {0}
  assert set(evaluation['alphabet']) == {30}
  assert background['image'].shape == (6, 28, 28, 1)
  assert 0 <= background['image'].min() < background['image'].max() <= 1


def test_a_folder_that_is_not_there_is_refused_whatever_is_cached(toy_omniglot):
  omniglot.load(toy_omniglot, cache_dir=toy_omniglot / 'cache')
  with pytest.raises(
    UsageError, match="nowhere' is no folder; give the folder"
  ):
    omniglot.load(toy_omniglot / 'nowhere', cache_dir=toy_omniglot / 'cache')


def test_altered_or_cut_omniglot_is_refused(toy_omniglot):
  path = toy_omniglot / 'images_evaluation.zip'
  whole = path.read_bytes()
  with zipfile.ZipFile(path, 'a') as archive:
    archive.writestr('images_evaluation/More/character01/1_01.png', b'')
  with pytest.raises(UsageError, match='does not hold the original images'):
    omniglot.load(toy_omniglot)
  path.write_bytes(whole[: len(whole) // 2])
  with pytest.raises(UsageError, match='not a whole zip file'):
    omniglot.load(toy_omniglot)


def test_original_omniglot_has_the_recorded_content(shared_data):
  for split, count in omniglot.NUM_CHARACTERS.items():
    path = base.find(shared_data, 'omniglot', f'images_{split}.zip')
    members = omniglot._members(path, split)
    assert len(members) == 20 * count
    assert (
      len({name.split('/')[1] for name in members})
      == (omniglot.NUM_ALPHABETS[split])
    )


@pytest.fixture
def toy_clinc(tmp_path, monkeypatch):
  data = {
    key: [[f'{key} {intent} {i}', intent] for intent in intents for i in (0, 1)]
    for keys, intents in (
      (('train', 'val', 'test'), ('pay', 'book', 'alarm')),
      (('oos_train', 'oos_val', 'oos_test'), ('oos',)),
    )
    for key in keys
  }
  folder = tmp_path / 'clinc150'
  shot, fold = folder / 'few_shot' / 'train_5', folder / 'episodic' / '01'
  shot.mkdir(parents=True)
  fold.mkdir(parents=True)
  (folder / 'data_full.json').write_text(json.dumps(data))
  (folder / 'domains.json').write_text(
    json.dumps({'bank': ['pay'], 'home': ['alarm', 'book']})
  )
  raw = {path.name: raw_file(path) for path in folder.glob('*.json')}
  monkeypatch.setattr(clinc150.Clinc150, 'RAW', raw)
  (shot / 'seq.in').write_text('pay it\nwake me\n')
  (shot / 'label').write_text('pay\nalarm\n')
  for name, intent in (('train', 'pay'), ('valid', 'book'), ('test', 'alarm')):
    (fold / f'labels.{name}.txt').write_text(f'{intent}\n')
  return tmp_path


def test_clinc150_numbers_intents_by_name(toy_clinc):
  splits = clinc150.load(toy_clinc)
  train = splits['train']
  assert train['intent'].tolist() == ['pay'] * 2 + ['book'] * 2 + ['alarm'] * 2
  assert train['label'].tolist() == [2, 2, 1, 1, 0, 0]
  assert train['domain'].tolist() == ['bank'] * 2 + ['home'] * 4
  assert train['text'][0] == 'train pay 0'
  assert splits['oos_test']['label'].tolist() == [150, 150]


def test_clinc150_few_shot_and_folds_use_the_same_labels(toy_clinc):
  splits = clinc150.load(toy_clinc)
  shots = clinc150.few_shot(splits, 5, toy_clinc)
  assert shots['text'].tolist() == ['pay it', 'wake me']
  assert shots['label'].tolist() == [2, 0]
  folds = clinc150.episodic_folds(splits, 1, toy_clinc)
  assert {name: set(c['intent']) for name, c in folds.items()} == {
    'train': {'pay'},
    'validation': {'book'},
    'test': {'alarm'},
  }
  assert all(len(columns['text']) == 6 for columns in folds.values())


def test_a_missing_fold_is_named(toy_clinc):
  splits = clinc150.load(toy_clinc)
  with pytest.raises(UsageError, match='episodic/02 .*--data_dir=FOLDER'):
    clinc150.episodic_folds(splits, 2, toy_clinc)
  with pytest.raises(UsageError, match='few_shot/train_10'):
    clinc150.few_shot(splits, 10)


def test_original_clinc150_has_the_recorded_checksums(shared_data):
  for name, raw in clinc150.Clinc150.RAW.items():
    path = base.find(shared_data, 'clinc150', name)
    base.check_sha256(path, raw.sha256)
    assert path.stat().st_size == raw.size


def test_no_data_set_needs_tensorflow(tmp_path):
  code = (
    'import sys\n'
    'from fmeta.datasets import clinc150, digits, docparams, mnist, omniglot\n'
    'from fmeta.datasets import banking77, intents, sst2, trec\n'
    f'print(len(digits.load(cache_dir={str(tmp_path)!r})["test"]["label"]))\n'
    'print("tensorflow" in sys.modules)'
  )
  command = [sys.executable, '-W', 'error', '-c', code]
  out = subprocess.run(command, capture_output=True, text=True, check=False)
  assert (out.stdout.split(), out.returncode) == (['360', 'False'], 0), (
    out.stderr
  )
