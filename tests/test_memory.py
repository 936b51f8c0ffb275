import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from fmeta import memory
from fmeta.errors import UsageError

KEY = jax.random.key(9)
SPEC = {'x': jax.ShapeDtypeStruct((), jnp.int32)}


def _rows(start, stop):
  return {'x': jnp.arange(start, stop), 'other': jnp.zeros((stop - start, 2))}


def _insert(held, filled, rows, weight):
  return jax.jit(held.insert)(filled, rows, weight, KEY)


def _same(x, y):
  jax.tree.map(np.testing.assert_array_equal, x, y)


def test_every_row_is_held_with_equal_probability():
  held = memory.reservoir(5, SPEC)
  rows, trials = 20, 2000

  def stream(key):
    filled = held.insert(held.init(), _rows(0, rows), jnp.ones(rows), key)
    return filled['rows']['x']

  contents = jax.jit(jax.vmap(stream))(jax.random.split(KEY, trials))
  assert all(len(set(row)) == 5 for row in np.asarray(contents)[:50])
  counts = np.bincount(np.asarray(contents).ravel(), minlength=rows)
  # Within a trial the counts are negatively correlated, so the statistic is
  # (1 - 5/20) / (1 - 1/20) of a chi-square in the mean: scale it up.
  expected = trials * 5 / rows
  statistic = np.sum((counts - expected) ** 2 / expected) * (19 / 15)
  assert 0.001 < stats.chi2.sf(statistic, rows - 1) < 0.999


def test_one_by_one_and_in_batches_are_bitwise_equal():
  held = memory.reservoir(7, SPEC)
  insert = jax.jit(held.insert)
  results = []
  for size in (1, 6, 30):
    filled = held.init()
    for start in range(0, 30, size):
      rows = _rows(start, start + size)
      filled = insert(filled, rows, jnp.ones(size), KEY)
    results.append(filled)
  _same(results[0], results[1])
  _same(results[0], results[2])
  assert results[0]['seen'] == 30


def test_the_first_rows_fill_the_slots_in_order():
  held = memory.reservoir(4, SPEC)
  filled = _insert(held, held.init(), _rows(10, 13), jnp.ones(3))
  np.testing.assert_array_equal(filled['rows']['x'], [10, 11, 12, 0])
  assert set(filled['rows']) == {'x'}


def test_padding_rows_are_not_inserted_and_do_not_count():
  held = memory.reservoir(4, SPEC)
  weight = jnp.asarray([1.0, 0, 0, 1, 1, 0, 1, 1, 1, 0])
  padded = _insert(held, held.init(), _rows(0, 10), weight)
  real = np.flatnonzero(weight)
  bare = _insert(held, held.init(), {'x': jnp.asarray(real)}, jnp.ones(6))
  _same(padded, bare)
  empty = _insert(held, held.init(), _rows(0, 10), jnp.zeros(10))
  _same(empty, held.init())


def test_samples_are_distinct_and_marked_where_empty():
  held = memory.reservoir(6, SPEC)
  filled = _insert(held, held.init(), _rows(10, 14), jnp.ones(4))
  sample = jax.jit(held.sample, static_argnums=1)
  for seed in range(20):
    rows, valid = sample(filled, 5, jax.random.key(seed))
    np.testing.assert_array_equal(valid, [1, 1, 1, 1, 0])
    assert set(np.asarray(rows['x'][:4])) == {10, 11, 12, 13}
  _, valid = held.sample(held.init(), 3, KEY)
  assert not np.any(valid)


def test_every_held_row_is_sampled_equally_often():
  held = memory.reservoir(8, SPEC)
  filled = _insert(held, held.init(), _rows(0, 8), jnp.ones(8))
  draw = jax.jit(jax.vmap(lambda key: held.sample(filled, 2, key)[0]['x']))
  counts = np.bincount(
    np.asarray(draw(jax.random.split(KEY, 2000))).ravel(), minlength=8
  )
  statistic = np.sum((counts - 500) ** 2 / 500) * (7 / 6)
  assert 0.001 < stats.chi2.sf(statistic, 7) < 0.999


@pytest.mark.parametrize(
  ('act', 'message'),
  [
    (lambda: memory.reservoir(0, SPEC), 'memory capacity 0'),
    (
      lambda: memory.reservoir(2, SPEC).sample({}, 3, KEY),
      'cannot sample 3 rows from a memory of 2',
    ),
    (
      lambda: memory.reservoir(2, SPEC).insert(
        memory.reservoir(2, SPEC).init(),
        {'x': jnp.zeros((3, 4))},
        jnp.ones(3),
        KEY,
      ),
      r"holds 'x' of shape \(\) per row, the batch brings \(4,\)",
    ),
    (
      lambda: memory.reservoir(2, SPEC).insert(
        memory.reservoir(2, SPEC).init(), {}, jnp.ones(3), KEY
      ),
      "'x' .* brings nothing",
    ),
  ],
)
def test_bad_input_is_refused_in_one_line(act, message):
  with pytest.raises(UsageError, match=message):
    act()
