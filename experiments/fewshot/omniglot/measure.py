"""Accuracy on Omniglot's test episodes, with the normalisation in its name.

Statistics of the query batch tell which queries belong together
("transductive": how MAML and its kin were published; ProtoNet, R2D2 and
Baseline++ were with running averages of training). They depend on how many
queries there are of each class: MAML trained for 600 iterations with one query
a class had 90.9 % of validation queries right when tested with one, and 86.6 %
with five (2026-11-26, see BUILD.md). `by_support` judges each query alone,
normalised by the support set's statistics, `by_training` by those that
training tasks have after as many inner steps ("per_step"). Group norm sees one
image at a time, so it has one number. With shuffled support labels every
method must be at one over the ways: what is above has leaked.
"""

import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

import fmeta
from fmeta import controls, episodes, evaluate
from fmeta.datasets import omniglot
from fmeta.models import IMAGE, Conv4, computing_in, forward, init
from fmeta.report import Line, curves

ModelOf = Callable[[fmeta.Forward], fmeta.Forward]


def same(model: fmeta.Forward) -> fmeta.Forward:
  """The model as it is."""
  return model


def by_support(
  config: Any, num_classes: int | None, model_of: ModelOf = same
) -> fmeta.Forward:
  """The model with norms that use the statistics of `support_image`.

  Args:
    config: with `filters`, `norm` and `precision`.
    num_classes: of the head; None: without one.
    model_of: wraps Conv4.
  """
  norm = 'group' if config.norm == 'group' else 'running'
  plain = forward(Conv4(num_classes, config.filters, norm), IMAGE)
  run = computing_in(model_of(plain), config.precision)
  if norm == 'group':
    return run
  empty = empty_statistics(config.filters)

  def judge(params, model_state, batch, rng):
    del rng
    # A key means training mode: the statistics of this very batch are kept.
    support = {'image': batch['support_image']}
    _, statistics = run(params, empty, support, jax.random.key(0))
    return run(params, statistics, batch, None)[0], model_state

  return judge


def by_training(
  config: Any,
  num_classes: int,
  inner: Any,
  num_steps: int,
  model_of: ModelOf = same,
) -> Callable[[Any, Sequence[episodes.Episode]], Callable]:
  """Statistics of training tasks, per inner step (MAML++, section 4).

  A support set leaves in each norm its mean and variance after `num_steps`
  inner steps; their averages over training tasks normalise the queries, each
  by itself. The inner loop runs as in training.

  Args:
    config: with `filters`, `norm` and `precision`.
    num_classes: of the head.
    inner: as for `fmeta.predict_episodes`.
    num_steps: of testing.
    model_of: wraps Conv4.

  Returns:
    `(trained parameters, training meta-batches) -> predict function`.
  """

  def run_with(norm):
    model = forward(Conv4(num_classes, config.filters, norm), IMAGE)
    return computing_in(model_of(model), config.precision)

  fresh, frozen = run_with('running'), run_with('frozen')
  empty = empty_statistics(config.filters)

  def leave(params, model_state, batch, rng):
    del rng
    support = {'image': batch['support_image']}
    return fresh(params, empty, support, jax.random.key(0))[1], model_state

  def judge(statistics, params, model_state, batch, rng):
    del rng
    return frozen(params, statistics, batch, None)[0], model_state

  collect = jax.jit(fmeta.predict_episodes(inner, leave, num_steps))

  def predict_of(params, tasks):
    found = [collect(params, with_support(batch), None) for batch in tasks]
    statistics = jax.tree.map(
      lambda *leaves: np.concatenate(leaves).mean(0), *found
    )
    return fmeta.predict_episodes(
      inner, functools.partial(judge, statistics), num_steps
    )

  return predict_of


def empty_statistics(filters: int) -> Any:
  """What norms with statistics of their own start from."""
  model = Conv4(None, filters, norm='running')
  side = (1, omniglot.SIDE, omniglot.SIDE, 1)
  image = {'image': np.zeros(side, np.float32)}
  return init(model, jax.random.key(0), image, IMAGE)[1]


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
  judged = {first: (predict, held_out)}
  if norm != 'group':
    judged['accuracy_support_statistics'] = (
      predict_alone,
      lambda i: with_support(held_out[i]),
    )
  judged[f'{first}_shuffled_labels'] = (
    predict,
    lambda i: controls.shuffle_support_labels(held_out[i], 0),
  )
  found = {
    name: evaluate.answer_episodes(how, params, source, held_out.num)
    for name, (how, source) in judged.items()
  }
  error = found[first].calibration_error
  return {name: answers.accuracies for name, answers in found.items()}, error


def after_steps(
  by_step: Callable, params: Any, held_out: episodes.EpisodeList, norm: str
) -> dict[str, np.ndarray]:
  """Name -> accuracy of each episode, after each number of inner steps."""
  right = evaluate.answer_episodes(
    by_step, params, held_out, held_out.num
  ).accuracies
  return {f'accuracy_{norm}_after_{k}': at for k, at in enumerate(right.T)}


def with_shots(
  predict: Callable,
  params: Any,
  most: episodes.EpisodeList,
  shots: Sequence[int],
  norm: str,
) -> dict[str, np.ndarray]:
  """Name -> accuracy of each episode, with more and more of its support.

  Args:
    predict: as in `test`.
    params: trained.
    most: episodes of the largest number of shots.
    shots: how many of them are used.
    norm: as in training.
  """

  def cut(i, used):
    episode = most[i]
    # The support is in whole shots: its start is a smaller support set.
    support = {
      key: rows[:, : most.source.ways * used]
      for key, rows in episode['support'].items()
    }
    return {**episode, 'support': support}

  return {
    f'accuracy_{norm}_{used}_shots': evaluate.evaluate_episodes(
      predict, params, functools.partial(cut, used=used), most.num
    )
    for used in shots
  }


def draw_curve(
  found: dict[str, np.ndarray],
  places: Sequence[int],
  norm: str,
  xlabel: str,
  path: pathlib.Path,
  title: str,
) -> None:
  """Prints means at `places` and draws them with their intervals.

  Args:
    found: accuracy of each episode, place by place.
    places: numbers of `xlabel`.
    norm: as in training.
    xlabel: 'inner steps' or 'shots'.
    path: of the picture.
    title: what was tested, of the picture.
  """
  at = [evaluate.summarize(values) for values in found.values()]
  line = Line(norm, places, [one.mean for one in at], [one.ci95 for one in at])
  label = f'{xlabel} ({at[0].n} episodes each)'
  path.write_bytes(curves([line], xlabel=label, title=title).png)
  shown = ', '.join(
    f'{place}: {100 * one.mean:.2f}'
    for place, one in zip(places, at, strict=True)
  )
  print(f'accuracy ({norm}) by {xlabel}: {shown} % ({at[0].n} episodes)')


def report(tested: dict[str, evaluate.Summary]) -> None:
  """Prints accuracies."""
  for name, (mean, (low, high), num) in tested.items():
    half = 100 * (high - low) / 2
    print(f'{name}: {100 * mean:.2f} +- {half:.2f} % ({num} episodes)')
