import numpy as np
import pytest
import scipy.stats
import sklearn.metrics

from fmeta import metrics
from fmeta.errors import UsageError
from fmeta.metrics import intervals

NAN = np.nan
STREAM = np.array([[0.90, NAN, NAN], [0.95, 0.80, NAN], [0.70, 0.85, 0.90]])


def _random_predictions(seed=0, n=500, classes=7):
  rng = np.random.default_rng(seed)
  labels = rng.integers(0, classes, n)
  noise = rng.integers(0, classes, n)
  return np.where(rng.random(n) < 0.6, labels, noise), labels


def test_accuracy_is_the_share_of_equal_entries():
  assert metrics.accuracy([0, 1, 2, 2], [0, 1, 1, 2]) == 0.75
  np.testing.assert_array_equal(
    metrics.correctness([0, 1, 2, 2], [0, 1, 1, 2]), [1, 1, 0, 1]
  )


def test_confusion_has_true_classes_in_rows():
  counts = metrics.confusion([0, 1, 1, 1], [0, 1, 0, 1], num_classes=3)
  np.testing.assert_array_equal(counts, [[1, 1, 0], [0, 2, 0], [0, 0, 0]])


def test_confusion_and_macro_f1_equal_scikit_learn():
  predictions, labels = _random_predictions()
  np.testing.assert_array_equal(
    metrics.confusion(predictions, labels, 7),
    sklearn.metrics.confusion_matrix(labels, predictions),
  )
  np.testing.assert_allclose(
    metrics.macro_f1(predictions, labels, 7),
    sklearn.metrics.f1_score(labels, predictions, average='macro'),
    rtol=1e-14,
  )


def test_macro_f1_leaves_out_only_classes_that_never_occur():
  predictions, labels = np.array([0, 0, 2]), np.array([0, 1, 0])
  ours = metrics.macro_f1(predictions, labels, num_classes=5)
  assert ours == sklearn.metrics.f1_score(labels, predictions, average='macro')
  # Class 0: 2*1/(2*1 + 1 + 1) = .5; classes 1 and 2: 0; 3 and 4: absent.
  assert ours == pytest.approx(0.5 / 3, abs=1e-15)


def test_calibration_error_of_a_hand_computed_case():
  probabilities = [[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.4, 0.6]]
  labels = [0, 1, 1, 1]
  # Two bins of (0, .5] and (.5, 1]: all in the second; |.75 - .75| = 0.
  assert metrics.expected_calibration_error(
    probabilities, labels, num_bins=2
  ) == pytest.approx(0, abs=1e-15)
  # Ten bins: .9 right, .8 wrong, .7 right, .6 right, each alone in its bin.
  assert metrics.expected_calibration_error(
    probabilities, labels, num_bins=10
  ) == pytest.approx((0.1 + 0.8 + 0.3 + 0.4) / 4)


def test_calibration_bins_are_closed_above():
  sure = np.eye(3)[[0, 1, 2]]
  assert metrics.expected_calibration_error(sure, [0, 1, 2]) == 0
  # .5 belongs to (.25, .5]: with .4 in the same bin the gaps cancel.
  rows = [[0.5, 0.3, 0.2], [0.5, 0.3, 0.2]]
  assert metrics.expected_calibration_error(
    rows, [0, 1], num_bins=4
  ) == pytest.approx(0, abs=1e-15)


def test_calibration_refuses_logits():
  with pytest.raises(UsageError, match='not logits'):
    metrics.expected_calibration_error([[3.0, -1.0]], [0])


def test_mean_ci95_uses_the_population_deviation():
  mean, half = metrics.mean_ci95([0.0, 1.0, 1.0, 1.0])
  assert mean == 0.75
  assert half == pytest.approx(1.96 * np.sqrt(0.1875) / 2)


def test_ungrouped_bootstrap_agrees_with_scipy():
  values = np.random.default_rng(1).random(300)
  ours = metrics.bootstrap_ci(values, seed=3)
  theirs = scipy.stats.bootstrap(
    (values,),
    np.mean,
    method='percentile',
    n_resamples=10_000,
    rng=np.random.default_rng(4),
  ).confidence_interval
  width = theirs.high - theirs.low
  # Both ends are Monte Carlo: 10,000 resamples leave about 1.5% of the width.
  np.testing.assert_allclose(ours.ci95, theirs, atol=0.06 * width)
  assert ours.mean == pytest.approx(values.mean())


def test_bootstrap_equals_gathering_the_drawn_groups_one_by_one():
  rng = np.random.default_rng(5)
  groups = rng.integers(0, 6, 40)
  values = rng.random(40)
  sums, sizes = intervals._group_totals(values, groups)
  draws = np.random.default_rng(7).integers(6, size=(50, 6))
  expected = []
  for row in draws:
    drawn = [values[groups == group] for group in row]
    expected.append(np.concatenate(drawn).mean())
  np.testing.assert_allclose(
    intervals._resampled_means(sums, sizes, 7, 50), expected, rtol=1e-12
  )


def test_bootstrap_does_not_depend_on_the_chunk_size(monkeypatch):
  values, groups = np.arange(33.0), np.arange(33) // 3
  whole = metrics.bootstrap_ci(values, groups, num_resamples=500)
  monkeypatch.setattr(intervals, '_DRAWS_PER_CHUNK', 70)
  assert metrics.bootstrap_ci(values, groups, num_resamples=500) == whole


def test_correlated_groups_widen_the_interval():
  # Ten copies of each value: only 40 independent units among 400 examples.
  values = np.repeat(np.random.default_rng(0).random(40), 10)
  groups = np.repeat(np.arange(40), 10)
  alone = metrics.bootstrap_ci(values)
  grouped = metrics.bootstrap_ci(values, groups)
  ratio = (grouped.high - grouped.low) / (alone.high - alone.low)
  assert ratio == pytest.approx(np.sqrt(10), rel=0.1)


def test_group_names_may_be_strings_and_order_does_not_matter():
  values, groups = np.arange(12.0), np.array(list('aabbccaabbcc'))
  order = np.random.default_rng(0).permutation(12)
  assert metrics.bootstrap_ci(values, groups) == metrics.bootstrap_ci(
    values[order], groups[order]
  )


def test_grouped_interval_covers_the_truth_about_95_percent_of_the_time():
  rng = np.random.default_rng(11)
  hits = 0
  for trial in range(200):
    effect = rng.normal(size=60)
    sizes = rng.integers(1, 9, 60)
    groups = np.repeat(np.arange(60), sizes)
    values = effect[groups] + rng.normal(size=len(groups))
    found = metrics.bootstrap_ci(values, groups, trial, num_resamples=1000)
    hits += found.low <= 0 <= found.high
  # Binomial(200, .95) has standard deviation 3.1; bootstrap is a bit short.
  assert 178 <= hits <= 199


def test_paired_bootstrap_cancels_what_both_share():
  rng = np.random.default_rng(2)
  difficulty = rng.random(200)
  a, b = difficulty + 0.01, difficulty
  found = metrics.paired_bootstrap(a, b)
  assert found.mean == pytest.approx(0.01)
  assert found.high - found.low < 1e-12
  assert found.excludes_zero
  swapped = metrics.paired_bootstrap(b, a)
  assert swapped.low == pytest.approx(-found.high)


def test_seeds_are_averaged_before_resampling():
  rng = np.random.default_rng(3)
  a, b = rng.random((5, 90)), rng.random((3, 90))
  groups = np.arange(90) // 4
  assert metrics.paired_bootstrap(a, b, groups) == metrics.paired_bootstrap(
    a.mean(0), b.mean(0), groups
  )
  assert not metrics.paired_bootstrap(a, a, groups).excludes_zero


def test_three_forgettings_on_one_matrix():
  assert metrics.forgetting_first_minus_last(STREAM) == pytest.approx(0.075)
  assert metrics.forgetting_chaudhry(STREAM) == pytest.approx(0.10)
  assert metrics.forgetting_max_over_all(STREAM) == pytest.approx(0.125)


def test_accuracy_before_a_task_is_learned_is_not_forgotten():
  full = STREAM.copy()
  full[np.triu_indices(3, 1)] = 0.99
  assert metrics.forgetting_chaudhry(full) == pytest.approx(0.10)
  assert metrics.forgetting_max_over_all(full) == pytest.approx(0.125)


def test_average_accuracy_and_backward_transfer():
  assert metrics.average_accuracy(STREAM) == pytest.approx(2.45 / 3)
  assert metrics.backward_transfer(STREAM) == pytest.approx(-0.075)
  assert metrics.average_accuracy([[0.5]]) == 0.5


def test_forward_transfer_reads_above_the_diagonal():
  full = STREAM.copy()
  full[0, 1], full[1, 2] = 0.4, 0.6
  # ((.4 - .1) + (.6 - .2)) / 2
  assert metrics.forward_transfer(full, [0.9, 0.1, 0.2]) == pytest.approx(0.35)
  with pytest.raises(UsageError, match='before learning it'):
    metrics.forward_transfer(STREAM, [0.1, 0.1, 0.1])


def test_ragged_rows_become_the_matrix():
  rows = [[0.90], [0.95, 0.80], [0.70, 0.85, 0.90]]
  np.testing.assert_array_equal(metrics.accuracy_matrix(rows), STREAM)
  with pytest.raises(UsageError, match='row 1 has 1 accuracies; give 2 to 3'):
    metrics.accuracy_matrix([[0.9], [0.9], [0.7, 0.8, 0.9]])


@pytest.mark.parametrize(
  'call, message',
  [
    (lambda: metrics.accuracy([], []), 'non-empty'),
    (lambda: metrics.accuracy([1, 2], [1]), 'lengths 2 and 1'),
    (lambda: metrics.accuracy([[1]], [1]), r'shape \(1, 1\)'),
    (lambda: metrics.confusion([0, 3], [0, 1], 3), 'prediction 3 is out of'),
    (lambda: metrics.confusion([0, 1], [-1, 1], 3), 'label -1 is out of'),
    (lambda: metrics.bootstrap_ci([1.0, 2.0], [0]), 'values and groups'),
    (lambda: metrics.paired_bootstrap([1.0], [1.0, 2.0]), 'a and b'),
    (lambda: metrics.average_accuracy([[0.1, 0.2]]), r'give \[T, T\]'),
    (lambda: metrics.backward_transfer([[0.1]]), 'at least 2'),
    (lambda: metrics.average_accuracy([[NAN]]), 'NaN on or below'),
  ],
)
def test_wrong_input_is_named_in_one_line(call, message):
  with pytest.raises(UsageError, match=message) as caught:
    call()
  assert '\n' not in str(caught.value)
