"""Episodes are fair, disjoint, and one list whatever the meta-batch."""

import numpy as np
import pytest
import scipy.stats

from fmeta import controls, data, episodes, text
from fmeta.errors import UsageError


def make_columns(classes=12, examples=7):
  label = np.repeat(np.arange(classes, dtype=np.int32), examples)
  # Interleaved by a fixed step, coprime to the number of rows.
  label = label[np.arange(len(label)) * 5 % len(label)]
  row = np.arange(len(label), dtype=np.int32)
  return {
    'image': row.astype(np.float32)[:, None, None, None].repeat(2, 1),
    'label': label,
    'original': label,
    'row': row,
  }


def assert_same(first, second):
  for part in ('support', 'query'):
    assert first[part].keys() == second[part].keys()
    for name, array in first[part].items():
      assert array.dtype == second[part][name].dtype
      np.testing.assert_array_equal(array, second[part][name])


def flat(source, part, name, num):
  """[num * tasks, rows] of one column."""
  return np.concatenate([source(i)[part][name] for i in range(num)])


def test_shapes_and_types_are_those_of_the_meta_batch():
  out = episodes.episodes(make_columns(), 5, 2, 3, seed=0, tasks=4)(1)
  assert out['support']['image'].shape == (4, 10, 2, 1, 1)
  assert out['query']['image'].shape == (4, 15, 2, 1, 1)
  assert out['support']['label'].shape == (4, 10)
  assert out['query']['label'].dtype == np.int32
  assert out['query']['image'].dtype == np.float32


def test_a_row_keeps_all_of_its_columns():
  columns = make_columns()
  out = episodes.episodes(columns, 5, 2, 3, seed=0, tasks=4)(2)
  for part in out.values():
    np.testing.assert_array_equal(part['image'], columns['image'][part['row']])
    np.testing.assert_array_equal(
      part['original'], columns['label'][part['row']]
    )


def test_support_and_query_are_disjoint_and_without_repeats():
  # All seven examples of a class are used: a repeat would leave one out.
  source = episodes.episodes(make_columns(), 5, 3, 4, seed=1, tasks=8)
  for i in range(20):
    out = source(i)
    rows = np.concatenate([out[p]['row'] for p in ('support', 'query')], 1)
    assert all(len(np.unique(task)) == 35 for task in rows)


def test_each_label_is_one_class_with_its_shots_and_queries():
  source = episodes.episodes(make_columns(), 5, 2, 3, seed=2, tasks=8)
  out = source(0)
  for task in range(8):
    owner = {}
    for part, count in (('support', 2), ('query', 3)):
      label = out[part]['label'][task]
      np.testing.assert_array_equal(np.bincount(label), [count] * 5)
      for value, original in zip(
        label, out[part]['original'][task], strict=True
      ):
        assert owner.setdefault(value, original) == original
    assert len(set(owner.values())) == 5


def test_any_prefix_of_whole_shots_is_balanced():
  label = episodes.episodes(make_columns(), 4, 3, 1, 0)(0)['support']['label']
  np.testing.assert_array_equal(label[0], [0, 1, 2, 3] * 3)


@pytest.mark.parametrize('tasks', [2, 3, 4, 12])
def test_the_size_of_the_meta_batch_does_not_change_the_tasks(tasks):
  # 5 * (1 + 1 + 2) = 20 words; 3 * (1 + 3) = 12; 5 * (1 + 4) = 25 is no
  # multiple of a block.
  for sizes in ((5, 1, 2), (3, 1, 2), (5, 1, 3)):
    one = episodes.episodes(make_columns(), *sizes, 3)
    many = episodes.episodes(make_columns(), *sizes, 3, tasks=tasks)
    for part in ('support', 'query'):
      for name in ('row', 'label'):
        np.testing.assert_array_equal(
          flat(one, part, name, 12), flat(many, part, name, 12 // tasks)
        )


def test_episodes_are_pure_in_seed_and_index():
  used = episodes.episodes(make_columns(), 5, 1, 2, 4, tasks=2)
  for i in (9, 2, 10**6, 2):
    fresh = episodes.episodes(make_columns(), 5, 1, 2, 4, tasks=2)
    assert_same(used(i), fresh(i))
  other = episodes.episodes(make_columns(), 5, 1, 2, 5, tasks=2)
  assert not np.array_equal(used.rows(0)[0], other.rows(0)[0])
  assert not np.array_equal(used.rows(0)[0], used.rows(1)[0])


def test_episodes_are_the_same_forever():
  # Recorded 2026-11; a change would silently break every resumed run.
  support, query = episodes.episodes(make_columns(), 3, 1, 2, 0).rows(5)
  assert support.tolist() == [[7, 5, 31]]
  assert query.tolist() == [[8, 55, 82, 41, 72, 48]]


@pytest.mark.parametrize('processes', [1, 2, 8])
def test_any_number_of_processes_sees_the_same_tasks(processes):
  whole = episodes.episodes(make_columns(), 5, 1, 2, 0, tasks=8)(3)
  parts = [data.rows_of_process(whole, p, processes) for p in range(processes)]
  joined = {
    part: {
      name: np.concatenate([share[part][name] for share in parts])
      for name in whole[part]
    }
    for part in whole
  }
  assert_same(joined, whole)


def test_classes_and_their_labels_are_drawn_with_equal_chance():
  source = episodes.episodes(make_columns(6), 3, 1, 1, 0, tasks=2000)
  classes = source(0)['support']['original']
  for position in range(3):
    counts = np.bincount(classes[:, position], minlength=6)
    assert scipy.stats.chisquare(counts).pvalue > 0.01
  # Ordered triples: which classes meet is uniform as well.
  _, counts = np.unique(classes @ np.array([36, 6, 1]), return_counts=True)
  assert len(counts) == 6 * 5 * 4
  assert scipy.stats.chisquare(counts).pvalue > 0.01


def test_a_class_s_examples_are_drawn_with_equal_chance():
  columns = make_columns(3, 7)
  extra = {
    k: np.concatenate([v, v[columns['label'] == 0]]) for k, v in columns.items()
  }
  extra['row'] = np.arange(28, dtype=np.int32)  # class 0 now has 14 examples
  source = episodes.episodes(extra, 2, 1, 2, 1, tasks=3000)
  for part in ('support', 'query'):
    rows = source(0)[part]['row']
    original = extra['label'][rows]
    for value in range(3):
      _, counts = np.unique(rows[original == value], return_counts=True)
      assert len(counts) == (14 if value == 0 else 7)
      assert scipy.stats.chisquare(counts).pvalue > 0.01


def test_classes_can_be_named_and_restrict_the_draw():
  wanted = [np.int64(3), 5, 8]
  source = episodes.episodes(
    make_columns(), 2, 1, 1, 0, tasks=50, classes=wanted
  )
  assert set(source(0)['query']['original'].ravel().tolist()) == {3, 5, 8}


def test_a_column_of_strings_can_name_the_classes():
  columns = make_columns()
  names = np.array([f'name_{value % 4}' for value in columns['label']], object)
  columns = {**columns, 'name': names}
  source = episodes.episodes(columns, 3, 1, 1, 0, tasks=5, key='name')
  out = source(0)['query']
  assert 'name' not in out
  assert all(len(set(task.tolist())) == 3 for task in out['original'] % 4)
  np.testing.assert_array_equal(out['label'], [[0, 1, 2]] * 5)


def test_impossible_episodes_are_refused():
  columns = make_columns(4, 7)
  cases = [
    ((5, 1, 1), {}, '5 ways need 5 classes, there are 4'),
    ((2, 5, 3), {}, r'class 0 has 7 examples; 5 shots \+ 3 queries need 8'),
    ((0, 1, 1), {}, 'ways 0 is not positive'),
    ((2, 1, 0), {}, 'queries 0 is not positive'),
    ((2, 1, 1), {'tasks': 0}, 'tasks 0 is not positive'),
    ((2, 1, 1), {'classes': [1, 9]}, 'no example has label 9; possible'),
    ((2, 1, 1), {'key': 'labl'}, "no column 'labl'; did you mean 'label'"),
    ((3, 1, 1), {'classes': [1, 2, 2]}, '3 ways need 3 classes, there are 2'),
  ]
  for sizes, options, message in cases:
    with pytest.raises(UsageError, match=message):
      episodes.episodes(columns, *sizes, 0, **options)


def test_classes_with_enough_examples_are_found():
  columns = {'label': np.array([0, 1, 1, 2, 2, 2])}
  assert episodes.classes_with(columns, 2) == [1, 2]
  columns = {'name': np.array(['b', 'a', 'b'], object)}
  assert episodes.classes_with(columns, 2, key='name') == ['b']


def test_evaluation_episodes_are_a_fixed_list():
  columns = make_columns()
  listed = episodes.evaluation_episodes(columns, 5, 1, 2, 0, 12, tasks=4)
  source = episodes.episodes(columns, 5, 1, 2, 0, tasks=4)
  assert len(listed) == 3
  for i, episode in enumerate(listed):
    assert_same(episode, source(i))
  assert_same(listed[-1], source(2))
  assert_same(listed[1:][0], source(1))
  with pytest.raises(IndexError):
    listed[3]
  with pytest.raises(UsageError, match='10 episodes do not divide into'):
    episodes.evaluation_episodes(columns, 5, 1, 2, 0, 10, tasks=4)


def test_shuffled_support_labels_agree_by_chance_only():
  source = episodes.episodes(make_columns(), 5, 1, 2, 0, tasks=4)
  agree = []
  for i in range(500):
    true = source(i)
    shuffled = controls.shuffle_support_labels(true, seed=1)
    support = shuffled['support']['label']
    np.testing.assert_array_equal(np.sort(support), [[0, 1, 2, 3, 4]] * 4)
    agree.append(support == true['support']['label'])
    assert shuffled['query'] is true['query']
  # 2,000 tasks, one fixed point expected in each with variance 1: the mean
  # of agreement is .2 +- .0045.
  assert np.mean(agree) == pytest.approx(0.2, abs=0.0135)
  # One and the same shuffle for all tasks would give 0 or 1 here.
  assert np.mean(agree, axis=(0, 1)) == pytest.approx(0.2, abs=0.03)


def test_shuffling_changes_only_labels_and_is_pure():
  episode = episodes.episodes(make_columns(), 5, 3, 2, 0, tasks=2)(0)
  before = episode['support']['label'].copy()
  first = controls.shuffle_support_labels(episode, 7)
  assert_same(first, controls.shuffle_support_labels(episode, 7))
  np.testing.assert_array_equal(episode['support']['label'], before)
  np.testing.assert_array_equal(
    first['support']['row'], episode['support']['row']
  )
  other = controls.shuffle_support_labels(episode, 8)
  assert not np.array_equal(
    first['support']['label'], other['support']['label']
  )


def test_rotations_are_new_classes():
  rng = np.random.default_rng(0)
  image = rng.integers(0, 255, (6, 5, 5, 2)).astype(np.uint8)
  columns = {
    'image': image,
    'label': np.array([0, 0, 3, 3, 2, 2], np.int32),
    'name': np.array(list('aabbcc'), object),
  }
  out = episodes.with_rotations(columns)
  assert out['image'].dtype == np.uint8 and out['label'].dtype == np.int32
  assert len(np.unique(out['label'])) == 12
  for turn in range(4):
    rows = slice(6 * turn, 6 * turn + 6)
    np.testing.assert_array_equal(
      out['label'][rows], columns['label'] + 4 * turn
    )
    np.testing.assert_array_equal(out['name'][rows], columns['name'])
    for given, turned in zip(image, out['image'][rows], strict=True):
      np.testing.assert_array_equal(turned, np.rot90(given, turn))


def test_oblong_images_are_refused():
  columns = {'image': np.zeros((2, 3, 4, 1)), 'label': np.arange(2)}
  with pytest.raises(UsageError, match='cannot be rotated'):
    episodes.with_rotations(columns)


def test_texts_are_padded_to_one_bucket_for_support_and_query():
  columns = make_columns()
  num = len(columns['label'])
  # One text in 21 is long: about half of the meta-batches hold none.
  row = np.arange(num, dtype=np.int32)
  length = np.where(row % 21 == 0, 20, 2 + row % 10).astype(np.int32)
  ids = np.where(np.arange(32)[None] < length[:, None], 1, 0).astype(np.int32)
  columns = {**columns, 'input_ids': ids, 'length': length}
  source = episodes.episodes(
    columns, 2, 1, 2, 0, tasks=3, collate=text.bucket_collate((8, 16, 32))
  )
  widths = set()
  for i in range(40):
    out = source(i)
    rows = [out[part]['row'] for part in ('support', 'query')]
    longest = max(length[r].max() for r in rows)
    width = next(w for w in (8, 16, 32) if w >= longest)
    assert out['support']['input_ids'].shape == (3, 2, width)
    assert out['query']['attention_mask'].shape == (3, 4, width)
    np.testing.assert_array_equal(
      out['query']['attention_mask'].sum(-1), length[out['query']['row']]
    )
    widths.add(width)
  assert widths == {16, 32}
