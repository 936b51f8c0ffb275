"""BANKING77 and the folds it shares with CLINC150; the real files too."""

import hashlib

import numpy as np
import pytest

from fmeta.datasets import banking77, base, clinc150, intents
from fmeta.errors import UsageError

TRAIN = (
  'text,category\n"Where, pray?\nSoon?",where\nGive back,Refund\nNo,lost\n'
)
TEST = 'text,category\nLost it ,lost\n'


@pytest.fixture
def toy(tmp_path, monkeypatch):
  """A folder with three intents, one fold and a 5-shot file."""
  monkeypatch.delenv('FMETA_DATA_DIR', raising=False)
  monkeypatch.setenv('FMETA_CACHE_DIR', str(tmp_path / 'cache'))
  folder = tmp_path / 'banking77'
  shot, fold = folder / 'few_shot' / 'train_5', folder / 'episodic' / '01'
  shot.mkdir(parents=True)
  fold.mkdir(parents=True)
  raw = {}
  for name, text in (('train.csv', TRAIN), ('test.csv', TEST)):
    (folder / name).write_bytes(text.encode())
    digest = hashlib.sha256(text.encode()).hexdigest()
    raw[name] = base.RawFile('http://localhost:9/none', len(text), digest)
  monkeypatch.setattr(banking77.Banking77, 'RAW', raw)
  (shot / 'seq.in').write_text('my money\ngone\n')
  (shot / 'label').write_text('Refund\nlost\n')
  for name, intent in (('train', 'lost'), ('valid', 'where')):
    (fold / f'labels.{name}.txt').write_text(f'{intent}\n')
  (fold / 'labels.test.txt').write_text('Refund\n')
  return tmp_path


def test_banking77_reads_quoted_lines_and_numbers_names_without_case(toy):
  splits = banking77.load(toy)
  train = splits['train']
  assert train['text'].tolist() == ['Where, pray?\nSoon?', 'Give back', 'No']
  assert train['intent'].tolist() == ['where', 'Refund', 'lost']
  assert train['label'].tolist() == [2, 1, 0]
  assert train['label'].dtype == np.int32
  assert splits['test']['text'].tolist() == ['Lost it ']
  assert splits['test']['label'].tolist() == [0]


def test_an_altered_file_is_refused(toy):
  (toy / 'banking77' / 'test.csv').write_text(TEST + 'more,lost\n')
  with pytest.raises(UsageError, match=r'test\.csv has sha256'):
    banking77.load(toy)


def test_a_fold_pools_the_splits_and_few_shot_keeps_the_labels(toy):
  splits = banking77.load(toy)
  folds = banking77.episodic_folds(splits, 1, toy)
  assert {name: c['text'].tolist() for name, c in folds.items()} == {
    'train': ['No', 'Lost it '],
    'validation': ['Where, pray?\nSoon?'],
    'test': ['Give back'],
  }
  shots = banking77.few_shot(splits, 5, toy)
  assert shots['text'].tolist() == ['my money', 'gone']
  assert shots['label'].tolist() == [1, 0]


def test_bad_folds_and_shots_are_refused_in_one_line(toy):
  splits = banking77.load(toy)
  folder = toy / 'banking77' / 'episodic' / '01'
  cases = [
    (lambda: banking77.episodic_folds(splits, 6, toy), 'the folds are 1 to 5'),
    (lambda: banking77.episodic_folds(splits, 2, toy), 'episodic/02 is not in'),
    (lambda: banking77.few_shot(splits, 7, toy), '7 shots; there are files'),
    (lambda: banking77.few_shot(splits, 10), 'any local copy; .*--data_dir'),
  ]
  test = folder / 'labels.test.txt'
  for content, words in (
    ('lost\n', "repeats 'lost' of another split"),
    ('found\n', "names 'found', which no example has"),
    (None, r'labels\.test\.txt is missing'),
  ):

    def changed(content=content):
      test.unlink()
      if content is not None:
        test.write_text(content)
      banking77.episodic_folds(splits, 1, toy)

    cases.append((changed, words))
  (toy / 'banking77' / 'few_shot' / 'train_5' / 'label').write_text('lost\n')
  cases.append((lambda: banking77.few_shot(splits, 5, toy), '2 texts and 1 la'))
  for case, words in cases:
    with pytest.raises(UsageError, match=words) as caught:
      case()
    assert '\n' not in str(caught.value)


DATA = {
  'banking77': (
    banking77.Banking77,
    {'train': 10003, 'test': 3080},
    (25, 25, 27),
  ),
  'clinc150': (
    clinc150.Clinc150,
    {'train': 15000, 'validation': 3000, 'test': 4500},
    (50, 50, 50),
  ),
}


def read(builder, folder):
  """What `load` gives, without writing 20,000 records."""
  files = {name: base.find(folder, builder.name, name) for name in builder.RAW}
  for name, path in files.items():
    builder.check_local(name, path)
  return {
    split: {
      key: np.array([row[key] for row in rows], object)
      for key in ('text', 'intent', 'label')
    }
    for split, rows in builder.rows(files).items()
  }


@pytest.mark.parametrize('name', DATA)
def test_the_real_folds_part_all_intents(name, shared_data, tmp_path):
  builder, sizes, parts = DATA[name]
  splits = read(builder(shared_data, tmp_path), shared_data)
  assert {k: len(splits[k]['label']) for k in sizes} == sizes
  train = splits['train']
  names = dict(zip(train['label'], train['intent'], strict=True))
  assert sorted(names) == list(range(sum(parts)))
  in_order = [names[label] for label in sorted(names)]
  assert in_order == sorted(in_order, key=str.lower)
  tests = set()
  for fold in intents.FOLDS:
    made = intents.episodic_folds(name, splits, fold, shared_data)
    kinds = [set(made[split]['intent']) for split in intents.SPLITS]
    assert tuple(map(len, kinds)) == parts
    assert set.union(*kinds) == set(names.values())
    assert sum(len(c['label']) for c in made.values()) == sum(sizes.values())
    tests.add(frozenset(kinds[2]))
  assert len(tests) == 5
  known = set(zip(map(plain, train['text']), train['intent'], strict=True))
  for shots in intents.SHOTS:
    made = intents.few_shot(name, splits, shots, shared_data)
    counts = np.bincount(made['label'].astype(int))
    assert counts.tolist() == [shots] * sum(parts)
    rows = list(zip(map(plain, made['text']), made['intent'], strict=True))
    # They are training examples; a few were retyped.
    assert np.mean([row in known for row in rows]) > 0.95


def plain(text):
  return ' '.join(text.lower().split())
