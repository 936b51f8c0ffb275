"""What Omniglot's methods are tested on, and the tests."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

import fmeta
from experiments.fewshot.omniglot import measure
from experiments.fewshot.omniglot.weights import experiment_of
from fmeta import episodes, evaluate
from fmeta.workdir import Context

TASKS = 10  # at a time


class Method(NamedTuple):
  """What is trained, and how it answers.

  Attributes:
    learner: steps on meta-batches.
    params: where it starts.
    predict: for `evaluate_episodes`, by the statistics of the query batch.
    predict_alone: the same by those of the support, see `measure.by_support`.
    train_ways: classes per training task; 0: as in testing.
    by_step: `predict` after 0 to `curve_steps` inner steps; None: has none.
    train_shots: examples per class of a training task; 0: as in testing.
    probabilities: whether a softmax of what `predict` gives is its answer.
    per_step: `(params, training meta-batches) -> predict` by their statistics
      after as many inner steps, see `measure.by_training`; None: has none.
    source: wraps the training meta-batches, `(i -> batch) -> (i -> batch)`.
  """

  learner: fmeta.Learner
  params: Any
  predict: Callable
  predict_alone: Callable
  train_ways: int
  by_step: Callable | None = None
  train_shots: int = 0
  probabilities: bool = True
  per_step: Callable | None = None
  source: Callable = lambda batches: batches


class Lists(NamedTuple):
  """Fixed episodes: of validation, of the test, and of the most shots."""

  validation: episodes.EpisodeList
  test: episodes.EpisodeList
  most: episodes.EpisodeList | None


class Found(NamedTuple):
  """What a test finds.

  Attributes:
    right: name -> accuracy of each episode.
    lists: name -> which list of episodes.
    calibration: the calibration error, if there is any.
  """

  right: dict[str, np.ndarray]
  lists: dict[str, str]
  calibration: dict[str, float]


def lists_of(config: Any, parts: dict[str, dict]) -> Lists:
  """The lists, made when read.

  Raises:
    UsageError: if a character has too few drawings, or sizes do not divide.
  """
  shots = sorted(config.curve_shots)
  if len(set(shots)) < len(shots) or min(shots, default=1) < 1:
    raise fmeta.UsageError(
      f'curve_shots {config.curve_shots}; give different numbers from 1'
    )

  def of(split, shots, num):
    queries = config.test_queries or config.shots
    return episodes.evaluation_episodes(
      parts[split], config.ways, shots, queries, 0, num, tasks=TASKS
    )

  return Lists(
    of('validation', config.shots, config.validation_episodes),
    of('test', config.shots, config.test_episodes),
    of('test', shots[-1], config.curve_episodes) if shots else None,
  )


def test(
  config: Any,
  context: Context,
  method: Method,
  params: Any,
  lists: Lists,
  source: Callable[[int], episodes.Episode],
) -> Found:
  """Tests, prints and draws.

  Args:
    config: the task's.
    context: of the job.
    method: what answers.
    params: trained.
    lists: of episodes.
    source: training meta-batches, for `Method.per_step`.
  """
  norm, unseen = config.norm, lists.test
  queries = config.test_queries or config.shots
  asked = f'{config.ways}-way{{}}, test queries of a class: {queries}'
  if name := experiment_of(context.workdir):
    asked = f'{name}, {asked}'
  found, error = measure.test(
    method.predict, method.predict_alone, params, unseen, norm
  )
  if method.per_step and config.statistics_batches and norm != 'group':
    batches = [source(i) for i in range(config.statistics_batches)]
    found['accuracy_per_step_statistics'] = evaluate.evaluate_episodes(
      method.per_step(params, batches), params, unseen, unseen.num
    )
  measure.report({k: evaluate.summarize(v) for k, v in found.items()})
  calibration = {'calibration_error': error} if method.probabilities else {}
  if calibration:
    print(f'calibration error ({norm}): {100 * error:.2f} %')
  if method.by_step:
    by_step = measure.after_steps(method.by_step, params, unseen, norm)
    places = range(config.curve_steps + 1)
    path = context.workdir / 'steps.png'
    title = asked.format(f' {config.shots}-shot')
    measure.draw_curve(by_step, places, norm, 'inner steps', path, title)
    found |= by_step
  tested_on = f'{config.ways} ways, {{}} shots, {queries} queries'
  names = dict.fromkeys(found, tested_on.format(config.shots))
  if lists.most:
    places = sorted(config.curve_shots)
    by_shots = measure.with_shots(
      method.predict, params, lists.most, places, norm
    )
    path = context.workdir / 'shots.png'
    title = asked.format('')
    measure.draw_curve(by_shots, places, norm, 'shots', path, title)
    found |= by_shots
    names |= dict.fromkeys(by_shots, tested_on.format(f'up to {places[-1]}'))
  return Found(found, names, calibration)
