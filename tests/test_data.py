"""Batches are pure in (seed, index), the same for any number of processes."""

import gc
import hashlib
import threading

import numpy as np
import pytest

from fmeta import data
from fmeta.errors import UsageError


def make_columns(size=23):
  rng = np.random.default_rng(0)
  return {
    'image': rng.normal(size=(size, 2, 2, 1)).astype(np.float32),
    'label': (np.arange(size) % 3).astype(np.int32),
    'row': np.arange(size, dtype=np.int32),
  }


def assert_same(first, second):
  assert first.keys() == second.keys()
  for name in first:
    assert first[name].dtype == second[name].dtype
    np.testing.assert_array_equal(first[name], second[name])


def test_every_epoch_holds_every_example_once():
  source = data.batches(make_columns(), 5, seed=0)
  stream = np.concatenate([source(i)['row'] for i in range(23)])
  for epoch in stream.reshape(5, 23):
    np.testing.assert_array_equal(np.sort(epoch), np.arange(23))


def test_epochs_and_seeds_have_other_orders():
  columns = make_columns(200)
  first, other = data.batches(columns, 200, 0), data.batches(columns, 200, 1)
  assert np.mean(first(0)['row'] == first(1)['row']) < 0.05
  assert np.mean(first(0)['row'] == other(0)['row']) < 0.05


def test_batches_keep_the_columns_of_a_row_together():
  columns = make_columns()
  batch = data.batches(columns, 7, seed=3)(4)
  assert batch['image'].shape == (7, 2, 2, 1)
  assert_same(batch, data.take(columns, batch['row']))


def test_batches_do_not_depend_on_what_was_read_before():
  columns = make_columns()
  used = data.batches(columns, 5, seed=4)
  order = [9, 2, 30, 4, 2, 0]
  read = {i: used(i) for i in order}
  for i in order:
    assert_same(read[i], data.batches(columns, 5, seed=4)(i))


@pytest.mark.parametrize('batch_size, steps', [(5, 5), (23, 1), (1, 23)])
def test_an_epoch_of_steps_sees_every_example(batch_size, steps):
  source = data.batches(make_columns(), batch_size, seed=0)
  assert source.steps_per_epoch == steps
  seen = np.concatenate([source(i)['row'] for i in range(steps)])
  assert set(seen.tolist()) == set(range(23))


def test_strings_stay_behind():
  columns = {**make_columns(), 'text': np.array(['a'] * 23, object)}
  assert 'text' not in data.batches(columns, 4, seed=0)(0)
  assert 'text' not in data.eval_batches(columns, 4)[0]


def test_collate_sees_the_whole_batch():
  source = data.batches(
    make_columns(), 4, 0, collate=lambda batch: {'sum': batch['row'].sum()}
  )
  assert source(3)['sum'] == source.rows(3).sum()


@pytest.mark.parametrize('processes', [1, 2, 8])
def test_any_number_of_processes_sees_the_same_batch(processes):
  source = data.batches(make_columns(), 16, seed=5)
  for i in range(3):
    parts = [
      data.rows_of_process(source(i), process, processes)
      for process in range(processes)
    ]
    assert all(len(part['row']) == 16 // processes for part in parts)
    joined = {
      name: np.concatenate([part[name] for part in parts]) for name in source(i)
    }
    assert_same(joined, source(i))


def test_rows_of_a_process_reach_into_nested_batches():
  batch = {'support': {'x': np.arange(8)}, 'query': {'x': np.arange(4)}}
  part = data.rows_of_process(batch, 1, 2)
  np.testing.assert_array_equal(part['support']['x'], [4, 5, 6, 7])
  np.testing.assert_array_equal(part['query']['x'], [2, 3])


def test_rows_that_do_not_divide_are_refused():
  with pytest.raises(UsageError, match='6 rows do not divide over 4 proc'):
    data.rows_of_process({'x': np.zeros(6)}, 0, 4)
  with pytest.raises(UsageError, match=r'no process 4 of 4; give 0\.\.3'):
    data.rows_of_process({'x': np.zeros(8)}, 4, 4)


def test_evaluation_covers_each_example_once_in_order():
  columns = make_columns()
  out = data.eval_batches(columns, 5)
  assert [len(batch['row']) for batch in out] == [5] * 5
  rows = np.concatenate([batch['row'] for batch in out])
  weight = np.concatenate([batch['weight'] for batch in out])
  assert weight.dtype == np.float32
  np.testing.assert_array_equal(rows[weight > 0], np.arange(23))
  np.testing.assert_array_equal(weight, [1.0] * 23 + [0.0] * 2)
  np.testing.assert_array_equal(rows[-2:], [22, 22])


def test_evaluation_keeps_given_weights_and_the_caller_s_array():
  given = np.linspace(1, 2, 23, dtype=np.float32)
  columns = {**make_columns(), 'weight': given}
  out = data.eval_batches(columns, 40)
  np.testing.assert_array_equal(out[0]['weight'][:23], given)
  np.testing.assert_array_equal(out[0]['weight'][23:], np.zeros(17))
  assert given[-1] == 2


def test_evaluation_without_a_remainder_has_no_padding():
  out = data.eval_batches(make_columns(20), 5)
  assert len(out) == 4
  assert all(np.all(batch['weight'] == 1) for batch in out)


@pytest.mark.parametrize('batch_size', [0, 24])
def test_a_batch_that_does_not_fit_is_refused(batch_size):
  with pytest.raises(UsageError, match='does not fit 23 examples; give 1..23'):
    data.batches(make_columns(), batch_size, 0)


def test_bad_columns_are_refused():
  with pytest.raises(UsageError, match='the split is empty'):
    data.batches({'label': np.zeros(0, np.int32)}, 1, 0)
  with pytest.raises(UsageError, match='columns differ in length'):
    data.batches({'a': np.zeros(3), 'b': np.zeros(4)}, 1, 0)
  with pytest.raises(UsageError, match='no columns'):
    data.eval_batches({}, 1)
  with pytest.raises(UsageError, match='batch_size 0 is not positive'):
    data.eval_batches(make_columns(), 0)
  with pytest.raises(UsageError, match="no column 'lable'.*mean 'label'"):
    data.column(make_columns(), 'lable')


@pytest.mark.parametrize('wrong', [-1, 3])
def test_labels_out_of_range_are_named(wrong):
  with pytest.raises(UsageError, match=f'label {wrong} of row 2 .* 0..2'):
    data.check_labels(np.array([0, 2, wrong, 1]), 3)


def test_labels_in_range_pass():
  assert data.check_labels(np.array([0, 1, 2]), 3) is None


def test_fingerprint_is_the_sha256_of_the_documented_bytes():
  columns = {
    'text': np.array(['ä', ''], object),
    'label': np.array([1, -2], np.int32),
  }
  stream = (
    b'label\n<i4\n(2,)\n\x01\x00\x00\x00\xfe\xff\xff\xff'
    b'text\nstr\n(2,)\n\x02\0\0\0\0\0\0\0\xc3\xa4\0\0\0\0\0\0\0\0'
  )
  digest = data.fingerprint(columns)
  assert digest == hashlib.sha256(stream).hexdigest()
  assert digest == (
    '3e4193b48762be2c9ba2c0dd3c640a51ca7d408b896458b5b4edf2ee95b6a976'
  )


def test_fingerprint_ignores_layout_but_not_content():
  columns = {'x': np.arange(6, dtype=np.int32).reshape(2, 3)}
  digest = data.fingerprint(columns)
  same = [
    columns['x'].astype('>i4'),
    np.asfortranarray(columns['x']),
    np.repeat(columns['x'], 2, axis=0)[::2],
  ]
  other = [
    columns['x'].astype(np.int64),
    columns['x'].reshape(3, 2),
    columns['x'][::-1],
    columns['x'].astype(np.float32),
  ]
  assert {data.fingerprint({'x': array}) for array in same} == {digest}
  assert digest not in {data.fingerprint({'x': array}) for array in other}
  assert data.fingerprint({'y': columns['x']}) != digest


def test_fingerprint_of_strings_is_that_of_any_string_array():
  texts = ['alpha', 'b']
  first = data.fingerprint({'t': np.array(texts)})
  assert first == data.fingerprint({'t': np.array(texts, object)})
  # Lengths are covered: the same characters cut elsewhere are other texts.
  assert first != data.fingerprint({'t': np.array(['alph', 'ab'])})


def test_fingerprint_refuses_objects():
  with pytest.raises(UsageError, match="column 'x' holds a list"):
    data.fingerprint({'x': np.array([[1], [1, 2]], object)})


def prefetch_threads():
  return [t for t in threading.enumerate() if 'prefetch' in t.name]


@pytest.mark.parametrize('buffer, num_threads', [(4, 1), (3, 4), (0, 1)])
def test_prefetch_equals_reading_in_order(buffer, num_threads):
  source = data.batches(make_columns(), 5, seed=2)
  read = data.prefetch(source, 3, 40, buffer=buffer, num_threads=num_threads)
  got = list(read)
  assert len(got) == 37
  for batch, i in zip(got, range(3, 40), strict=True):
    assert_same(batch, source(i))


def test_prefetch_of_nothing_is_empty():
  assert list(data.prefetch(lambda i: i, 5, 5)) == []


def test_prefetch_reads_in_another_thread():
  read = data.prefetch(lambda i: threading.current_thread().name, 0, 2)
  assert all('prefetch' in name for name in read)


def test_prefetch_ends_its_threads_when_dropped_early():
  read = data.prefetch(lambda i: i, 0, 10**9)
  assert next(read) == 0
  assert prefetch_threads()
  read.close()
  gc.collect()
  for thread in prefetch_threads():
    thread.join(timeout=5)
  assert not prefetch_threads()


def test_prefetch_passes_on_the_source_s_error():
  def source(i):
    if i == 2:
      raise UsageError('row 2 is broken')
    return i

  read = data.prefetch(source, 0, 5)
  assert [next(read), next(read)] == [0, 1]
  with pytest.raises(UsageError, match='row 2 is broken'):
    next(read)
