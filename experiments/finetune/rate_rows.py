"""The rows of `learned_rates.py`: each a grid of rate lists to choose from.

A grid may depend on the seed (each has learned its own rates) and on what an
earlier row chose (the head's rate). All grids have one size.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from experiments.common import best_setting, trial
from experiments.finetune.rate_policy import HEAD, Policy
from fmeta import optim, tree
from fmeta.errors import UsageError

PROBE, UNIFORM, DECAY = 'head only', 'uniform', 'decay'
LEARNED, FEW = 'learned', 'learned few'

Grid = Mapping[str, np.ndarray]  # setting -> rates [patterns]


class Outcome(NamedTuple):
  """A row: what it chose, by what, and its answers to the test tasks."""

  setting: str
  tried: dict[str, float]
  correct: np.ndarray  # [seeds, episodes, queries]
  seconds: float  # of the test tasks of one seed


def check_grids(config: Any) -> None:
  """Refuses rows that may choose from more settings than others.

  Raises:
    UsageError: naming the sizes.
  """
  rates, factors = len(config.rates), len(config.factors)
  sizes = {
    'heads': len(config.heads),
    'rates x head_rates': rates * len(config.head_rates),
    'rates x decays': rates * len(config.decays),
    'factors x head_factors': factors * len(config.head_factors),
    'factors x shares': factors * len(config.shares),
  }
  if len(set(sizes.values())) > 1 or not config.heads:
    raise UsageError(f'grids of unequal size {sizes}; give all rows the same')


def scaled(rates: tree.Patterns, factor: float, head: float) -> np.ndarray:
  """A list with its body's and its head's rates multiplied: [patterns]."""
  return np.array(
    [rate * (head if name == HEAD else factor) for name, rate in rates],
    np.float32,
  )


def without_slow(rates: tree.Patterns, share: float) -> tree.Patterns:
  """Zero for parts below `share` of the body's largest rate."""
  kept = (*optim.moving(rates[:-1], share), HEAD)
  return [(name, rate if name in kept else 0.0) for name, rate in rates]


def compete(
  policy: Policy, row: str, grid_of: Callable[[int], Grid]
) -> Outcome:
  """Chooses one setting on all seeds' validation tasks and tests it."""
  context, folder = policy.tasks.context, f'rows/{row.replace(" ", "_")}'
  seeds = range(policy.tasks.config.seeds)

  def validate(seed):
    return {
      setting: float(policy.correct(rates, 'validation', seed).mean())
      for setting, rates in grid_of(seed).items()
    }

  def test(seed):
    right = policy.correct(grid_of(seed)[chosen], 'test', seed)
    return {'correct': right.astype(int).tolist()}

  grids = [
    trial(context, f'{folder}/grid_{seed}', lambda s=seed: validate(s))
    for seed in seeds
  ]
  tried = {
    setting: float(np.mean([grid[setting] for grid in grids]))
    for setting in grid_of(0)
  }
  chosen = best_setting(tried)
  shown = {setting: round(value, 4) for setting, value in tried.items()}
  print(f'{row}: validation accuracy by setting {shown}', flush=True)
  made = [
    trial(context, f'{folder}/test_{seed}', lambda s=seed: test(s))
    for seed in seeds
  ]
  return Outcome(
    chosen,
    tried,
    np.array([one['correct'] for one in made], bool),
    float(np.mean([one['seconds'] for one in made])),
  )


def given(policy: Policy) -> Iterator[tuple[str, Outcome]]:
  """The rows that know nothing of other tasks."""
  config = policy.tasks.config
  heads = {f'head {h:g}': policy.uniform(0.0, h) for h in config.heads}
  yield PROBE, compete(policy, PROBE, lambda seed: heads)
  both = {
    f'rate {r:g}, head {h:g}': (r, h)
    for r in config.rates
    for h in config.head_rates
  }
  uniform = {name: policy.uniform(*rates) for name, rates in both.items()}
  outcome = compete(policy, UNIFORM, lambda seed: uniform)
  yield UNIFORM, outcome
  head = both[outcome.setting][1]
  decay = {
    f'rate {r:g}, decay {d:.3g}, head {head:g}': policy.decayed(r, d, head)
    for r in config.rates
    for d in config.decays
  }
  yield DECAY, compete(policy, DECAY, lambda seed: decay)


def learned(
  policy: Policy, lists: list[tree.Patterns]
) -> Iterator[tuple[str, Outcome]]:
  """The rows of learned rates; `lists` has those of each seed."""
  config = policy.tasks.config
  both = {
    f'body x {f:g}, head x {h:g}': (f, h)
    for f in config.factors
    for h in config.head_factors
  }
  outcome = compete(
    policy,
    LEARNED,
    lambda seed: {name: scaled(lists[seed], *fs) for name, fs in both.items()},
  )
  yield LEARNED, outcome
  head = both[outcome.setting][1]
  yield (
    FEW,
    compete(
      policy,
      FEW,
      lambda seed: {
        f'body x {f:g}, head x {head:g}, share {s:g}': scaled(
          without_slow(lists[seed], s), f, head
        )
        for f in config.factors
        for s in config.shares
      },
    ),
  )
