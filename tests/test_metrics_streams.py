"""Metrics of streams on matrices and curves computed by hand."""

import types

import numpy as np
import pytest
import scipy.stats

from fmeta import metrics
from fmeta.errors import UsageError

NAN = float('nan')
STREAM = [[0.90, NAN, NAN], [0.95, 0.80, NAN], [0.70, 0.85, 0.90]]
# Six evaluations of two tasks, which end at steps 2 and 6; then one of a third
# that ends at 8. The first falls to .3, recovers to .6, and ends at .5.
CURVES = metrics.Curves(
  np.array([1, 2, 3, 5, 6, 7, 8]),
  np.array(
    [
      [0.1, NAN, NAN],
      [0.9, 0.2, NAN],
      [0.3, 0.1, NAN],
      [0.6, 0.7, NAN],
      [0.8, 0.6, 0.1],
      [0.6, 0.2, 0.4],
      [0.5, 0.5, 0.7],
    ]
  ),
  np.array([2, 6, 8]),
)


def test_learning_accuracy_is_the_mean_of_the_diagonal():
  assert metrics.learning_accuracy(STREAM) == pytest.approx(2.6 / 3)


def test_anytime_accuracy_is_the_mean_of_means_over_tasks_seen():
  means = [0.9, 1.75 / 2, 2.45 / 3]
  np.testing.assert_allclose(metrics.average_over_time(STREAM), means)
  assert metrics.anytime_accuracy(STREAM) == pytest.approx(sum(means) / 3)


def test_anytime_accuracy_does_not_read_above_the_diagonal():
  full = np.array(STREAM)
  full[np.triu_indices(3, 1)] = 0.123
  assert metrics.anytime_accuracy(full) == metrics.anytime_accuracy(STREAM)


def test_intransigence_is_what_the_joint_model_has_more_on_the_diagonal():
  # ((.95 - .90) + (.90 - .80) + (.85 - .90)) / 3
  found = metrics.intransigence(STREAM, [0.95, 0.90, 0.85])
  assert found == pytest.approx(0.10 / 3)


def test_minimum_accuracy_is_the_worst_after_a_tasks_own_end():
  # Task 0: .3 after step 2; task 1: .2 after step 6, not the .1 at step 3.
  assert metrics.minimum_accuracy(CURVES) == pytest.approx(0.25)


def test_a_tasks_own_end_is_not_yet_after_it():
  curves = metrics.Curves(
    np.array([1, 2, 3]),
    np.array([[0.5, NAN], [0.8, 0.1], [0.9, 0.7]]),
    np.array([1, 3]),
  )
  assert metrics.minimum_accuracy(curves) == 0.8


def test_worst_case_accuracy_adds_the_last_task_as_it_is():
  expected = 0.7 / 3 + 2 / 3 * 0.25
  assert metrics.worst_case_accuracy(CURVES) == pytest.approx(expected)


def test_the_stability_gap_is_the_part_that_was_made_good():
  # ((.5 - .3) + (.5 - .2)) / 2
  assert metrics.stability_gap(CURVES) == pytest.approx(0.25)
  monotone = CURVES._replace(accuracy=CURVES.accuracy.copy())
  monotone.accuracy[2:, 0] = monotone.accuracy[4:, 1] = 0.5
  assert metrics.stability_gap(monotone) == 0


def test_windowed_forgetting_is_the_deepest_fall_within_a_window():
  # Task 0 is .1 .9 .3 .6 .8 .6 .5: .9 to .3 at once. Task 1, from step 3 on,
  # .1 .7 .6 .2 .5: .6 to .2, or .7 to .2 within three. Task 2, from step 7
  # on, .4 .7: it never fell.
  assert metrics.windowed_forgetting(CURVES, 2) == pytest.approx(
    (0.6 + 0.4 + 0.0) / 3
  )
  assert metrics.windowed_forgetting(CURVES, 3) == pytest.approx(
    (0.6 + 0.5 + 0.0) / 3
  )
  assert metrics.windowed_forgetting(CURVES, 100) == (
    metrics.windowed_forgetting(CURVES, 3)
  )


def test_windowed_plasticity_is_the_steepest_rise_within_a_window():
  # Task 0: .1 to .9 at once. Task 1: .1 to .7. Task 2: .4 to .7.
  assert metrics.windowed_plasticity(CURVES, 2) == pytest.approx(
    (0.8 + 0.6 + 0.3) / 3
  )
  slow = metrics.Curves(
    np.array([1, 2, 3, 4]),
    np.array([[0.5], [0.1], [0.3], [0.9]]),
    np.array([4]),
  )
  # .3 to .9; .1 to .9, although .5 before it was higher than .1.
  assert metrics.windowed_plasticity(slow, 2) == pytest.approx(0.6)
  assert metrics.windowed_plasticity(slow, 3) == pytest.approx(0.8)
  assert metrics.windowed_forgetting(slow, 2) == pytest.approx(0.4)


@pytest.mark.parametrize(
  ('values', 'rise', 'fall'),
  [([0.5, 0.1, 0.9], 0.8, 0.4), ([0.9, 0.1, 0.5], 0.4, 0.8)],
)
def test_a_rise_begins_at_a_low_and_a_fall_at_a_high(values, rise, fall):
  curves = metrics.Curves(
    np.arange(1, 4), np.array(values)[:, None], np.array([3])
  )
  assert metrics.windowed_plasticity(curves, 3) == pytest.approx(rise)
  assert metrics.windowed_forgetting(curves, 3) == pytest.approx(fall)


def test_windows_count_evaluations_of_the_task_and_skip_missing_ones():
  sparse = metrics.Curves(
    np.arange(1, 6),
    np.array([[0.9, 0.9], [NAN, 0.0], [0.6, 0.1], [0.5, 0.4], [0.4, 0.8]]),
    np.array([1, 5]),
  )
  # Task 0: .9 .6 .5 .4. Task 1 without what it was at step 1: .0 .1 .4 .8.
  assert metrics.windowed_forgetting(sparse, 2) == pytest.approx(0.3 / 2)
  assert metrics.windowed_forgetting(sparse, 4) == pytest.approx(0.5 / 2)
  assert metrics.windowed_plasticity(sparse, 2) == pytest.approx(0.4 / 2)
  assert metrics.windowed_plasticity(sparse, 3) == pytest.approx(0.7 / 2)


def test_evaluations_after_the_last_task_do_not_count():
  longer = metrics.Curves(
    np.append(CURVES.steps, 9),
    np.vstack([CURVES.accuracy, [0.0, 0.0, 0.0]]),
    CURVES.ends,
  )
  assert metrics.minimum_accuracy(longer) == pytest.approx(0.25)
  assert metrics.worst_case_accuracy(longer) == (
    metrics.worst_case_accuracy(CURVES)
  )
  assert metrics.windowed_forgetting(longer, 9) == (
    metrics.windowed_forgetting(CURVES, 9)
  )


def test_the_matrix_of_curves_is_that_of_the_ends():
  matrix = metrics.accuracy_at_ends(CURVES)
  np.testing.assert_array_equal(
    matrix, [[0.9, 0.2, NAN], [0.8, 0.6, 0.1], [0.5, 0.5, 0.7]]
  )
  assert metrics.average_accuracy(matrix) == pytest.approx(1.7 / 3)


def test_sparse_evaluations_hide_the_gap_and_never_lower_the_minimum():
  ends = np.isin(CURVES.steps, CURVES.ends)
  sparse = CURVES._replace(
    steps=CURVES.steps[ends], accuracy=CURVES.accuracy[ends]
  )
  assert metrics.minimum_accuracy(sparse) == pytest.approx(0.5)
  assert metrics.stability_gap(sparse) == 0


def evaluation(step, stage, **values):
  return {'step': step, 'stage': stage, 'evaluation': values}


def test_evaluations_of_a_fit_become_curves():
  records = [
    evaluation(4, 'b/phase_1', a=0.5, b=0.9, loss=2.0),
    evaluation(1, 'a', a=0.2),
    evaluation(2, 'a', a=0.8),
    evaluation(3, 'b/phase_0', a=0.3, b=0.4),
  ]
  curves = metrics.task_curves(records, ['a', 'b'])
  assert curves.steps.tolist() == [1, 2, 3, 4]
  assert curves.ends.tolist() == [2, 4]
  np.testing.assert_array_equal(
    curves.accuracy, [[0.2, NAN], [0.8, NAN], [0.3, 0.4], [0.5, 0.9]]
  )
  assert metrics.minimum_accuracy(curves) == pytest.approx(0.3)
  assert metrics.worst_case_accuracy(curves) == pytest.approx(0.6)


def test_tasks_whose_names_begin_alike_keep_their_own_stages():
  records = [evaluation(1, '1', **{'1': 0.5}), evaluation(2, '1/2')]
  records[1]['evaluation'] = {'1': 0.4, '1/2': 0.3}
  assert metrics.task_curves(records, ['1', '1/2']).ends.tolist() == [1, 2]


def test_the_t_interval_equals_scipy_and_is_wide_for_few_seeds():
  values = [0.9, 0.7, 0.8]
  found = metrics.mean_t(values)
  ends = scipy.stats.t.interval(
    0.95, 2, np.mean(values), scipy.stats.sem(values)
  )
  np.testing.assert_allclose(found.ci95, ends, rtol=1e-12)
  assert found.mean == pytest.approx(0.8)
  mean, half = metrics.mean_ci95(values)
  assert found.high - found.low > 2 * 2.6 * half


def test_the_paired_t_interval_is_that_of_scipys_paired_test():
  rng = np.random.default_rng(0)
  a = rng.normal(size=6)
  b = a + rng.normal(0.3, 0.1, 6)
  result = scipy.stats.ttest_rel(b, a)
  low, high = result.confidence_interval(0.95)
  found = metrics.paired_t(b, a)
  np.testing.assert_allclose(found, [np.mean(b - a), low, high], rtol=1e-12)
  assert found.excludes_zero
  assert not metrics.Interval(
    0.3, *scipy.stats.ttest_ind(b, a).confidence_interval()
  ).excludes_zero


def matrices(shift, seeds=range(4)):
  """The hard-coded stream with a seed's own difficulty and a method's gain."""
  noise = {0: 0.01, 1: -0.03, 2: 0.02, 3: 0.0}
  return {s: np.array(STREAM) + noise[s] + shift for s in seeds}


def test_a_paired_difference_is_taken_run_by_run():
  better = matrices(0.02)
  better[1] = better[1] + 0.001
  backwards = {seed: better[seed] for seed in reversed(better)}
  found = metrics.paired_difference(
    backwards, matrices(0.0), metrics.average_accuracy
  )
  values = [0.02, 0.021, 0.02, 0.02]
  np.testing.assert_allclose(found, metrics.mean_t(values), atol=1e-12)
  assert found.excludes_zero
  resampled = metrics.paired_difference(
    better, matrices(0.0), metrics.average_accuracy, metrics.paired_bootstrap
  )
  assert resampled.mean == pytest.approx(0.02025)
  assert 0.0199 < resampled.low < resampled.high < 0.0211


def test_the_difference_of_any_metric_can_be_taken():
  worse = matrices(0.0)
  for matrix in worse.values():
    matrix[2, 0] -= 0.2
  found = metrics.paired_difference(
    worse, matrices(0.0), metrics.forgetting_chaudhry
  )
  np.testing.assert_allclose(found, [0.1, 0.1, 0.1])


def test_the_cost_of_a_fit_counts_steps_rows_bytes_and_new_leaves():
  state = types.SimpleNamespace(
    memory={'rows': np.zeros((5, 2), np.float32), 'seen': np.int32(5)},
    penalty_state={'anchor': np.zeros(3, np.float32)},
  )
  fitted = types.SimpleNamespace(
    steps=10, flops_per_step=7.0, state=state, params={'a': np.zeros((4, 3))}
  )
  assert metrics.cost_of(fitted, 32, 8, seconds=2.5) == metrics.Cost(
    examples=320,
    flops=70,
    seconds=2.5,
    memory_bytes=40 + 4 + 12,
    parameters_added=4,
  )
  unknown = fitted
  unknown.flops_per_step = None
  assert metrics.cost_of(unknown, 32, 12).flops is None


def test_costs_average_what_all_runs_have():
  one = metrics.Cost(examples=10, flops=4e9, memory_bytes=7)
  two = metrics.Cost(examples=20, flops=2e9)
  assert metrics.mean_cost([one, two]) == metrics.Cost(examples=15, flops=3e9)


@pytest.mark.parametrize(
  'call, message',
  [
    (lambda: metrics.anytime_accuracy([[0.1, 0.2]]), r'give \[T, T\]'),
    (lambda: metrics.learning_accuracy([[NAN]]), 'NaN on or below'),
    (lambda: metrics.intransigence([[0.5]], [0.5, 0.6]), 'lengths 1 and 2'),
    (lambda: metrics.intransigence([[0.5]], [NAN]), r'reference\[0\] is nan'),
    (
      lambda: metrics.forward_transfer([[0.5, 0.5], [0.5, 0.5]], [0.1, NAN]),
      r'baseline\[1\] is nan',
    ),
    (lambda: metrics.mean_t([0.5]), 'give two or more seeds'),
    (lambda: metrics.mean_t([0.5, NAN]), r'values\[1\] is nan; give finite'),
    (lambda: metrics.paired_t([0.5, 0.4], [0.5]), 'lengths 2 and 1'),
    (
      lambda: metrics.paired_difference(
        matrices(0.0), matrices(0.0, range(3)), metrics.average_accuracy
      ),
      'run 3 is there for one method only',
    ),
    (
      lambda: metrics.paired_difference(
        {}, matrices(0.0), metrics.average_accuracy
      ),
      'no runs to compare',
    ),
    (
      lambda: metrics.minimum_accuracy(
        CURVES._replace(accuracy=CURVES.accuracy[:, :2])
      ),
      r'shape \(7, 2\) for 7 steps and 3 tasks',
    ),
    (lambda: metrics.windowed_forgetting(CURVES, 1), 'window=1'),
    (
      lambda: metrics.minimum_accuracy(CURVES._replace(steps=np.arange(7))),
      'no evaluation at step 8, where a task ends',
    ),
    (
      lambda: metrics.stability_gap(CURVES._replace(ends=[6, 2, 8])),
      r'ends do not ascend: \[6, 2, 8\]',
    ),
    (
      lambda: metrics.minimum_accuracy(
        CURVES._replace(accuracy=CURVES.accuracy * NAN)
      ),
      'NaN for a task seen so far',
    ),
    (
      lambda: metrics.worst_case_accuracy(
        metrics.Curves(np.array([1]), np.array([[0.5]]), np.array([1]))
      ),
      'needs at least 2',
    ),
    (lambda: metrics.task_curves([], ['a']), r"no stage 'a' among"),
    (lambda: metrics.Cost(flops=-1), r'cost flops=-1; give a number >= 0'),
    (lambda: metrics.Cost(seconds=NAN), r'cost seconds=nan'),
    (lambda: metrics.mean_cost([]), 'no costs to average'),
  ],
)
def test_misuse_is_named_in_one_line(call, message):
  with pytest.raises(UsageError, match=message) as caught:
    call()
  assert '\n' not in str(caught.value)
