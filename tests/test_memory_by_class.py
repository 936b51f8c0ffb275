"""Memories with a quota per class or per task, and herding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmeta import memory
from fmeta.errors import UsageError
from fmeta.memory import ranked
from fmeta.memory.class_balanced import admit

KEY = jax.random.key(4)
INT = jax.ShapeDtypeStruct((), jnp.int32)
SPEC = {'x': INT, 'label': INT}


def _fill(held, labels, batch_size=7, weight=None):
  """Row number k is x = k."""
  insert = jax.jit(held.insert)
  filled = held.init()
  labels = np.asarray(labels, np.int32)
  weight = np.ones(len(labels), np.float32) if weight is None else weight
  for start in range(0, len(labels), batch_size):
    part = slice(start, start + batch_size)
    rows = {'x': np.arange(len(labels), dtype=np.int32)[part]}
    filled = insert(filled, {**rows, 'label': labels[part]}, weight[part], KEY)
  return filled


def _held(filled):
  return set(np.asarray(filled['rows']['x'])[ranked.occupied(filled)])


def by_hand(labels, capacity):
  """Greedy: give each class in turn its next best row, until it is full."""
  number = jnp.arange(len(labels))
  drawn = ranked.priorities(number, jnp.ones(len(labels), bool), KEY)
  best = sorted(range(len(labels)), key=lambda k: tuple(-drawn[k]))
  queues = {c: [k for k in best if labels[k] == c] for c in set(labels)}
  chosen = []
  for turn in range(len(labels)):
    ready = [queue[turn] for queue in queues.values() if turn < len(queue)]
    chosen += sorted(ready, key=best.index)
  return set(chosen[:capacity])


# Long-tailed, class after class; and mixed.
LABELS = [0] * 24 + [1] * 3 + [2] * 10 + [7] * 1 + [3] * 11
MIXED = np.random.default_rng(0).permutation(LABELS).tolist()


@pytest.mark.parametrize('labels', [LABELS, MIXED], ids=['blocks', 'mixed'])
def test_class_balanced_holds_the_best_rows_of_each_class(labels):
  held = memory.class_balanced(16, SPEC)
  insert = jax.jit(held.insert)
  filled = held.init()
  for k in range(0, len(labels), 7):
    rows = {'x': jnp.arange(k, k + 7), 'label': jnp.asarray(labels[k : k + 7])}
    filled = insert(filled, rows, jnp.ones(7), KEY)
    assert _held(filled) == by_hand(labels[: k + 7], 16)
    x, there = np.asarray(filled['rows']['x']), ranked.occupied(filled)
    np.testing.assert_array_equal(
      np.asarray(filled['rows']['label'])[there], np.asarray(labels)[x[there]]
    )


def test_quotas_are_equal_as_far_as_the_rows_of_a_class_go():
  filled = _fill(memory.class_balanced(16, SPEC), LABELS)
  found = np.asarray(memory.quotas(filled, 8))
  # Level 4: classes 1 and 7 have but 3 and 1, the others share 12.
  np.testing.assert_array_equal(found, [4, 3, 4, 4, 0, 0, 0, 1])
  # One row fewer: one of the three goes without its fourth.
  less = np.asarray(
    memory.quotas(_fill(memory.class_balanced(15, SPEC), LABELS), 8)
  )
  assert sorted(less[[0, 2, 3]]) == [3, 4, 4] and less.sum() == 15


def test_one_class_fills_a_class_balanced_memory_alone():
  filled = _fill(memory.class_balanced(5, SPEC), [3] * 14)
  assert memory.quotas(filled, 4)[3] == 5


@pytest.mark.parametrize('make', [memory.reservoir, memory.class_balanced])
def test_rows_without_weight_never_enter(make):
  weight = (np.arange(49) % 3 != 1).astype(np.float32)
  filled = _fill(make(40, SPEC), LABELS, weight=weight)
  assert _held(filled) == set(np.flatnonzero(weight))
  assert filled['seen'] == weight.sum()


def test_exemplars_give_way_from_the_last():
  held = memory.class_balanced(6, SPEC).init()
  first = {'x': jnp.arange(6), 'label': jnp.zeros(6, jnp.int32)}
  order = jnp.asarray([5, 0, 4, 1, 3, 2])
  held = admit(held, first, order, jnp.ones(6))
  assert _held(held) == set(range(6))
  second = {'x': jnp.arange(10, 14), 'label': jnp.ones(4, jnp.int32)}
  held = admit(
    held, second, jnp.asarray([0, 1, 2, 3]), jnp.asarray([1, 1, 1, 0])
  )
  # Of the first class its first three remain.
  assert _held(held) == {1, 3, 5, 10, 11, 12}
  assert held['seen'] == 9


def test_a_class_balanced_memory_needs_an_integer_to_balance():
  for spec in ({'x': INT}, {'label': jax.ShapeDtypeStruct((3,), jnp.int32)}):
    with pytest.raises(UsageError, match="cannot balance 'label'"):
      memory.class_balanced(4, spec)
  with pytest.raises(UsageError, match='memory capacity 0'):
    memory.class_balanced(0, SPEC)


def _tasks(held, sizes, ends=True):
  insert, end = jax.jit(held.insert), jax.jit(held.end_task)
  filled, start, traces = held.init(), 0, []
  for task, size in enumerate(sizes):
    rows = {'x': start + jnp.arange(10), 'label': jnp.full(10, task)}
    weight = (jnp.arange(10) < size).astype(jnp.float32)
    filled = insert(filled, rows, weight, KEY)
    filled = end(filled) if ends or task + 1 < len(sizes) else filled
    start += 10
    traces.append(insert._cache_size())
  assert traces[-1] == 1
  return filled


def test_each_task_keeps_a_sample_of_its_own_rows():
  filled = _tasks(memory.per_task(3, 4, SPEC), [10, 2, 10])
  rows, valid = memory.task_rows(filled)
  np.testing.assert_array_equal(valid.sum(1), [4, 2, 4])
  np.testing.assert_array_equal(filled['seen'], [10, 2, 10])
  for task in range(3):
    x = np.asarray(rows['x'][task])[valid[task]]
    assert len(set(x)) == len(x) and set(x // 10) == {task}
    assert set(np.asarray(rows['label'][task])[valid[task]]) == {task}
  # The tasks draw for themselves.
  assert set(np.asarray(rows['x'][0]) % 10) != set(
    np.asarray(rows['x'][2]) % 10
  )


def test_the_task_at_hand_is_not_sampled_yet():
  held = memory.per_task(3, 4, SPEC)
  filled = _tasks(held, [10, 3, 10], ends=False)
  assert filled['task'] == 2
  for seed in range(5):
    rows, valid = held.sample(filled, 12, jax.random.key(seed))
    np.testing.assert_array_equal(valid, [1] * 7 + [0] * 5)
    assert set(np.asarray(rows['x'][:7]) // 10) == {0, 1}
    np.testing.assert_array_equal(rows['task'][:7], rows['x'][:7] // 10)
  assert not np.any(held.sample(held.init(), 3, KEY)[1])


def test_nothing_enters_after_the_last_task():
  held = memory.per_task(1, 4, SPEC)
  filled = _tasks(held, [10])
  rows = {'x': jnp.arange(50, 54), 'label': jnp.zeros(4, jnp.int32)}
  after = jax.jit(held.insert)(filled, rows, jnp.ones(4), KEY)
  jax.tree.map(np.testing.assert_array_equal, filled, after)
  with pytest.raises(UsageError, match='task 1 ends in a memory of 1 tasks'):
    held.end_task(filled)


def test_a_task_s_reservoir_is_the_reservoir_of_its_rows():
  filled = _tasks(memory.per_task(2, 4, SPEC), [10, 10])
  alone = memory.reservoir(4, SPEC)
  key = jax.random.fold_in(KEY, 1)
  rows = {'x': 10 + jnp.arange(10), 'label': jnp.ones(10, jnp.int32)}
  expected = jax.jit(alone.insert)(alone.init(), rows, jnp.ones(10), key)
  np.testing.assert_array_equal(filled['rows']['x'][1], expected['rows']['x'])


def test_a_memory_per_task_names_tasks_itself():
  with pytest.raises(UsageError, match="adds 'task' itself"):
    memory.per_task(2, 4, {**SPEC, 'task': INT})


def herding_by_hand(features, size):
  mean, chosen = features.mean(0), []
  while len(chosen) < min(size, len(features)):
    k = len(chosen) + 1
    total = features[chosen].sum(0)
    gaps = np.linalg.norm(mean - (features + total) / k, axis=1)
    gaps[chosen] = np.inf
    chosen.append(int(gaps.argmin()))
  return chosen


def test_herding_is_the_greedy_choice_of_the_paper(x64):
  random = np.random.default_rng(2)
  labels = np.asarray([0, 2, 2, 0, 2, 0, 2, 2, 0, 1, 2, 1])
  features = random.normal(size=(12, 5))
  weight = np.ones(12)
  weight[[2, 9]] = 0
  order = np.asarray(
    jax.jit(memory.herding, static_argnums=(3, 4))(
      features, labels, weight, 4, 4
    )
  )
  for label in range(3):
    rows = np.flatnonzero((labels == label) & (weight > 0))
    expected = rows[herding_by_hand(features[rows], 4)]
    chosen = rows[order[rows] < 4]
    np.testing.assert_array_equal(chosen[np.argsort(order[chosen])], expected)
  np.testing.assert_array_equal(order[[2, 9]], [4, 4])
