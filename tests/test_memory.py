import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from fmeta import memory
from fmeta.errors import UsageError
from fmeta.memory import ranked

KEY = jax.random.key(9)
SPEC = {'x': jax.ShapeDtypeStruct((), jnp.int32)}
EMPTY = memory.reservoir(2, SPEC).init()


def _rows(start, stop):
  return {'x': jnp.arange(start, stop), 'other': jnp.zeros((stop - start, 2))}


def _insert(held, filled, rows, weight):
  return jax.jit(held.insert)(filled, rows, weight, KEY)


def _same(x, y):
  jax.tree.map(np.testing.assert_array_equal, x, y)


SHARDED = {
  **SPEC,
  'label': SPEC['x'],
  'outputs': jax.ShapeDtypeStruct((2,), jnp.float32),
}


def _stream(numbers):
  """Rows whose every key is a function of the first."""
  x = jnp.asarray(numbers, jnp.int32)
  outputs = jnp.stack([x, -x], 1).astype(jnp.float32)
  return {'x': x, 'label': x % 5, 'outputs': outputs, 'number': x}


def _aligned(rows, there):
  x = np.asarray(rows['x'])[there]
  np.testing.assert_array_equal(np.asarray(rows['label'])[there], x % 5)
  outputs = np.asarray(rows['outputs'])[there]
  np.testing.assert_array_equal(outputs, np.stack([x, -x], 1))


MERGING = {
  'reservoir': (memory.reservoir, memory.merge),
  'class_balanced': (memory.class_balanced, memory.merge_balanced),
}


@pytest.mark.parametrize('kind', MERGING)
@pytest.mark.parametrize('shards', [1, 2, 8])
def test_shards_merge_into_the_memory_of_the_whole_stream(kind, shards):
  make, merge = MERGING[kind]
  held = make(6, SHARDED)
  insert = jax.jit(held.insert)

  def filled(numbers):
    out = held.init()
    for start in range(0, len(numbers), 5):
      rows = _stream(numbers[start : start + 5])
      out = insert(out, rows, jnp.ones(5), KEY)
    return out

  whole = merge([filled(np.arange(40))], 6)
  # Every eighth row a device, and backwards: order is no matter either.
  parts = [filled(np.arange(40)[::-1][k::shards]) for k in range(shards)]
  found = merge(parts, 6)
  _same(whole, found)
  assert found['seen'] == 40
  _aligned(found['rows'], np.ones(6, bool))
  # Merging is associative.
  twice = merge([merge(parts[:1], 6), *parts[1:]], 6)
  _same(whole, twice)


def test_the_check_of_alignment_sees_one_row_out_of_place():
  held = memory.reservoir(6, SHARDED)
  rows = _insert(held, held.init(), _stream(np.arange(40)), jnp.ones(40))[
    'rows'
  ]
  _aligned(rows, np.ones(6, bool))
  for key in ('label', 'outputs'):
    torn = {**rows, key: jnp.roll(rows[key], 1, axis=0)}
    with pytest.raises(AssertionError):
      _aligned(torn, np.ones(6, bool))


@pytest.mark.parametrize('kind', MERGING)
def test_a_batch_on_eight_devices_leaves_the_same_memory_bitwise(kind):
  held = MERGING[kind][0](6, SHARDED)
  insert = jax.jit(held.insert)
  mesh = jax.make_mesh(
    (8,), ('data',), axis_types=(jax.sharding.AxisType.Auto,)
  )
  place = lambda spec: jax.sharding.NamedSharding(
    mesh, jax.sharding.PartitionSpec(*spec)
  )
  alone = spread = held.init()
  spread = jax.device_put(spread, place([]))
  for start in range(0, 48, 16):
    given = _stream(np.arange(start, start + 16)), jnp.ones(16)
    alone = insert(alone, *given, KEY)
    spread = insert(
      spread,
      *jax.device_put(given, place(['data'])),
      jax.device_put(KEY, place([])),
    )
  _same(alone, spread)


def test_a_merge_may_be_smaller_but_not_larger_than_its_parts():
  held = memory.reservoir(6, SPEC)
  parts = [
    _insert(held, held.init(), _stream(np.arange(k, 20, 2)), jnp.ones(10))
    for k in range(2)
  ]
  six, four = (memory.merge(parts, size)['rows']['x'] for size in (6, 4))
  np.testing.assert_array_equal(six[:4], four)
  with pytest.raises(UsageError, match=r'memories of \[6, 6\] rows into one'):
    memory.merge(parts, 7)
  with pytest.raises(UsageError, match='at least one memory'):
    memory.merge([], 3)


def test_rows_that_tie_for_the_cut_are_told_apart_by_the_second_word():
  first = jnp.asarray([3.0, 1, 1, 1, 2, 1, 0])
  second = jnp.asarray([0.0, 5, 2, 4, 0, 3, 9])
  keys = jnp.stack([first, second], 1)
  best = [6, 2, 5, 3, 1, 4, 0]
  for count in range(8):
    out = ranked.lowest(keys, count)
    assert set(np.flatnonzero(out)) == set(best[:count])


def test_of_rows_that_tie_in_everything_the_first_are_lowest():
  keys = jnp.ones((5, 2)).at[3].set(0)
  for count, expected in enumerate([[], [3], [0, 3], [0, 1, 3]]):
    out = ranked.lowest(keys, count)
    np.testing.assert_array_equal(np.flatnonzero(out), expected)


def test_priorities_are_positive_normal_floats_and_uniform():
  drawn = ranked.priorities(jnp.arange(4000), jnp.ones(4000, bool), KEY)
  words = np.asarray(drawn).view(np.uint32)
  assert drawn.dtype == jnp.float32
  assert words.min() >= 0x00800000 and words.max() < 0x40800000
  assert np.all(drawn >= np.finfo(np.float32).tiny)
  # As fractions of their range they are uniform, and the words independent.
  fractions = (words - 0x00800000) / 2.0**30
  for part in (*fractions.T, (fractions.sum(1) % 1)):
    assert 0.001 < stats.kstest(part, 'uniform').pvalue


def test_bytes_are_those_of_the_arrays():
  filled = memory.reservoir(10, SHARDED).init()
  # Two integers, two outputs and a priority of two words per row; a count.
  assert memory.bytes_of(filled) == 10 * (4 + 4 + 8 + 8) + 4


def test_only_what_changes_is_written():
  held = memory.reservoir(6, SPEC)
  before = _insert(held, held.init(), _rows(0, 50), jnp.ones(50))
  after = _insert(held, before, _rows(50, 60), jnp.ones(10))
  gone = set(np.asarray(before['rows']['x'])) - set(
    np.asarray(after['rows']['x'])
  )
  kept = np.asarray(before['rows']['x']) == np.asarray(after['rows']['x'])
  assert (~kept).sum() == len(gone)


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
  # In canonical order: the slot of a row is not a fact about the stream.
  results = [memory.merge([filled], 7) for filled in results]
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
      lambda: memory.reservoir(2, SPEC).sample(EMPTY, 3, KEY),
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
