"""Evaluation: a pure forward pass over prepared batches, jitted here.

Parameters are always arguments of the compiled function, never captured by
it: one compilation per batch shape serves every checkpoint, seed and method
that shares a `Forward`.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import numpy as np

from fmeta import metrics
from fmeta.errors import UsageError
from fmeta.types import Array, Batch, Forward, ModelState, Params

# (params, episode batch, rng) -> query logits [tasks, ..., queries, ways]
PredictEpisode = Callable[[Params, Batch, Array | None], Array]


class Predictions(NamedTuple):
  """What a model said about labelled examples, in their order.

  Attributes:
    logits: [N, C], padding rows dropped.
    labels: [N].
  """

  logits: np.ndarray
  labels: np.ndarray

  @property
  def classes(self) -> np.ndarray:
    """Predicted class per example, [N]."""
    return self.logits.argmax(-1)

  @property
  def correct(self) -> np.ndarray:
    """1.0 where the prediction is right, [N]."""
    return metrics.correctness(self.classes, self.labels)

  @property
  def accuracy(self) -> float:
    """Share of right predictions."""
    return float(self.correct.mean())

  @property
  def probabilities(self) -> np.ndarray:
    """Softmax of the logits, float64 [N, C]."""
    return _softmax(self.logits)


class Answers(NamedTuple):
  """What was said about the queries of `num` episodes.

  Attributes:
    logits: [num, Q, ways], or [num, K, Q, ways] after K numbers of steps.
    labels: [num, Q].
    weight: [num, Q], zero for padding.
  """

  logits: np.ndarray
  labels: np.ndarray
  weight: np.ndarray

  @property
  def accuracies(self) -> np.ndarray:
    """Of each episode, float64 [num] or [num, K]."""
    # Queries before steps, so that labels and weights lie beside them.
    classes = np.moveaxis(self.logits.argmax(-1), -1, 1)
    more = (...,) + (None,) * (classes.ndim - 2)
    right, weight = classes == self.labels[more], self.weight[more]
    return (right * weight).sum(1) / weight.sum(1)

  @property
  def calibration_error(self) -> float | np.ndarray:
    """`metrics.expected_calibration_error` over all queries, for each of K."""
    if self.logits.ndim == 4:
      steps = np.moveaxis(self.logits, 1, 0)
      found = [self._replace(logits=step).calibration_error for step in steps]
      return np.array(found)
    kept = self.weight > 0
    return metrics.expected_calibration_error(
      _softmax(self.logits[kept]), self.labels[kept]
    )


def _softmax(logits: np.ndarray) -> np.ndarray:
  shifted = logits.astype(np.float64)
  shifted = np.exp(shifted - shifted.max(-1, keepdims=True))
  return shifted / shifted.sum(-1, keepdims=True)


class Summary(NamedTuple):
  """A mean over `n` episodes with its 95% interval (low, high)."""

  mean: float
  ci95: tuple[float, float]
  n: int


# The function is static and hashed by identity: the same Forward object,
# evaluated again, finds its compiled program.
@functools.partial(jax.jit, static_argnums=0)
def _outputs(forward, params, model_state, batch):
  return forward(params, model_state, batch, None)[0]


@functools.partial(jax.jit, static_argnums=0)
def _episode_logits(predict_fn, params, episode, rng):
  return predict_fn(params, episode, rng)


def _to_host(array: Array) -> np.ndarray:
  """The whole array as numpy, also when other processes hold parts of it."""
  if array.is_fully_addressable:
    return np.asarray(array)
  from jax.experimental import multihost_utils

  return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def evaluate(
  forward: Forward,
  params: Params,
  model_state: ModelState,
  batches: Iterable[Batch],
  *,
  put: Callable[[Batch], Any] = lambda batch: batch,
) -> Predictions:
  """Runs a classifier over batches in evaluation mode (rng=None).

  Args:
    forward: gives logits [B, C]; pass the same object again to reuse its
      compiled program.
    params: merged parameters, as `Learner.params` gives them.
    model_state: read, not changed.
    batches: what `eval_batches` gives: `label` [B] and, where rows are
      padding, `weight` [B] with zeros.
    put: places a batch on devices, for example over a mesh.

  Raises:
    UsageError: if there is nothing to evaluate or the logits are not [B, C].
  """
  logits, labels, kept = [], [], []
  for batch in batches:
    label = np.asarray(batch['label'])
    out = _outputs(forward, params, model_state, put(batch))
    if out.ndim != 2 or len(out) != len(label):
      raise UsageError(
        f'forward gave {out.shape} for {len(label)} labels; '
        'a classifier gives logits [batch, classes]'
      )
    logits.append(out)
    labels.append(label)
    kept.append(np.asarray(batch.get('weight', np.ones(len(label)))) > 0)
  if not labels or not np.concatenate(kept).any():
    raise UsageError('no examples to evaluate; give at least one batch')
  # Fetched after the loop so that the device never waits for the host.
  keep = np.concatenate(kept)
  return Predictions(
    np.concatenate([_to_host(out) for out in logits])[keep],
    np.concatenate(labels)[keep],
  )


def accuracy_of(
  forward: Forward,
  params: Params,
  model_state: ModelState,
  batches: Iterable[Batch],
  **kwargs: Any,
) -> float:
  """Accuracy over batches; arguments as in `evaluate`."""
  return evaluate(forward, params, model_state, batches, **kwargs).accuracy


def evaluate_episodes(
  predict_fn: PredictEpisode,
  params: Params,
  episodes: Callable[[int], Batch],
  num: int,
  *,
  rng: Array | None = None,
) -> np.ndarray:
  """Query accuracy of each of the first `num` episodes, float64 [num].

  Queries of weight zero (padding) do not count. Arguments are those of
  `answer_episodes`, which keeps the logits.
  """
  return answer_episodes(predict_fn, params, episodes, num, rng=rng).accuracies


def answer_episodes(
  predict_fn: PredictEpisode,
  params: Params,
  episodes: Callable[[int], Batch],
  num: int,
  *,
  rng: Array | None = None,
) -> Answers:
  """Query logits, labels and weights of the first `num` episodes.

  Args:
    predict_fn: `(params, episode batch, rng) -> logits [tasks, Q, ways]` (or
      [tasks, K, Q, ways], see `fewshot.predict_by_step`), adapted to the
      support set; jitted here, so it must be pure.
    params: what it adapts from, an argument of the compiled program.
    episodes: `i -> {'support', 'query'}`, leaves [tasks, examples, ...]; when
      `tasks` does not divide `num`, the surplus is computed and dropped.
    num: 600 is the few-shot convention (MAML, Prototypical Networks).
    rng: root key; batch i sees `fold_in(rng, i)`.

  Raises:
    UsageError: if `num` < 1 or the logits do not fit the query labels.
  """
  if num < 1:
    raise UsageError(f'num={num} episodes; give at least 1')
  answers, done, index = [], 0, 0
  while done < num:
    episode = episodes(index)
    key = None if rng is None else jax.random.fold_in(rng, index)
    labels = np.asarray(episode['query']['label'])
    logits = _episode_logits(predict_fn, params, episode, key)
    queries = logits.shape[:1] + logits.shape[-2:-1]
    if logits.ndim not in (3, 4) or queries != labels.shape:
      raise UsageError(
        f'predict_fn gave {logits.shape} for query labels {labels.shape}; '
        'it gives logits [tasks, queries, ways]'
      )
    weight = episode['query'].get('weight', np.ones(labels.shape))
    weight = np.asarray(weight, np.float64)
    most = int(labels[weight > 0].max(initial=0))
    if most >= logits.shape[-1]:
      raise UsageError(
        f'a query has label {most} and predict_fn gave {logits.shape[-1]} '
        'logits; give the model or head as many ways as the episodes have'
      )
    answers.append((logits, labels, weight))
    done, index = done + len(labels), index + 1
  # Fetched after the loop so that the device never waits for the host.
  fetched = [(_to_host(out), *rest) for out, *rest in answers]
  return Answers(*(np.concatenate(x)[:num] for x in zip(*fetched, strict=True)))


def summarize(values: np.ndarray) -> Summary:
  """Mean of per-episode values [n] with the interval of `mean_ci95`."""
  mean, half = metrics.mean_ci95(values)
  return Summary(mean, (mean - half, mean + half), len(values))
