"""Confident learning against a hand-written loop, and planted flips."""

import numpy as np
import pytest

from fmeta.data import label_errors
from fmeta.errors import UsageError


def confident_joint(probabilities, labels):
  """Northcutt et al. 2021, eq. 1 and 2, as they are written."""
  classes = range(probabilities.shape[1])
  threshold = [
    np.mean(
      [p[j] for p, y in zip(probabilities, labels, strict=True) if y == j]
    )
    for j in classes
  ]
  wrong = {}
  for row, (p, y) in enumerate(zip(probabilities, labels, strict=True)):
    reached = [j for j in classes if p[j] >= threshold[j]]
    if reached:
      best = max(reached, key=lambda j: p[j])
      if best != y:
        wrong[row] = best
  return wrong


@pytest.mark.parametrize('seed', range(5))
def test_confident_errors_are_off_the_diagonal_of_the_joint(seed):
  random = np.random.default_rng(seed)
  probabilities = random.dirichlet(np.ones(4), 60)
  labels = np.append(np.arange(4), random.integers(0, 4, 56))
  rows, suggested = label_errors.confident_errors(probabilities, labels)
  expected = confident_joint(probabilities, labels)
  assert dict(zip(rows, suggested, strict=True)) == expected and expected
  own = probabilities[rows, labels[rows]]
  assert (np.diff(own) >= 0).all()


def test_the_paper_s_rule_by_hand():
  probabilities = np.array([[0.9, 0.1], [0.7, 0.3], [0.2, 0.8], [0.85, 0.15]])
  # Thresholds: class 0 (.9 + .7) / 2 = .8, class 1 (.8 + .15) / 2 = .475.
  rows, suggested = label_errors.confident_errors(
    probabilities, np.array([0, 0, 1, 1])
  )
  assert (rows.tolist(), suggested.tolist()) == ([3], [0])


def test_a_class_without_examples_is_never_suggested():
  probabilities = np.array([[0.1, 0.2, 0.7], [0.6, 0.3, 0.1], [0.1, 0.8, 0.1]])
  _, suggested = label_errors.confident_errors(
    probabilities, np.array([0, 0, 1])
  )
  assert 2 not in suggested


def test_flipped_digits_are_found():
  from sklearn.datasets import load_digits

  images, labels = load_digits(return_X_y=True)
  random = np.random.default_rng(0)
  flipped = np.zeros(len(labels), bool)
  flipped[random.choice(len(labels), len(labels) // 10, replace=False)] = True
  given = labels.copy()
  given[flipped] = (labels + random.integers(1, 10, len(labels)))[flipped] % 10
  probabilities = label_errors.out_of_fold(
    label_errors.scaled(images), given, np.arange(len(labels))
  )
  rows, suggested = label_errors.confident_errors(probabilities, given)
  # Measured 2026-11-24 for three seeds: recall .79-.82, precision .95-.98.
  assert flipped[rows].sum() >= 0.75 * flipped.sum()
  assert flipped[rows].mean() >= 0.9
  right = suggested == labels[rows]
  assert right[flipped[rows]].mean() >= 0.9


def test_a_group_is_in_one_fold_and_folds_are_even():
  groups = np.random.default_rng(0).integers(0, 23, 300)
  fold = label_errors._folds(groups, 5, seed=1)
  assert all(len(set(fold[groups == g])) == 1 for g in range(23))
  held = [len(set(groups[fold == k])) for k in range(5)]
  assert sorted(held) == [4, 4, 5, 5, 5]


def test_copies_do_not_vouch_for_each_other():
  """Pairs of copies with one wrong label; together they would be learned."""
  random = np.random.default_rng(0)
  features = np.repeat(np.eye(60, dtype=np.float32), 2, 0)
  labels = np.repeat(random.integers(0, 2, 60), 2)
  together = label_errors.out_of_fold(features, labels, np.repeat(range(60), 2))
  apart = label_errors.out_of_fold(features, labels, np.arange(120))
  own = lambda p: p[np.arange(120), labels]
  # A feature that no other fold has says nothing; its copy says all.
  assert (own(together) > 0.8).mean() < 0.1 < 0.5 < (own(apart) > 0.8).mean()


def test_bad_folds_and_shapes_are_refused():
  ones, labels = np.ones((6, 2)), np.array([0, 1] * 3)
  with pytest.raises(UsageError, match='7 folds for 6 different groups'):
    label_errors.out_of_fold(ones, labels, np.arange(6), folds=7)
  with pytest.raises(UsageError, match='one class is left'):
    label_errors.out_of_fold(ones, np.array([0, 0, 1, 0, 0, 0]), np.arange(6))
  with pytest.raises(UsageError, match='classes'):
    label_errors.confident_errors(ones, labels[:4])
