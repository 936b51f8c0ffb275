"""Successive halving and Hyperband over stacked trials.

Many trials start, the better part of them goes on. Trials are a leading axis,
so a rung is one program for its number of trials: the number shrinks from rung
to rung, and each size is compiled once.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from fmeta.errors import UsageError
from fmeta.search.hyper import Hyper, num_trials
from fmeta.search.ledger import Ledger
from fmeta.search.rounds import Group, advance, ranking, winner
from fmeta.search.trials import Batches, Score, Trials, one
from fmeta.types import Array, TrainState


class Rung(NamedTuple):
  """How many trials are trained up to how many steps, counted from step 0."""

  trials: int
  steps: int


class Halved(NamedTuple):
  """What a search by halving found.

  Attributes:
    best: number of the winner among the first rung's trials.
    score: its last score.
    state: its state, of one run, after the last rung.
    rungs: per rung `trials` (their numbers), `steps` and `scores`, None where
      a trial diverged.
  """

  best: int
  score: float
  state: TrainState
  rungs: list[dict[str, Any]]


def rungs(
  size: int, max_steps: int, *, eta: int = 3, depth: int | None = None
) -> list[Rung]:
  """Successive halving: 1/eta of the trials get eta times the steps.

    n_i = floor(n eta^-i),  r_i = floor(R eta^(i - s)),  i = 0..s

  (Jamieson & Talwalkar 2016, https://arxiv.org/abs/1502.07943, figure 1, in
  the form of Li et al. 2018, https://arxiv.org/abs/1603.06560, algorithm 1.)

  Args:
    size: trials n of the first rung.
    max_steps: steps R of the last rung's trials.
    eta: 3 or 4 (Li et al. 2018, section 3.6).
    depth: s; by default as deep as `size` and `max_steps` allow.

  Raises:
    UsageError: if some rung would have no trial or no step.
  """
  if size < 1 or max_steps < 1 or eta < 2:
    raise UsageError(
      f'{size} trials, {max_steps} steps, eta={eta}; give at least 1, 1, 2'
    )
  deepest = _log(eta, min(size, max_steps))
  depth = deepest if depth is None else depth
  if not 0 <= depth <= deepest:
    raise UsageError(
      f'depth {depth} does not fit {size} trials of {max_steps} steps at '
      f'eta={eta}; give 0..{deepest}'
    )
  return [
    Rung(size // eta**i, max_steps // eta ** (depth - i))
    for i in range(depth + 1)
  ]


def brackets(
  max_steps: int, *, unit: int = 1, eta: int = 3
) -> list[list[Rung]]:
  """Hyperband's plans, from most trials to most steps.

    R = floor(max_steps / unit), s_max = floor(log_eta R),
    n_s = ceil((s_max + 1) eta^s / (s + 1)),  s = s_max..0

  so that every bracket costs about (s_max + 1) R units (Li et al. 2018,
  https://arxiv.org/abs/1603.06560, algorithm 1).

  Args:
    max_steps: steps of a trial that is never stopped.
    unit: the fewest steps after which a trial may be judged.
    eta: as for `rungs`.

  Raises:
    UsageError: if a unit is longer than the whole.
  """
  if not 1 <= unit <= max_steps or eta < 2:
    raise UsageError(
      f'unit={unit}, max_steps={max_steps}, eta={eta}; give '
      '1 <= unit <= max_steps and eta >= 2'
    )
  most = _log(eta, max_steps // unit)
  sizes = [-(-(most + 1) * eta**s // (s + 1)) for s in range(most + 1)]
  return [
    rungs(sizes[s], max_steps, eta=eta, depth=s) for s in range(most, -1, -1)
  ]


def _log(base: int, number: int) -> int:
  """floor(log_base number), exactly."""
  power = 0
  while base ** (power + 1) <= number:
    power += 1
  return power


def num_steps(plan: Sequence[Rung]) -> int:
  """Steps of all trials together: what the plan costs."""
  before, total = 0, 0
  for rung in plan:
    total += rung.trials * (rung.steps - before)
    before = rung.steps
  return total


def halving(
  trials: Trials,
  state: TrainState,
  hyper: Hyper,
  batches: Batches,
  rng: Array,
  score: Score,
  plan: Sequence[Rung],
  *,
  ledger: Ledger | None = None,
) -> Halved:
  """Trains rung by rung and drops the worst in between.

  A trial that reaches a rung is bit by bit what the same trial is without the
  others, up to what vmapping over another number does (`looped`: nothing).

  Args:
    trials: the program.
    state: stacked, from `trials.init`.
    hyper: name -> [T].
    batches: as for `Trials.run`; batch i is for step i.
    rng: one key or keys [T].
    score: `(state, hyper) -> [T]`, higher is better; see `validation`.
    plan: from `rungs` or `brackets`; its first rung has all T trials.
    ledger: keeps finished rungs with their states; a killed search with the
      same arguments then continues after the last one.

  Raises:
    UsageError: if plan and trials do not fit, or the ledger is another's.
    Diverged: if every trial of a rung did.
  """
  size = _check(plan, hyper)
  if ledger is not None:
    ledger.require('search', _settings(hyper, plan))
  group, alive = Group(state, hyper, batches, rng), list(range(size))
  history, scores, before = [], [], 0
  for index, rung in enumerate(plan):
    if history:
      # In the order of their numbers, whatever their order of merit.
      kept = sorted(ranking(scores)[: rung.trials])
      group, alive = group.rows(kept), [alive[k] for k in kept]
    scores, state = advance(
      trials, group, score, before, rung.steps, ledger, f'rung_{index}'
    )
    group, before = group._replace(state=state), rung.steps
    history.append({'trials': alive, 'steps': rung.steps, 'scores': scores})
  best, value = winner(scores)
  return Halved(alive[best], value, one(group.state, best), history)


def _settings(hyper: Hyper, plan: Sequence[Rung]) -> dict[str, Any]:
  values = {name: np.asarray(v).tolist() for name, v in hyper.items()}
  return {'hyper': values, 'plan': [list(rung) for rung in plan]}


def _check(plan: Sequence[Rung], hyper: Hyper) -> int:
  size = num_trials(hyper)
  if not plan or plan[0].trials != size:
    first = plan[0].trials if plan else 'no'
    raise UsageError(
      f'the plan starts with {first} trials and hyper has {size}; make it '
      f'with rungs({size}, ...)'
    )
  for before, after in zip(plan, plan[1:], strict=False):
    if not (1 <= after.trials <= before.trials and after.steps > before.steps):
      raise UsageError(
        f'rung {tuple(after)} after {tuple(before)}; trials may not grow and '
        'steps have to'
      )
  return size


def hyperband(
  trials: Trials,
  start: Callable[[int, int], tuple[TrainState, Hyper, Array]],
  batches: Callable[[int], Any],
  score: Score,
  plans: Sequence[Sequence[Rung]],
  *,
  ledger: Ledger | None = None,
) -> tuple[int, list[Halved]]:
  """Successive halving once per bracket.

  Args:
    trials: the program.
    start: `(bracket, T) -> (stacked state, hyper, rng)`, pure.
    batches: the same for all trials.
    score: as for `halving`.
    plans: from `brackets`.
    ledger: as for `halving`.

  Returns:
    The bracket with the best score, and every bracket's result.

  Raises:
    UsageError: if there is no bracket.
  """
  if not plans:
    raise UsageError('no brackets; make them with brackets(max_steps)')
  found = []
  for index, plan in enumerate(plans):
    state, hyper, rng = start(index, plan[0].trials)
    own = None if ledger is None else ledger.under(f'bracket_{index}')
    found.append(
      halving(trials, state, hyper, batches, rng, score, plan, ledger=own)
    )
  return ranking([each.score for each in found])[0], found
