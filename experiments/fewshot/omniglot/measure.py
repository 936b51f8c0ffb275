"""Accuracy on Omniglot's test episodes, with the normalisation in its name.

Statistics of the query batch tell which queries belong together
("transductive", the published way). `by_support` judges each query alone,
normalised by the support set's statistics. Group norm sees one image at a
time, so it has one number. With shuffled support labels every method must be
at one over the ways: what is above has leaked.
"""

import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

import fmeta
from fmeta import controls, episodes, evaluate
from fmeta.datasets import omniglot
from fmeta.models import IMAGE, Conv4, computing_in, forward, init
from fmeta.report import Line, curves


def by_support(config: Any, num_classes: int | None) -> fmeta.Forward:
  """The model with norms that use the statistics of `support_image`.

  Args:
    config: with `filters` and `norm`.
    num_classes: of the head; None: without one.
  """
  norm = 'group' if config.norm == 'group' else 'running'
  model = Conv4(num_classes, config.filters, norm)
  run = computing_in(forward(model, IMAGE), config.precision)
  if norm == 'group':
    return run
  side = (1, omniglot.SIDE, omniglot.SIDE, 1)
  _, empty = init(
    model, jax.random.key(0), {'image': np.zeros(side, np.float32)}, IMAGE
  )

  def judge(params, model_state, batch, rng):
    del rng
    # A key means training mode: the statistics of this very batch are kept.
    support = {'image': batch['support_image']}
    _, statistics = run(params, empty, support, jax.random.key(0))
    return run(params, statistics, batch, None)[0], model_state

  return judge


def with_support(episode: episodes.Episode) -> episodes.Episode:
  """The episode with its support images beside both parts."""
  support = {'support_image': episode['support']['image']}
  return {name: {**part, **support} for name, part in episode.items()}


def test(
  predict: Callable,
  predict_alone: Callable,
  params: Any,
  held_out: episodes.EpisodeList,
  norm: str,
) -> tuple[dict[str, np.ndarray], float]:
  """Name -> accuracy of each episode; the first's calibration error.

  Args:
    predict: for `answer_episodes`, with the norm as in training.
    predict_alone: the same by the support's statistics.
    params: trained.
    held_out: the episodes.
    norm: as in training.
  """
  first = f'accuracy_{norm}'
  judged = {first: (predict, held_out.__getitem__)}
  if norm != 'group':
    judged['accuracy_support_statistics'] = (
      predict_alone,
      lambda i: with_support(held_out[i]),
    )
  judged['accuracy_shuffled_labels'] = (
    predict,
    lambda i: controls.shuffle_support_labels(held_out[i], 0),
  )
  found = {
    name: evaluate.answer_episodes(how, params, source, len(held_out) * 10)
    for name, (how, source) in judged.items()
  }
  error = found[first].calibration_error
  return {name: answers.accuracies for name, answers in found.items()}, error


def curve(
  by_step: Callable,
  params: Any,
  held_out: episodes.EpisodeList,
  norm: str,
  folder: pathlib.Path,
) -> dict[str, float]:
  """Accuracy after each number of inner steps; draws `steps.png`."""
  right = evaluate.answer_episodes(
    by_step, params, held_out.__getitem__, len(held_out) * 10
  ).accuracies
  found = [evaluate.summarize(values) for values in right.T]
  line = Line(
    norm,
    range(len(found)),
    [one.mean for one in found],
    [one.ci95 for one in found],
  )
  picture = curves([line], xlabel='inner steps')
  (folder / 'steps.png').write_bytes(picture.png)
  print(
    f'accuracy by inner steps ({norm}):',
    *(f'{100 * one.mean:.2f}' for one in found),
  )
  return {f'accuracy_after_{k}': one.mean for k, one in enumerate(found)}


def report(tested: dict[str, evaluate.Summary]) -> None:
  """Prints accuracies."""
  for name, (mean, (low, high), num) in tested.items():
    half = 100 * (high - low) / 2
    print(f'{name}: {100 * mean:.2f} +- {half:.2f} % ({num} episodes)')
