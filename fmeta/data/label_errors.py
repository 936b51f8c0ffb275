"""Likely label errors, by confident learning.

A classifier that never saw an example says how probable its given label is
(`out_of_fold`); where the model is sure of another class by the measure of
that class's own examples, the label is likely wrong (`confident_errors`).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from fmeta.draw import SPLIT, permutation
from fmeta.errors import UsageError


def confident_errors(
  probabilities: np.ndarray, labels: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Which examples count off the diagonal of the confident joint.

  The threshold of class j is the mean p_j of the examples labelled j. Of the
  classes whose threshold an example reaches, the most probable is its
  confident class; an example whose label is another one is a likely error
  (Northcutt, Jiang and Chuang 2021, https://arxiv.org/abs/1911.00068, eq. 1
  and 2, section 3.1).

  Args:
    probabilities: [N, C], out of sample.
    labels: [N] in [0, C).

  Returns:
    `rows` int64 [E], least self-confidence (the probability of the given
    label) first, and `suggested` int64 [E], their confident classes.

  Raises:
    UsageError: if the shapes do not fit.
  """
  probabilities, labels = np.asarray(probabilities), np.asarray(labels)
  if probabilities.ndim != 2 or len(probabilities) != len(labels):
    raise UsageError(
      f'probabilities {probabilities.shape} for {len(labels)} labels; give '
      '[N, classes] and [N]'
    )
  own = probabilities[np.arange(len(labels)), labels]
  counts = np.bincount(labels, minlength=probabilities.shape[1])
  sums = np.bincount(labels, own, minlength=probabilities.shape[1])
  # A class without examples is nobody's confident class.
  thresholds = np.where(counts > 0, sums / np.maximum(counts, 1), np.inf)
  reached = np.where(probabilities >= thresholds, probabilities, -1.0)
  confident = reached.argmax(1)
  wrong = (reached.max(1) >= 0) & (confident != labels)
  rows = np.flatnonzero(wrong)
  rows = rows[np.argsort(own[rows], kind='stable')]
  return rows, confident[rows]


def out_of_fold(
  features: Any,
  labels: np.ndarray,
  groups: np.ndarray,
  folds: int = 5,
  seed: int = 0,
  inverse_strength: float = 10.0,
) -> np.ndarray:
  """Probabilities by logistic regression on the other folds, [N, C].

  Args:
    features: [N, D], dense or sparse.
    labels: [N] in [0, C).
    groups: [N]; what has the same group is never on both sides of a fold.
      Copies of one example must share theirs, or they vouch for each other.
    folds: how many (5: untuned).
    seed: of the folds.
    inverse_strength: scikit-learn's C (10: of the probes in BUILD's data;
      untuned here).

  Raises:
    UsageError: if there are fewer groups than folds, or fewer than 2 folds.
  """
  from sklearn.linear_model import LogisticRegression

  fold = _folds(groups, folds, seed)
  classes = np.asarray(labels).max() + 1
  out = np.zeros((len(labels), classes))
  for index in range(folds):
    held = fold == index
    # Loose: ranks are wanted, not the last digit (see the test's recall).
    model = LogisticRegression(C=inverse_strength, tol=1e-3, max_iter=50)
    model.fit(features[~held], labels[~held])
    out[np.ix_(held, model.classes_)] = model.predict_proba(features[held])
  return out


def _folds(groups: np.ndarray, folds: int, seed: int) -> np.ndarray:
  """A fold for each row, whole groups, of nearly equal numbers of groups."""
  _, codes = np.unique(groups, return_inverse=True)
  count = codes.max() + 1
  if not 2 <= folds <= count:
    raise UsageError(
      f'{folds} folds for {count} different groups; give 2 to {count}'
    )
  place = np.empty(count, np.int64)
  place[permutation(seed, SPLIT, 1, count)] = np.arange(count) % folds
  return place[codes]


def tfidf(texts: Sequence[str]) -> Any:
  """Sparse TF-IDF of words and word pairs, float32 [N, V]."""
  from sklearn.feature_extraction.text import TfidfVectorizer

  vectorizer = TfidfVectorizer(
    ngram_range=(1, 2),
    sublinear_tf=True,
    min_df=2,
    token_pattern=r'\w+',
    dtype=np.float32,
  )
  return vectorizer.fit_transform(texts)
