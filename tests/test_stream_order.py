"""Single-pass, blurry and drifting streams; the boundary stays outside."""

import itertools

import jax
import numpy as np
import pytest
import toys

import fmeta
from fmeta import data, stream, train
from fmeta.errors import UsageError

SIZES = (10, 7, 13)


def make_tasks(sizes=SIZES, seed=0):
  rng = np.random.default_rng(seed)
  tasks, first = [], 0
  for k, size in enumerate(sizes):
    columns = {
      'x': rng.normal(size=(size, 6)).astype(np.float32),
      'label': (2 * k + rng.integers(0, 2, size)).astype(np.int32),
      'row': np.arange(first, first + size, dtype=np.int32),
      'text': np.array([f'task {k}'] * size, object),
    }
    tasks.append(stream.Task(f't{k}', columns))
    first += size
  return tasks


def all_batches(flow):
  return [flow.batches(i) for i in range(flow.num_steps)]


def assert_same_batch(first, second):
  assert set(first) == set(second)
  for key, array in first.items():
    assert array.dtype == second[key].dtype
    np.testing.assert_array_equal(array, second[key])


def perturbed(tasks, position):
  """The stream with other numbers in one task."""
  columns = tasks[position].columns
  other = {**columns, 'x': columns['x'] + 1, 'label': columns['label'] * 0}
  return [
    stream.Task(task.name, other if k == position else task.columns)
    for k, task in enumerate(tasks)
  ]


FLOWS = {
  'online': lambda tasks: stream.online(tasks, 4, 1),
  'task_free': lambda tasks: stream.task_free(tasks, 4, 30, 1),
}


@pytest.mark.parametrize('flow', FLOWS.values(), ids=FLOWS)
def test_a_batch_holds_the_columns_of_the_examples_and_nothing_else(flow):
  for batch in all_batches(flow(make_tasks())):
    assert set(batch) - {'weight'} == {'x', 'label', 'row'}
    assert {array.shape[0] for array in batch.values()} == {4}


def test_a_task_number_is_there_only_when_asked_for_by_name():
  tasks = stream.numbered(make_tasks(), 'which')
  for batch in all_batches(stream.online(tasks, 4, 1)):
    starts = np.cumsum([0, *SIZES])
    owner = np.searchsorted(starts, batch['row'], 'right') - 1
    np.testing.assert_array_equal(batch['which'], owner)
  with pytest.raises(UsageError, match="'t0' has a column 'which' already"):
    stream.numbered(tasks, 'which')


def test_boundaries_elsewhere_give_bitwise_the_same_batches():
  whole = stream.joint(make_tasks()).columns

  def cut(*ends):
    edges = itertools.pairwise([0, *ends, 30])
    return [
      stream.Task(str(a), data.take(whole, slice(a, b))) for a, b in edges
    ]

  streams = [stream.online(cut(*e), 4, None) for e in [(), (10, 17), (5, 25)]]
  for i in range(8):
    assert_same_batch(streams[0].batches(i), streams[1].batches(i))
    assert_same_batch(streams[0].batches(i), streams[2].batches(i))
  assert streams[1].spans != streams[2].spans


@pytest.mark.parametrize('seed', [0, 7])
def test_one_pass_shows_every_example_once_task_after_task(seed):
  tasks = make_tasks()
  batches = all_batches(stream.online(tasks, 4, seed))
  rows = np.concatenate([b['row'][b['weight'] > 0] for b in batches])
  ends = np.cumsum([0, *SIZES])
  for first, last in itertools.pairwise(ends):
    assert sorted(rows[first:last]) == list(range(first, last))
  assert (rows != np.arange(30)).any()
  weight = np.concatenate([b['weight'] for b in batches])
  np.testing.assert_array_equal(weight, np.arange(32) < 30)
  whole = stream.joint(tasks).columns
  for batch in batches:
    np.testing.assert_array_equal(batch['x'], whole['x'][batch['row']])


def test_spans_end_with_the_last_example_of_a_task():
  flow = stream.online(make_tasks(), 4, 0)
  # 10, 17 and 30 examples are through after 3, 5 and 8 batches of four.
  assert flow.spans == (('t0', 0, 3), ('t1', 3, 2), ('t2', 5, 3))
  assert flow.num_steps == flow.batches.steps_per_epoch == 8
  name, batches, steps = flow.pieces()[1]
  assert (name, steps) == ('t1', 2)
  assert_same_batch(batches(1), flow.batches(4))


def test_a_pass_over_one_task_is_the_first_epoch_of_plain_batches():
  columns = {k: v[:8] for k, v in make_tasks()[0].columns.items()}
  flow = stream.online([stream.Task('a', columns)], 4, 3)
  plain = data.batches(columns, 4, 3)
  for i in range(2):
    batch = flow.batches(i)
    assert batch.pop('weight').tolist() == [1, 1, 1, 1]
    assert_same_batch(batch, plain(i))


def test_an_examples_own_weight_is_kept():
  tasks = make_tasks((6, 5))
  for task in tasks:
    task.columns['weight'] = task.columns['row'] / 8
  batches = all_batches(stream.online(tasks, 4, 0))
  rows = np.concatenate([b['row'] for b in batches])[:11]
  weight = np.concatenate([b['weight'] for b in batches])
  np.testing.assert_array_equal(weight, [*(rows / 8), 0])


@pytest.mark.parametrize('flow', FLOWS.values(), ids=FLOWS)
def test_other_data_in_task_three_change_nothing_before_it(flow):
  tasks = make_tasks()
  one, two = all_batches(flow(tasks)), all_batches(flow(perturbed(tasks, 2)))
  new = [bool((b['row'] >= 17).any()) for b in one]
  first = new.index(True)
  assert 0 < first < len(one)
  for i in range(first):
    assert_same_batch(one[i], two[i])
  assert (one[first]['x'] != two[first]['x']).any()


def test_more_data_in_the_last_task_change_nothing_before_it():
  longer = make_tasks((10, 7, 29))
  shorter = [*longer[:2], stream.Task('t2', make_tasks((10, 7, 9))[2].columns)]
  one, two = (stream.online(tasks, 4, 5) for tasks in (longer, shorter))
  for i in range(4):
    assert_same_batch(one.batches(i), two.batches(i))


def test_no_batch_comes_after_the_end():
  flow = stream.online(make_tasks(), 4, 0)
  with pytest.raises(UsageError, match='no batch 8; the stream has 8'):
    flow.batches(8)
  with pytest.raises(UsageError, match='no batch -1'):
    flow.batches(-1)


def test_a_task_inside_one_batch_is_refused():
  with pytest.raises(UsageError, match="'t1' begins and ends within"):
    stream.online(make_tasks((5, 2, 5)), 4, 0)


def given_rows(tasks, percent, seed, **options):
  """Old task and new task of every row."""
  mixed = stream.blurry(tasks, percent, seed, **options)
  starts = np.cumsum([0, *(len(t.columns['row']) for t in tasks)])
  rows = [task.columns['row'] for task in mixed]
  owner = np.searchsorted(starts, np.concatenate(rows), 'right') - 1
  return mixed, owner, np.repeat(np.arange(len(tasks)), [len(r) for r in rows])


@pytest.mark.parametrize('percent', [0, 10, 30, 50])
@pytest.mark.parametrize('seed', range(4))
def test_blurry_moves_exactly_the_percentage_and_loses_nothing(percent, seed):
  tasks = make_tasks((40, 30, 50, 40))
  mixed, owner, place = given_rows(tasks, percent, seed)
  assert [len(t.columns['row']) for t in mixed] == [40, 30, 50, 40]
  rows = np.concatenate([t.columns['row'] for t in mixed])
  np.testing.assert_array_equal(np.sort(rows), np.arange(160))
  foreign = [int((owner[place == k] != k).sum()) for k in range(4)]
  assert foreign == [n * percent // 100 for n in (40, 30, 50, 40)]
  whole = stream.joint(tasks).columns
  for task in mixed:
    for key, array in task.columns.items():
      np.testing.assert_array_equal(array, whole[key][task.columns['row']])


def test_blurry_deals_to_all_other_tasks_alike():
  tasks = make_tasks((400, 400, 400, 400))
  counts = np.zeros((4, 4))
  for seed in range(20):
    _, owner, place = given_rows(tasks, 50, seed)
    np.add.at(counts, (owner, place), 1)
  off = counts[~np.eye(4, dtype=bool)]
  # 20 x 200 rows of a task to three others; within 6 standard deviations.
  assert np.abs(off - 4000 / 3).max() < 6 * np.sqrt(4000 * 2 / 9)


def test_disjoint_classes_stay_where_they_are():
  tasks = make_tasks((40, 30, 50, 40))
  kept = [0, 2, 4]
  mixed, owner, place = given_rows(tasks, 40, 1, disjoint=kept)
  label = np.concatenate([t.columns['label'] for t in mixed])
  stay = np.isin(label, kept)
  np.testing.assert_array_equal(owner[stay], place[stay])
  for k, task in enumerate(tasks):
    may = int((~np.isin(task.columns['label'], kept)).sum())
    assert (owner[place == k] != k).sum() == may * 40 // 100 > 0


def test_two_halves_can_only_swap():
  tasks = make_tasks((20, 20))
  _, owner, place = given_rows(tasks, 100, 0)
  np.testing.assert_array_equal(owner, 1 - place)


def test_a_task_that_outweighs_all_others_cannot_blur():
  with pytest.raises(UsageError, match="'t1' gives 50 examples to others that"):
    stream.blurry(make_tasks((20, 100, 20)), 50, 0)
  with pytest.raises(UsageError, match=r'percent 101; give a whole number'):
    stream.blurry(make_tasks(), 101, 0)


def test_drift_weights_of_a_hand_computed_case():
  weights = stream.drift_weights(2, 8, 0.5)
  # Places .125, .375 ... 1.875; the second task rises over [.75, 1.25].
  rises = [0, 0, 0, 0.25, 0.75, 1, 1, 1]
  np.testing.assert_allclose(weights[:, 1], rises, atol=1e-15)
  np.testing.assert_allclose(weights.sum(1), 1, atol=1e-15)
  abrupt = stream.drift_weights(3, 9, 0.0)
  np.testing.assert_array_equal(abrupt, np.repeat(np.eye(3), 3, axis=0))
  assert (stream.drift_weights(5, 100, 1.0) >= 0).all()


def test_a_drifting_stream_draws_tasks_by_their_weights():
  tasks = make_tasks((50, 50, 50))
  flow = stream.task_free(tasks, 20, 60, 3, width=0.8)
  weights = stream.drift_weights(3, 60, 0.8)
  share = np.array(
    [
      np.bincount(flow.batches(i)['row'] // 50, minlength=3) / 20
      for i in range(60)
    ]
  )
  assert not share[weights == 0].any()
  # A mean of 60 x 20 draws: six standard deviations of at most 1/2.
  assert np.abs((share - weights).mean(0)).max() < 3 / np.sqrt(1200)
  assert (share.max(1) < 1).sum() > 10
  assert flow.spans == (('t0', 0, 20), ('t1', 20, 20), ('t2', 40, 20))


def test_a_drifting_stream_repeats_no_example_before_all_were_seen():
  flow = stream.task_free(make_tasks((10, 10)), 5, 10, 0)
  rows = np.concatenate([b['row'] for b in all_batches(flow)])
  for task in (rows[rows < 10], rows[rows >= 10]):
    for start in range(0, len(task), 10):
      epoch = task[start : start + 10]
      assert len(set(epoch.tolist())) == len(epoch)
    assert (task[:10] != task[10:20]).any()
  assert len(rows) == 50


def test_an_abrupt_drift_is_task_after_task():
  flow = stream.task_free(make_tasks((10, 10)), 5, 4, 0, width=0.0)
  rows = np.concatenate([b['row'] for b in all_batches(flow)])
  assert sorted(rows) == list(range(20)) and rows[:10].max() == 9


def test_batches_are_pure_functions_of_seed_and_step():
  for flow in FLOWS.values():
    again, backwards = flow(make_tasks()), flow(make_tasks())
    for i in reversed(range(again.num_steps)):
      assert_same_batch(again.batches(i), backwards.batches(i))
  one, two = (stream.task_free(make_tasks(), 4, 9, s) for s in (0, 1))
  assert (one.batches(4)['row'] != two.batches(4)['row']).any()


@pytest.mark.parametrize(
  'call, message',
  [
    (lambda: stream.drift_weights(3, 2), '2 steps for 3 tasks'),
    (lambda: stream.drift_weights(2, 9, 1.5), r'width 1.5; give one in'),
    (lambda: stream.online([], 4, 0), 'no tasks to join'),
    (lambda: stream.online(make_tasks(), 31, 0), 'does not fit 30 examples'),
    (lambda: stream.task_free(make_tasks(), 31, 9, 0), 'does not fit 30'),
  ],
)
def test_wrong_streams_are_named_in_one_line(call, message):
  with pytest.raises(UsageError, match=message) as caught:
    call()
  assert '\n' not in str(caught.value)


def test_a_single_pass_trains_and_resumes_bitwise(tmp_path):
  loss, params, _, _ = toys.problem()
  tasks = make_tasks()
  for task in tasks:
    task.columns['label'] = (task.columns['label'] % 3).astype(np.int32)
    del task.columns['row']
  flow = stream.online(tasks, 4, 0)
  learner = fmeta.finetune(loss, fmeta.optim.adamw(1e-2))

  def fit(stages, **options):
    state = learner.init(params, jax.random.key(0))
    key = jax.random.key(1)
    return train.fit(learner, state, stages, key, quiet=True, **options)

  stages = [train.Stage(*piece) for piece in flow.pieces()]
  whole = fit([train.Stage('all', flow.batches, flow.num_steps)])
  parted = fit(stages, workdir=tmp_path, checkpoint_every=1)
  resumed = fit(stages, workdir=tmp_path, resume=True)
  assert whole.steps == parted.steps == resumed.steps == 8
  for other in (parted, resumed):
    jax.tree.map(np.testing.assert_array_equal, whole.params, other.params)
