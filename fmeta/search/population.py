"""Population-based training: hyper-parameters that change while it trains.

(Jaderberg et al. 2017, https://arxiv.org/abs/1711.09846.) What it finds is a
schedule. It is recorded, so one trial can be trained again by itself: see
`lineage`.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from fmeta import draw
from fmeta.errors import UsageError, suggest
from fmeta.search.hyper import EXPLORE, Hyper, num_trials
from fmeta.search.ledger import Ledger
from fmeta.search.rounds import Group, Scores, advance, ranking, winner
from fmeta.search.trials import Batches, Score, Trials, one, take
from fmeta.types import Array, TrainState


class Exploration(NamedTuple):
  """How trials are replaced (Jaderberg et al. 2017, section 4.1).

  Attributes:
    bounds: name -> (low, high), what is perturbed and within which bounds;
      other hyper-parameters are copied as they are.
    seed: with the round's number, all that the draws depend on.
    share: of the population that is replaced, at most a half.
    factors: a value is multiplied by one of these, each as likely.
  """

  bounds: Mapping[str, tuple[float, float]]
  seed: int
  share: float = 0.2
  factors: tuple[float, float] = (0.8, 1.2)


class Population(NamedTuple):
  """What a population became.

  Attributes:
    best: the slot with the best last score.
    score: that score.
    state: its state, of one run.
    rounds: per round `hyper` (name -> float32 [T], what it trained with),
      `scores` (None where diverged) and `source` ([T], whose state each slot
      went on with; its own unless it was replaced).
  """

  best: int
  score: float
  state: TrainState
  rounds: list[dict[str, Any]]


def population(
  trials: Trials,
  state: TrainState,
  hyper: Hyper,
  batches: Batches,
  rng: Array,
  score: Score,
  exploration: Exploration,
  *,
  interval: int,
  num_rounds: int,
  ledger: Ledger | None = None,
) -> Population:
  """Trains T trials; every so often the worst continue from the best.

  After each round but the last, a trial among the worst share takes the whole
  state and the hyper-parameters of one among the best share, drawn uniformly
  (truncation selection), and perturbs them. A trial that diverged is replaced
  as well, which the paper does not say. A slot keeps its key and its batches.

  Args:
    trials: the program.
    state: stacked, from `trials.init`.
    hyper: name -> [T], where they start.
    batches: as for `Trials.run`; batch i is for step i.
    rng: one key or keys [T].
    score: `(state, hyper) -> [T]`, higher is better; see `validation`.
    exploration: who is replaced, and what changes then.
    interval: steps of a round.
    num_rounds: how many.
    ledger: keeps finished rounds with their states, as for `halving`.

  Raises:
    UsageError: for settings that cannot be, or another search's ledger.
    Diverged: if every trial of a round did.
  """
  _check(hyper, exploration, interval, num_rounds)
  hyper = {k: np.asarray(v, np.float32) for k, v in hyper.items()}
  if ledger is not None:
    ledger.require('search', _settings(hyper, exploration, interval))
  group, rounds, scores = Group(state, hyper, batches, rng), [], []
  for index in range(num_rounds):
    start = index * interval
    scores, state = advance(
      trials, group, score, start, start + interval, ledger, f'round_{index}'
    )
    source = list(range(len(scores)))
    # The last round is not selected from: its states are the result.
    if index < num_rounds - 1:
      source = sources(scores, exploration, index)
    rounds.append({'hyper': hyper, 'scores': scores, 'source': source})
    hyper = explored(hyper, source, exploration, index)
    group = group._replace(state=take(state, source), hyper=hyper)
  best, value = winner(scores)
  return Population(best, value, one(state, best), rounds)


def sources(scores: Scores, exploration: Exploration, index: int) -> list[int]:
  """Truncation selection: whose state each slot goes on with, [T].

  Args:
    scores: of the round, None where a trial diverged.
    exploration: its share and seed.
    index: of the round.
  """
  size = len(scores)
  # Rounded: 0.29 * 100 is below 29.
  count = max(1, int(round(exploration.share * size, 6)))
  order = ranking(scores)
  best = [k for k in order[:count] if scores[k] is not None]
  worst = {*order[-count:], *(k for k in order if scores[k] is None)}
  words = _words(exploration, index, 0, size)
  return [
    best[int(words[k] % np.uint64(len(best)))] if k in worst else k
    for k in range(size)
  ]


def explored(
  hyper: Mapping[str, np.ndarray],
  source: Sequence[int],
  exploration: Exploration,
  index: int,
) -> dict[str, np.ndarray]:
  """The next round's values: copied, and perturbed where a slot was replaced.

  Args:
    hyper: name -> float32 [T, ...] of the round.
    source: from `sources`.
    exploration: its bounds, factors and seed.
    index: of the round.
  """
  moved = np.array(source) != np.arange(len(source))
  out = {}
  for stream, name in enumerate(hyper, 1):
    values = hyper[name][np.array(source)]
    if name in exploration.bounds:
      words = _words(exploration, index, stream, values.size)
      coins = (words >> np.uint64(63)).astype(int).reshape(values.shape)
      factors = np.array(exploration.factors, np.float32)[coins]
      low, high = exploration.bounds[name]
      new = np.clip(values * factors, np.float32(low), np.float32(high))
      where = moved.reshape(-1, *[1] * (values.ndim - 1))
      values = np.where(where, new, values)
    out[name] = values
  return out


def lineage(
  rounds: Sequence[Mapping[str, Any]], slot: int
) -> list[tuple[int, dict[str, np.ndarray]]]:
  """The schedule that made a slot's last state.

  Args:
    rounds: of a `Population`.
    slot: of the last round.

  Returns:
    Per round the slot that the state was in, whose key and batches it used,
    and its hyper-parameters: training with these, one round after the other,
    from that slot's start gives the same state.
  """
  path = []
  for number, each in enumerate(reversed(rounds)):
    slot = each['source'][slot] if number else slot
    values = {name: held[slot] for name, held in each['hyper'].items()}
    path.append((slot, values))
  return path[::-1]


def _words(exploration: Exploration, index: int, stream: int, count: int):
  # Rounds and streams are far apart in the counter: no draw reaches the next.
  start = (index << 128) + (stream << 64)
  return draw.random_words(exploration.seed, EXPLORE, start, count)


def _settings(hyper, exploration: Exploration, interval: int) -> dict:
  return {
    'hyper': {name: values.tolist() for name, values in hyper.items()},
    'interval': interval,
    **exploration._asdict(),
    'bounds': {k: [float(x) for x in v] for k, v in exploration.bounds.items()},
  }


def _check(hyper, exploration: Exploration, interval, num_rounds) -> None:
  size = num_trials(hyper)
  if size < 2 or interval < 1 or num_rounds < 1:
    raise UsageError(
      f'{size} trials, interval={interval}, num_rounds={num_rounds}; give at '
      'least 2, 1, 1'
    )
  if not 0 < exploration.share <= 0.5:
    raise UsageError(
      f'share={exploration.share}; give one in (0, 0.5]: nobody is among the '
      'best and the worst'
    )
  if not exploration.bounds:
    raise UsageError(
      f'nothing to explore; give bounds of some of {sorted(hyper)}'
    )
  for name, (low, high) in exploration.bounds.items():
    if name not in hyper:
      raise UsageError(
        f'no hyper-parameter {name!r} to explore{suggest(name, hyper)}'
      )
    if not low < high:
      raise UsageError(f'bounds ({low}, {high}) of {name!r}; give low < high')
