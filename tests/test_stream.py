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


def test_permuted_pixels_move_together_in_every_image_and_split():
  image = np.arange(2 * 3 * 4 * 2).reshape(2, 3, 4, 2)
  label = np.array([1, 0])
  out = stream.permuted({'image': image, 'label': label}, 1)
  assert out['label'] is label
  flat, moved = image.reshape(2, 12, 2), out['image'].reshape(2, 12, 2)
  # Where pixel 0 of the first image went tells where all of them did.
  order = [int(np.flatnonzero(flat[0, :, 0] == v)[0]) for v in moved[0, :, 0]]
  assert sorted(order) == list(range(12)) and order != list(range(12))
  np.testing.assert_array_equal(moved, flat[:, order])
  again = stream.permuted({'image': image[1:]}, 1)
  np.testing.assert_array_equal(again['image'][0], out['image'][1])


def test_other_seeds_permute_otherwise():
  image = np.arange(49).reshape(1, 7, 7, 1)
  first, second = (
    stream.permuted({'image': image}, seed)['image'] for seed in (1, 2)
  )
  assert not np.array_equal(first, second)


def test_images_without_channels_are_refused():
  with pytest.raises(UsageError, match=r'shape \(2, 4, 4\); give \[N, H'):
    stream.permuted({'image': np.zeros((2, 4, 4))}, 0)
