"""Streams cut the examples into tasks and lose or invent none."""

import numpy as np
import pytest

from fmeta import stream
from fmeta.errors import UsageError


def make_columns(size=24):
  rng = np.random.default_rng(0)
  label = rng.permutation(np.arange(size) % 6).astype(np.int32)
  domains = np.array(['numpy', 'scipy', 'pandas'], object)
  return {
    'label': label,
    'domain': domains[rng.permutation(np.arange(size) % 3)],
    'row': np.arange(size, dtype=np.int32),
  }


def test_classes_are_split_into_tasks_with_their_labels_unchanged():
  columns = make_columns()
  tasks = stream.by_classes(columns, [[4, 0], [1], [5, 3]])
  assert [task.name for task in tasks] == ['task_0', 'task_1', 'task_2']
  for task, group in zip(tasks, [[0, 4], [1], [3, 5]], strict=True):
    expected = np.flatnonzero(np.isin(columns['label'], group))
    np.testing.assert_array_equal(task.columns['row'], expected)
    np.testing.assert_array_equal(
      task.columns['label'], columns['label'][expected]
    )


def test_relabelling_gives_positions_in_the_group():
  columns = make_columns()
  task = stream.by_classes(columns, {'odd': [5, 1, 3]}, relabel=True)[0]
  assert task.name == 'odd'
  original = columns['label'][task.columns['row']]
  np.testing.assert_array_equal(
    np.array([5, 1, 3])[task.columns['label']], original
  )
  assert task.columns['label'].dtype == np.int32
  assert columns['label'].max() == 5


def test_relabelling_does_not_depend_on_the_split():
  train = make_columns()
  test = {k: v[::-1][:17] for k, v in train.items()}
  groups = [[4, 0, 2], [3, 1, 5]]
  for first, second in zip(
    stream.by_classes(train, groups, relabel=True),
    stream.by_classes(test, groups, relabel=True),
    strict=True,
  ):
    lookup = dict(
      zip(first.columns['row'], first.columns['label'], strict=True)
    )
    expected = [lookup[row] for row in second.columns['row']]
    np.testing.assert_array_equal(second.columns['label'], expected)


def test_bad_groups_are_refused():
  columns = make_columns()
  with pytest.raises(UsageError, match="no example has class 7 of task 'b'"):
    stream.by_classes(columns, {'a': [0], 'b': [7]})
  with pytest.raises(UsageError, match="task 'task_1' is empty"):
    stream.by_classes(columns, [[0], []])
  with pytest.raises(UsageError, match="class 0 is in 'task_0' and again in"):
    stream.by_classes(columns, [[0, 1], [2, 0]])
  with pytest.raises(UsageError, match='no groups of classes'):
    stream.by_classes(columns, [])
  with pytest.raises(UsageError, match='the split is empty'):
    stream.by_classes({'label': np.zeros(0, np.int32)}, [[0]])


def test_class_masks_name_each_task_s_classes():
  mask = stream.class_mask([[0, 2], [3]], 5)
  np.testing.assert_array_equal(
    mask,
    [[True, False, True, False, False], [False, False, False, True, False]],
  )
  with pytest.raises(UsageError, match=r'label 5 .* allow 0\.\.4'):
    stream.class_mask([[0], [5]], 5)


def test_values_of_a_column_become_tasks_in_sorted_order():
  columns = make_columns()
  tasks = stream.by_column(columns, 'domain')
  assert [task.name for task in tasks] == ['numpy', 'pandas', 'scipy']
  rows = np.concatenate([task.columns['row'] for task in tasks])
  np.testing.assert_array_equal(np.sort(rows), np.arange(24))
  for task in tasks:
    assert set(task.columns['domain']) == {task.name}


def test_the_order_of_a_stream_can_be_given():
  columns = make_columns()
  tasks = stream.by_column(columns, 'label', np.array([3, 1]))
  assert [task.name for task in tasks] == ['3', '1']
  assert set(tasks[0].columns['label'].tolist()) == {3}


def test_bad_orders_are_refused():
  columns = make_columns()
  with pytest.raises(UsageError, match="domain 'nunpy'.*did you mean 'numpy'"):
    stream.by_column(columns, 'domain', ['nunpy'])
  with pytest.raises(UsageError, match="domain 'numpy' comes twice"):
    stream.by_column(columns, 'domain', ['numpy', 'scipy', 'numpy'])
  with pytest.raises(UsageError, match='is empty; name at least one'):
    stream.by_column(columns, 'domain', [])
  with pytest.raises(UsageError, match="no column 'domian'"):
    stream.by_column(columns, 'domian')


def test_splits_are_aligned_by_task():
  train = make_columns()
  test = {k: v[::-1][:18] for k, v in train.items()}
  first, second = stream.split_stream(train, test, 'domain')
  assert [t.name for t in first] == [t.name for t in second]
  assert set(second[1].columns['domain']) == {'pandas'}


def test_a_task_without_test_examples_is_refused():
  train = make_columns()
  test = {k: v[train['domain'] != 'scipy'] for k, v in train.items()}
  with pytest.raises(UsageError, match="no example has domain 'scipy'"):
    stream.split_stream(train, test, 'domain')


def test_joint_holds_every_example_of_every_task():
  columns = make_columns()
  joint = stream.joint(stream.by_classes(columns, [[0, 1], [2, 3], [4, 5]]))
  order = np.argsort(joint.columns['row'])
  for name, array in columns.items():
    np.testing.assert_array_equal(joint.columns[name][order], array)


def test_tasks_that_do_not_fit_together_are_refused():
  first = stream.Task('a', {'x': np.zeros(2)})
  second = stream.Task('b', {'y': np.zeros(2)})
  with pytest.raises(UsageError, match="task 'b' has columns .'y'."):
    stream.joint([first, second])
  with pytest.raises(UsageError, match='no tasks to join'):
    stream.joint([])


def test_tasks_of_other_image_sizes_are_refused():
  first = stream.Task('a', {'image': np.zeros((2, 8, 8, 1))})
  second = stream.Task('b', {'image': np.zeros((2, 9, 9, 1))})
  with pytest.raises(UsageError, match=r"'b' has rows of .*\(9, 9, 1\)"):
    stream.joint([first, second])


def test_a_column_of_numbers_that_names_the_task_is_left_out_unless_kept():
  columns = make_columns()
  columns['user'] = columns['row'] % 2
  for task in stream.by_column(columns, 'user'):
    assert set(task.columns) == {'label', 'domain', 'row'}
  kept = stream.by_column(columns, 'user', keep=True)
  assert [set(t.columns['user'].tolist()) for t in kept] == [{0}, {1}]
  first, second = stream.split_stream(columns, columns, 'user', keep=True)
  assert 'user' in first[0].columns and 'user' in second[1].columns
  assert 'domain' in stream.by_column(columns, 'domain')[0].columns


def test_class_orders_hold_every_class_once_and_are_the_same_everywhere():
  groups = stream.class_orders(10, 5, 0)
  assert [len(group) for group in groups] == [2] * 5
  assert sorted(sum(groups, ())) == list(range(10))
  # Fixed for good: results name their order by its seed.
  assert groups == [(1, 8), (2, 6), (9, 5), (7, 4), (3, 0)]
  assert stream.class_orders(10, 5, 1) != groups
  assert [len(g) for g in stream.class_orders(7, 3, 0)] == [3, 2, 2]
  with pytest.raises(UsageError, match='3 classes do not make 4 tasks'):
    stream.class_orders(3, 4, 0)


def test_task_orders_are_permutations():
  orders = {tuple(stream.task_order(10, seed)) for seed in range(5)}
  assert len(orders) == 5
  assert all(sorted(order) == list(range(10)) for order in orders)


def test_what_may_be_answered_follows_the_scenario():
  groups = [[0, 2], [3], [1]]
  task = stream.allowed_classes(groups, 5, 'task')
  np.testing.assert_array_equal(task, stream.class_mask(groups, 5))
  seen = stream.allowed_classes(groups, 5, 'class')
  assert [np.flatnonzero(row).tolist() for row in seen] == [
    [0, 2],
    [0, 2, 3],
    [0, 1, 2, 3],
  ]
  assert stream.allowed_classes(groups, 5, 'none').all()
  with pytest.raises(UsageError, match="'clas'; did you mean 'class'"):
    stream.allowed_classes(groups, 5, 'clas')


def test_masks_travel_with_the_examples():
  columns = make_columns()
  groups = [[4, 0], [1, 2], [5, 3]]
  tasks = stream.by_classes(columns, groups)
  seen = stream.allowed_classes(groups, 6, 'class')
  train = stream.with_allowed(tasks, seen)
  for task, mask in zip(train, seen, strict=True):
    size = len(task.columns['label'])
    np.testing.assert_array_equal(task.columns['allowed'], [mask] * size)
  # Tested after the last task: all classes of the stream, whatever the task.
  for task in stream.with_allowed(tasks, seen[-1]):
    assert task.columns['allowed'].all()
  assert 'allowed' not in tasks[0].columns
  with pytest.raises(UsageError, match='label . of task .task_1. is not among'):
    stream.with_allowed(tasks, seen[0])
  with pytest.raises(UsageError, match='2 masks for 3 tasks'):
    stream.with_allowed(tasks, seen[:2])
  with pytest.raises(UsageError, match=r'int64 \(3, 6\); give bool'):
    stream.with_allowed(tasks, seen.astype(int))


def test_data_sets_become_tasks_with_classes_of_their_own():
  sources = {
    'digits': {'label': np.array([0, 1, 2], np.int8)},
    'letters': {'label': np.array([1, 0], np.int8)},
  }
  first, second = stream.of_datasets(sources, [3, 2])
  assert (first.name, second.name) == ('digits', 'letters')
  assert first.columns['label'].tolist() == [0, 1, 2]
  assert second.columns['label'].tolist() == [4, 3]
  assert second.columns['label'].dtype == np.int8
  assert sources['letters']['label'].tolist() == [1, 0]
  shared = stream.of_datasets(sources)
  assert shared[1].columns['label'].tolist() == [1, 0]
  with pytest.raises(UsageError, match='label 2 of row 2 is out of range'):
    stream.of_datasets(sources, [2, 2])
  with pytest.raises(UsageError, match='1 numbers of classes for 2 data sets'):
    stream.of_datasets(sources, [3])
