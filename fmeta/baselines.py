"""What any method has to beat: majority, nearest class mean, TF-IDF + SVM.

A frozen encoder with nearest class means is as good as many a trained method
(Janson et al. 2022, https://arxiv.org/abs/2210.04428), so these stand in
every table. The nearest-mean functions are pure JAX on one problem; `vmap`
gives episodes.
"""

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from fmeta import metrics
from fmeta.errors import UsageError
from fmeta.types import Array, Batch, Params

# (support [S, D], labels [S], queries [Q, D], num_classes, weight [S] or None)
#   -> scores [Q, C]
NearestMean = Callable[..., Array]


class Baseline(NamedTuple):
  """A fitted baseline's answers.

  Attributes:
    predictions: [N] classes of the test examples.
    setting: what was chosen, in words.
    tried: setting -> validation accuracy, for each one tried.
    num_parameters: how many numbers were fitted.
    seconds: fitting and predicting, all settings together.
  """

  predictions: np.ndarray
  setting: str
  tried: dict[str, float]
  num_parameters: int
  seconds: float

  def correct(self, labels: ArrayLike) -> np.ndarray:
    """1.0 where the prediction equals the label, [N]."""
    return metrics.correctness(self.predictions, labels)


def majority(train_labels: ArrayLike, num_test: int) -> Baseline:
  """Always the most frequent training class; the lowest one of a tie."""
  labels = np.asarray(train_labels)
  if labels.size == 0:
    raise UsageError('no training labels; the majority class needs some')
  most = int(np.bincount(labels).argmax())
  predictions = np.full(num_test, most)
  return Baseline(predictions, f'always class {most}', {}, 1, 0.0)


def class_sums(
  embeddings: Array,
  labels: Array,
  num_classes: int,
  weight: Array | None = None,
) -> tuple[Array, Array]:
  """Sum of embeddings per class [C, D] and number of examples per class [C].

  Rows count as often as `weight` [N] says, 0 for padding; a row whose label is
  none of the classes counts for nothing.
  """
  member = jax.nn.one_hot(labels, num_classes, dtype=embeddings.dtype)
  if weight is not None:
    member = member * weight.astype(member.dtype)[:, None]
  return jnp.matmul(member.T, embeddings, precision='highest'), member.sum(0)


def class_means(
  embeddings: Array,
  labels: Array,
  num_classes: int,
  weight: Array | None = None,
) -> tuple[Array, Array]:
  """Mean embedding per class [C, D] and number of examples per class [C].

  The mean of a class without examples is zero; its count says so. Arguments
  as in `class_sums`.
  """
  sums, counts = class_sums(embeddings, labels, num_classes, weight)
  return sums / jnp.where(counts > 0, counts, 1)[:, None], counts


def unit_length(vectors: Array) -> Array:
  """Rows scaled to length one; a zero row stays zero."""
  squared = jnp.sum(vectors**2, axis=-1, keepdims=True)
  return vectors * jax.lax.rsqrt(jnp.maximum(squared, 1e-24))


def nearest_mean_cosine(
  support: Array,
  labels: Array,
  queries: Array,
  num_classes: int,
  weight: Array | None = None,
) -> Array:
  """Cosine of a query with each class mean of unit-length rows, [Q, C].

  A class absent from `labels` scores -inf, so it is never predicted.

  Args:
    support: [S, D] raw embeddings; they are scaled to unit length here.
    labels: [S] in [0, num_classes).
    queries: [Q, D].
    num_classes: C, static under jit.
    weight: [S], 0 for padding; all ones by default.
  """
  rows = unit_length(support)
  means, counts = class_means(rows, labels, num_classes, weight)
  scores = jnp.matmul(
    unit_length(queries), unit_length(means).T, precision='highest'
  )
  return jnp.where(counts > 0, scores, -jnp.inf)


def nearest_mean_euclid(
  support: Array,
  labels: Array,
  queries: Array,
  num_classes: int,
  weight: Array | None = None,
) -> Array:
  """Minus the squared distance to each class mean of RAW rows, [Q, C].

  The classifier of Prototypical Networks (Snell et al. 2017,
  https://arxiv.org/abs/1703.05175, eq. 2). Arguments and absent classes as in
  `nearest_mean_cosine`, of which it is not a rescaling: vectors keep their
  lengths.
  """
  means, counts = class_means(support, labels, num_classes, weight)
  # |q - m|^2 as one product; differences [Q, C, D] would not fit for a
  # data set.
  cross = jnp.matmul(queries, means.T, precision='highest')
  squared = (queries**2).sum(-1)[:, None] + (means**2).sum(-1)[None, :]
  return jnp.where(counts > 0, 2 * cross - squared, -jnp.inf)


def nearest_mean(
  rule: NearestMean,
  train: ArrayLike,
  train_labels: ArrayLike,
  test: ArrayLike,
  num_classes: int,
) -> Baseline:
  """Nearest class mean of embeddings [N, D] under one of the two rules."""
  start = time.perf_counter()
  labels = np.asarray(train_labels)
  if len(labels) == 0 or labels.min() < 0 or labels.max() >= num_classes:
    raise UsageError(
      f'{len(labels)} training labels, not all in 0..{num_classes - 1}; '
      'give at least one and only classes in range'
    )
  scores = jax.jit(rule, static_argnums=3)(
    jnp.asarray(train), jnp.asarray(labels), jnp.asarray(test), num_classes
  )
  predictions = np.asarray(scores).argmax(-1)
  size = num_classes * np.shape(train)[1]
  seconds = time.perf_counter() - start
  return Baseline(predictions, 'class means', {}, size, seconds)


def nearest_mean_episodes(
  embed: Callable[[Params, Batch], Array], rule: NearestMean, ways: int
) -> Callable[[Params, Batch, Array | None], Array]:
  """Nearest class mean as the `predict_fn` of `evaluate_episodes`.

  Args:
    embed: `(params, batch) -> [B, D]`, in evaluation mode.
    rule: `nearest_mean_cosine` or `nearest_mean_euclid`.
    ways: classes per episode.

  Returns:
    `(params, episode, rng) -> scores [tasks, queries, ways]`.
  """

  def predict(params: Params, episode: Batch, rng: Array | None) -> Array:
    del rng
    labels = jnp.asarray(episode['support']['label'])
    weight = episode['support'].get('weight', np.ones(labels.shape, np.float32))
    tasks = labels.shape[0]
    # One forward over all tasks: an encoder wants one large batch.
    flat = [
      embed(params, jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), part))
      for part in (episode['support'], episode['query'])
    ]
    support, queries = (x.reshape(tasks, -1, x.shape[-1]) for x in flat)
    return jax.vmap(rule, in_axes=(0, 0, 0, None, 0))(
      support, labels, queries, ways, weight
    )

  return predict


def tfidf_svm(
  train: tuple[Sequence[str], ArrayLike],
  valid: tuple[Sequence[str], ArrayLike],
  test: Sequence[str],
  strengths: Sequence[float] = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0),
  seed: int = 0,
) -> Baseline:
  """TF-IDF of words and word pairs, linear SVM, C chosen on validation.

  Args:
    train: texts and labels that are fitted.
    valid: texts and labels that choose C; the smaller C of a tie wins.
    test: texts to predict.
    strengths: the grid of C; give as many as other methods have settings.
      The default is untuned.
    seed: of the solver's coordinate order.

  Raises:
    UsageError: if a split is empty or the grid is.
  """
  # Imported here: scikit-learn takes a second that other users do not owe.
  from sklearn.feature_extraction.text import TfidfVectorizer
  from sklearn.svm import LinearSVC

  for name, texts in (('train', train[0]), ('valid', valid[0]), ('test', test)):
    if len(texts) == 0:
      raise UsageError(f'split {name!r} has no texts; give at least one')
  if not strengths:
    raise UsageError('strengths is empty; give at least one value of C')
  start = time.perf_counter()
  vectorizer = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
  features = vectorizer.fit_transform(train[0])
  valid_features = vectorizer.transform(valid[0])
  best, best_score, tried = None, -1.0, {}
  for strength in sorted(strengths):
    model = LinearSVC(C=strength, random_state=seed, max_iter=10_000)
    model.fit(features, np.asarray(train[1]))
    score = metrics.accuracy(model.predict(valid_features), valid[1])
    tried[f'C={strength:g}'] = score
    if score > best_score:
      best, best_score = model, score
  assert best is not None
  predictions = np.asarray(best.predict(vectorizer.transform(test)))
  size = np.size(best.coef_) + np.size(best.intercept_)
  seconds = time.perf_counter() - start
  return Baseline(predictions, f'C={best.C:g}', tried, size, seconds)
