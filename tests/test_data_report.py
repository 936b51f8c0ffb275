"""The report finds what was planted, in tables, page and JSON."""

import json

import numpy as np
import pytest

from fmeta.data import __main__ as command
from fmeta.data import checks, findings, page, reading, report
from fmeta.errors import UsageError

SUBJECTS = 'sun moon sea wind hill lake road tree bird stone'.split()
PLANTED = [
  ('train', 'the Lake is cold, my friend', 'good', 'f1'),
  ('test', 'the lake is cold my friend', 'good', 'f9'),  # near, group new
  ('train', 'one and the same', 'good', 'f2'),
  ('test', 'one and the same', 'bad', 'f2'),  # equal, conflict, group shared
  ('train', 'said twice here', 'bad', 'f3'),
  ('train', 'said twice here', 'bad', 'f3'),  # repeated
  ('test', '', 'bad', 'f8'),  # empty
  ('test', 'zyzzyva zyzzyva', 'good', 'f8'),  # unseen
]


def make_rows():
  """Two plain classes, one row labelled wrongly, and what is planted."""
  random = np.random.default_rng(0)
  rows = []
  for k in range(120):
    label = ('good', 'bad')[k % 2]
    word = {'good': 'pleasant lovely', 'bad': 'awful horrible'}[label]
    some = ' '.join(random.choice(SUBJECTS, 6))
    split = 'test' if k % 6 == 5 else 'train'
    given = label if k != 40 else 'bad'
    rows.append((split, f'{some} {word} {k}', given, f'{split}{k % 7}'))
  return rows + PLANTED


@pytest.fixture(scope='module')
def files(tmp_path_factory):
  folder = tmp_path_factory.mktemp('data')
  paths = {}
  for split in ('train', 'test'):
    paths[split] = folder / f'{split}.jsonl'
    lines = [
      json.dumps({'text': text, 'label': label, 'file': group})
      for where, text, label, group in make_rows()
      if where == split
    ]
    paths[split].write_text('\n'.join(lines) + '\n')
  return paths


@pytest.fixture(scope='module')
def source(files):
  return reading.from_files(files, group='file')


@pytest.fixture(scope='module')
def numbers(source):
  return report.measure(source)


def test_planted_copies_are_counted(numbers):
  assert numbers['copies']['equal'].tolist() == [[1, 1], [1, 0]]
  assert numbers['copies']['near'].tolist() == [[0, 1], [1, 0]]
  similarity, first, second = numbers['copies']['near_pairs'][0]
  assert similarity == 1.0
  assert (first['split'], second['split']) == ('train', 'test')
  assert first['text'] == 'the Lake is cold, my friend'


def test_planted_conflicts_and_groups_are_named(numbers):
  assert (numbers['conflicts']['values'], numbers['conflicts']['rows']) == (
    1,
    2,
  )
  ((first, second),) = numbers['conflicts']['examples']
  assert first['text'] == 'one and the same'
  assert {first['label'], second['label']} == {'good', 'bad'}
  assert numbers['groups']['shared'] == [['train', 'test', 1, ['f2']]]


def test_the_planted_wrong_label_is_in_doubt(numbers):
  found = numbers['label_errors']
  texts = [item['text'] for item in found['found']]
  assert any(text.endswith('lovely 40') for text in texts)
  assert found['accuracy'] > 0.9 and found['count'] < 8
  assert sum(found['by_split'].values()) == found['count'] == len(texts)


def test_lengths_balance_and_unseen_words_are_those_of_a_loop(source, numbers):
  for name, columns in source.splits.items():
    lengths = [len(checks.words(text)) for text in columns['text']]
    summary = numbers['lengths']['summary'][name]
    assert summary['mean'] == pytest.approx(np.mean(lengths))
    assert (summary['min'], summary['max']) == (min(lengths), max(lengths))
    assert sum(
      numbers['lengths']['histogram']['shares'][name]
    ) == pytest.approx(1)
    assert sum(numbers['balance'][name]) == numbers['splits'][name]
  assert numbers['lengths']['empty'] == {'train': 0, 'test': 1}
  train = {
    w
    for t in source.splits['train']['text']
    for w in t.replace(',', '').lower().split()
  }
  test = [
    w
    for t in source.splits['test']['text']
    for w in t.replace(',', '').lower().split()
  ]
  unseen = [w for w in test if w not in train]
  assert numbers['unseen']['test']['running'] == len(unseen) / len(test)
  assert numbers['unseen']['test']['most'][0] == ['zyzzyva', 2]


def test_the_terminal_shows_every_planted_fault_within_100_columns(numbers):
  shown = findings.terminal(numbers)
  assert max(map(len, shown.splitlines())) <= 100
  text = ' '.join(shown.split())
  for said in (
    '! Leakage from train into test: 1 of 24 texts equal, 1 nearly equal',
    '! Texts with conflicting labels: 1 (2 rows).',
    "! Leakage: groups with rows in train and test: 1, 'f2' among them.",
    '! Empty texts in test: 1.',
    'Repeated texts in train: 1 of 104.',
  ):
    assert said in text


def test_clean_data_is_called_clean():
  labels = np.array([0, 1] * 10, np.int32)
  texts = [
    f'{SUBJECTS[k % 10]} number {k} {"ab"[k % 2] * 9}' for k in range(40)
  ]
  splits = {
    name: {'text': np.array(some, object), 'label': labels}
    for name, some in (('train', texts[:20]), ('test', texts[20:]))
  }
  source = reading.Source('clean', splits, ('x', 'y'))
  found = report.measure(source, report.Options(threshold=1.0, folds=0))
  said = [f.text for f in findings.findings(found)]
  assert 'No text stands in two splits, nearly or exactly.' in said
  assert 'Label errors were not looked for: folds is 0.' in said
  assert not any('Leakage' in text or 'conflict' in text for text in said)


def test_the_page_is_self_contained_and_says_what_json_says(
  tmp_path, source, numbers
):
  written = page.write(tmp_path / 'out', source, numbers)
  names = {path.name for path in written}
  assert names == {'report.html', 'report.json', 'balance.png', 'sizes.png'}
  html = written[0].read_text()
  for banned in ('<script', '<link', 'http://', 'https://', 'src="/'):
    assert banned not in html
  values = json.loads(written[1].read_text())
  assert values['copies']['equal'] == [[1, 1], [1, 0]]
  for finding in values['findings']:
    assert finding['text'].replace("'", '&#x27;') in html
  assert html.count('<img alt="') == 3


def make_images():
  random = np.random.default_rng(0)
  images = np.kron(random.random((60, 4, 4, 1)), np.ones((1, 2, 2, 1)))
  labels = (images.mean((1, 2, 3)) > np.median(images.mean((1, 2, 3)))) * 1
  images[40], images[41] = images[0], 0.5
  splits = {'train': slice(0, 40), 'test': slice(40, 60)}
  return reading.Source(
    'blobs',
    {
      name: {'image': images[rows], 'label': labels[rows].astype(np.int32)}
      for name, rows in splits.items()
    },
    ('dark', 'light'),
  )


def test_planted_images_are_found_and_drawn(tmp_path):
  source = make_images()
  numbers = report.measure(source)
  assert numbers['copies']['equal'].tolist() == [[0, 1], [1, 0]]
  assert numbers['images']['constant'] == {'train': 0, 'test': 1}
  text = findings.terminal(numbers)
  assert 'Leakage from train into test: 1 of 20 images equal' in text
  written = page.write(tmp_path, source, numbers)
  assert (tmp_path / 'copies.png') in written


def test_given_features_judge_the_labels(source):
  labels = checks.pooled(source.splits, 'label')
  options = report.Options(features=np.eye(2)[labels])
  found = report.measure(source, options)['label_errors']
  assert (found['accuracy'], found['count']) == (1.0, 0)
  with pytest.raises(UsageError, match=r'one row for each of the 128 rows'):
    report.measure(source, report.Options(features=np.zeros((3, 2))))


def test_tokens_are_counted_with_a_tokenizer(source, tiny_bert):
  from fmeta import text

  tokenizer = text.load_tokenizer(tiny_bert)
  found = report.measure(source, report.Options(folds=0, tokenizer=tokenizer))
  assert found['lengths']['unit'] == 'tokens'
  assert found['lengths']['summary']['test']['min'] == 2  # [CLS] and [SEP]
  assert found['lengths']['unknown_tokens'] == {'train': 0.0, 'test': 0.0}


def test_embeddings_of_a_model_are_those_of_one_text_at_a_time(tiny_bert):
  from fmeta.data.embedding import embed

  texts = ['a short one', 'a somewhat longer text than the first', 'short']
  together = embed(str(tiny_bert), texts)
  assert together.shape == (3, 16)
  alone = embed(str(tiny_bert), texts[1:2])
  np.testing.assert_allclose(together[1:2], alone, atol=1e-5)


FORMATS = {
  'a.csv': 'text,label,file\n"x, y",b,1\n"said ""no""",a,2\n',
  'a.tsv': 'text\tlabel\tfile\nx, y\tb\t1\nsaid "no"\ta\t2\n',
  'a.jsonl': (
    '{"text": "x, y", "label": "b", "file": 1}\n\n'
    '{"text": "said \\"no\\"", "label": "a", "file": 2}\n'
  ),
}


@pytest.mark.parametrize('name', FORMATS)
def test_formats_hold_the_same_rows(tmp_path, name):
  path = tmp_path / name
  path.write_text(FORMATS[name])
  source = reading.from_files({'train': path}, group='file')
  columns = source.splits['train']
  assert columns['text'].tolist() == ['x, y', 'said "no"']
  assert columns['label'].tolist() == [1, 0] and source.classes == ('a', 'b')
  assert columns['group'].tolist() == ['1', '2']


def test_files_without_names_are_read_by_number(tmp_path):
  path = tmp_path / 'a.tsv'
  path.write_text('one\t5\ntwo\t3\n')
  source = reading.from_files({'train': path}, '0', '1')
  assert source.splits['train']['text'].tolist() == ['one', 'two']
  assert source.classes == ('3', '5')


BAD = [
  (['clinc'], "no data set 'clinc'; did you mean 'clinc150'?"),
  (['train=a.csv', 'train=a.csv'], 'is not a new SPLIT=FILE'),
  (['train=a.txt'], "ends in '.txt'"),
  (['train=none.csv'], 'cannot read'),
  (['train=a.csv', '--text=body'], "no column 'body' in line 2"),
  (['train=empty.csv'], 'holds no examples'),
  (['train=hole.csv'], 'has no label in line 3'),
  (['train=bad.jsonl'], 'line 1 is not JSON'),
  (['train=a.csv', '--reference=test'], "no split 'test'"),
  (['train=a.csv', '--features=a.csv'], 'is no readable .npy file'),
  (['train=a.csv', '--threshold=2'], 'threshold 2.0 is out of range'),
  (['train=a.csv', '--fold=x'], 'invalid int value'),
  (['train=a.csv', '--data_dir=x'], '--data_dir is for a named data set'),
  (['digits', '--text=0'], 'digits knows its columns'),
  (['train=a.csv', '--out=a.csv'], "cannot write to 'a.csv'"),
  (['train=a.csv', '--tokenizer=.'], 'no tokenizer.json'),
  (['train=a.csv', '--features=nan.npy'], 'hold NaN or infinity'),
  ([], 'the following arguments are required'),
]


@pytest.mark.parametrize('arguments, said', BAD)
def test_bad_input_is_one_line_and_exit_2(
  tmp_path, monkeypatch, capsys, arguments, said
):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'a.csv').write_text('text,label\nx,a\ny,b\n')
  (tmp_path / 'empty.csv').write_text('text,label\n')
  (tmp_path / 'hole.csv').write_text('text,label\nx,a\ny,\n')
  (tmp_path / 'bad.jsonl').write_text('{text\n')
  np.save(tmp_path / 'nan.npy', np.full((2, 2), np.nan))
  assert command.main(['report', *arguments]) == 2
  out, err = capsys.readouterr()
  assert out == '' and err.count('\n') == 1
  assert err.startswith('error: ') and said in err


def test_the_command_writes_the_folder_and_prints_the_table(
  tmp_path, files, capsys
):
  arguments = [f'{split}={path}' for split, path in files.items()]
  out = tmp_path / 'look'
  status = command.main(
    ['report', *arguments, '--group=file', '--folds=0', f'--out={out}']
  )
  assert status == 0
  assert (out / 'report.html').exists() and (out / 'report.json').exists()
  assert 'Leakage from train into test' in capsys.readouterr().out


def test_trec_repeats_ten_questions_across_its_splits(shared_data):
  source = reading.NAMED['trec'](str(shared_data))
  assert source.kind == 'text' and len(source.classes) == 6
  found = report.measure(source, report.Options(folds=0))
  train, test = (set(c['text']) for c in source.splits.values())
  assert len(train & test) == found['copies']['equal'][0][1] == 10
  assert found['copies']['near'][0][1] == 2


def test_sst2_is_read_by_its_name(shared_data):
  source = reading.NAMED['sst2'](str(shared_data))
  sizes = {name: len(part['label']) for name, part in source.splits.items()}
  assert sizes == {'train': 6920, 'validation': 872, 'test': 1821}
  assert source.classes == ('negative', 'positive')


def test_clinc150_repeats_texts_across_its_splits(shared_data):
  raw = json.loads((shared_data / 'clinc150' / 'data_full.json').read_text())
  splits = {
    name: {'text': np.array([text for text, _ in raw[name]], object)}
    for name in ('train', 'val', 'test')
  }
  unique = checks.unique(splits, 'text')
  none = np.zeros(0, int)
  pairs = report.duplicates.Pairs(none, none, none)
  found = checks.copies(unique.counts(3), pairs)
  assert found.equal.tolist() == [[0, 3, 2], [3, 0, 0], [2, 0, 0]]
