"""What searches over stacked trials share: a round, its scores, its record."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fmeta.search.hyper import Hyper
from fmeta.search.ledger import Ledger
from fmeta.search.trials import Batches, Score, Trials, take
from fmeta.train.stages import Diverged
from fmeta.types import Array, TrainState

Scores = Sequence[float | None]  # None: diverged


class Group(NamedTuple):
  """Trials on their way, and what each of them runs with."""

  state: TrainState
  hyper: Hyper
  batches: Batches
  rng: Array

  def rows(self, kept: Sequence[int]) -> 'Group':
    """Only these trials."""
    batches = self.batches
    if not callable(batches):
      batches = [batches[k] for k in kept]
    index = np.array(kept)
    return Group(
      take(self.state, index),
      {name: np.asarray(v)[index] for name, v in self.hyper.items()},
      batches,
      self.rng[index] if self.rng.ndim else self.rng,
    )


def ranking(scores: Scores) -> list[int]:
  """Indices from best to worst; the first of a tie, diverged ones last."""
  values = [-np.inf if s is None else s for s in scores]
  return [int(i) for i in np.argsort(-np.array(values), kind='stable')]


def winner(scores: Scores) -> tuple[int, float]:
  """The best trial and its score; at least one has not diverged."""
  number = ranking(scores)[0]
  score = scores[number]
  assert score is not None  # `advance` raises before
  return number, score


def advance(
  trials: Trials,
  group: Group,
  score: Score,
  start: int,
  stop: int,
  ledger: Ledger | None,
  name: str,
) -> tuple[list[float | None], TrainState]:
  """Trains from step `start` to `stop` and scores, once per ledger.

  Raises:
    Diverged: if every trial did.
  """

  def run():
    state, _ = trials.run(*group, stop - start, start=start)
    scores = score(state, group.hyper)
    # As JSON holds them.
    plain = [float(s) if np.isfinite(s) else None for s in scores]
    return plain, state.replace(frozen={})

  if ledger is None:
    scores, moving = run()
  else:
    target = group.state.replace(frozen={})
    scores, moving = ledger.once_with_arrays(name, run, target)
  if all(s is None for s in scores):
    raise Diverged(
      f'all {len(scores)} trials diverged by step {stop}; try lower rates'
    )
  return scores, moving.replace(frozen=group.state.frozen)
