"""TREC and SST-2: lines in, columns out; the real files where they are."""

import hashlib

import numpy as np
import pytest

from fmeta.datasets import base, sst2, trec
from fmeta.errors import UsageError

TREC = {
  'TREC.train.all': '0 How is it ?\n5 How many ?\n',
  'TREC.test.all': '3 Who was Mozart\x92s wife ?\n',
}
SST2 = {
  'train.tsv': 'a film\t1\nno\tfilm\t0\n',
  'dev.tsv': 'so so\t0\n',
  'test.tsv': 'good\t1\n',
}


def write(folder, monkeypatch, builder, files, encoding):
  """Small files that count as the published ones."""
  raw = {}
  for name, text in files.items():
    content = text.encode(encoding)
    (folder / name).write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    raw[name] = base.RawFile('', len(content), digest)
  monkeypatch.setattr(builder, 'RAW', raw)
  monkeypatch.setenv('FMETA_CACHE_DIR', str(folder / 'cache'))


def test_trec_reads_latin_1_lines_of_label_and_text(tmp_path, monkeypatch):
  write(tmp_path, monkeypatch, trec.Trec, TREC, 'latin-1')
  splits = trec.load(tmp_path)
  assert list(splits['train']['text']) == ['How is it ?', 'How many ?']
  assert splits['train']['label'].tolist() == [0, 5]
  assert splits['train']['label'].dtype == np.int32
  assert splits['test']['text'][0] == 'Who was Mozart\x92s wife ?'


def test_sst2_takes_the_label_after_the_last_tab(tmp_path, monkeypatch):
  write(tmp_path, monkeypatch, sst2.Sst2, SST2, 'utf-8')
  splits = sst2.load(tmp_path)
  assert list(splits['train']['text']) == ['a film', 'no\tfilm']
  assert splits['train']['label'].tolist() == [1, 0]
  assert {k: len(v['label']) for k, v in splits.items()} == {
    'train': 2,
    'validation': 1,
    'test': 1,
  }


def test_an_altered_file_is_refused(tmp_path, monkeypatch):
  write(tmp_path, monkeypatch, sst2.Sst2, SST2, 'utf-8')
  (tmp_path / 'dev.tsv').write_text('so so\t1\n')
  with pytest.raises(UsageError, match='dev.tsv'):
    sst2.load(tmp_path)


SIZES = {
  trec: {'train': 5452, 'test': 500},
  sst2: {'train': 6920, 'validation': 872, 'test': 1821},
}


@pytest.mark.parametrize('module', SIZES, ids=lambda m: m.__name__)
def test_the_real_files_have_the_published_sizes(module, shared_data, tmp_path):
  splits = module.load(shared_data, cache_dir=tmp_path)
  assert {k: len(v['label']) for k, v in splits.items()} == SIZES[module]
  for columns in splits.values():
    assert set(columns['label']) == set(range(len(module.LABELS)))
    assert all(columns['text'])


def test_trecs_label_names_fit_what_the_questions_ask(shared_data, tmp_path):
  train = trec.load(shared_data, cache_dir=tmp_path)['train']
  names = np.array(trec.LABELS)[train['label']]
  for start, name in (
    ('How many ', 'number'),
    ('Who is ', 'human'),
    ('What country ', 'location'),
    ('What does the abbreviation ', 'abbreviation'),
    ('What is the definition of ', 'description'),
    ('What animal ', 'entity'),
  ):
    asked = [t.startswith(start) for t in train['text']]
    assert sum(asked) and (names[asked] == name).mean() > 0.8, start
