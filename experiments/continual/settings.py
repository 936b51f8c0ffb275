"""What one would sweep in a table of methods, and what is no setting of it."""

import dataclasses
from collections.abc import Collection, Sequence

import numpy as np

import fmeta
from experiments.common import Seeds, require
from experiments.continual import rows
from experiments.continual.bench import SCENARIOS

# The smallest values that mean something, in each stream that has them.
LEAST = dict.fromkeys(
  (
    'seeds',
    'sizes',
    'iterations',
    'batch_size',
    'memory_size',
    'fisher_examples',
    'steps_per_dispatch',
    'train_examples',
    'test_examples',
    'tasks',
    'blocks',
    'rank',
    'random_features',
  ),
  1,
)


@dataclasses.dataclass
class Config:
  """What one would sweep in either stream."""

  seed: Seeds = dataclasses.field(default_factory=Seeds)
  seeds: int = 5
  scenario: str = 'domain'
  methods: tuple[str, ...] = (
    'none',
    'joint',
    'ewc',
    'online_ewc',
    'si',
    'mas',
    'rwalk',
    'lwf',
    'er',
    'er_matched',
    'er_ace',
    'der_plus_plus',
    'a_gem',
    'gem',
  )
  sizes: tuple[int, ...] = (400, 400)
  iterations: int = 2000  # per task
  batch_size: int = 128
  rate: float = 1e-3
  memory_size: int = 500
  fisher_examples: int = 1000  # first images of a task
  rates: tuple[str, ...] = ()  # `tuning:value` instead of `rate`
  # `method:value` instead of a search.
  strengths: tuple[str, ...] = ()
  steps_per_dispatch: int = 250
  train_examples: int = 60_000
  test_examples: int = 10_000


SMALL = {
  'seeds': 2,
  'methods': ('none', 'ewc', 'er'),
  'sizes': (8,),
  'iterations': 4,
  'batch_size': 8,
  'memory_size': 20,
  'fisher_examples': 8,
  'strengths': ('ewc:100',),
  'steps_per_dispatch': 2,
  'train_examples': 400,
  'test_examples': 200,
}


def check(
  config: Config, tunings: Collection[str] = (), others: Collection[str] = ()
) -> None:
  """Raises `UsageError` for what does not exist, before data are read.

  Args:
    config: of the experiment.
    tunings: names after the `@` of a method.
    others: rows that are not among the methods.
  """
  require(config, LEAST, ('rate',))
  for name in config.methods:
    rows.find(name, tunings)
  _once('methods', config.methods)
  if not config.methods and not others:
    raise fmeta.UsageError(
      f'config.methods is empty; give some of {", ".join(rows.ROWS)}'
    )
  strengths_of(config.strengths, tunings)
  rates_of(config.rates, tunings)
  if config.scenario not in SCENARIOS:
    raise fmeta.UsageError(
      f'no scenario {config.scenario!r}; possible: {", ".join(SCENARIOS)}'
    )


def strengths_of(
  given: Sequence[str], tunings: Collection[str] = ()
) -> dict[str, float]:
  """`method:value` of a config as numbers."""
  found = {}
  for item in given:
    name, _, value = item.partition(':')
    if not rows.find(name, tunings).grid:
      with_one = [key for key, row in rows.ROWS.items() if row.grid]
      raise fmeta.UsageError(
        f'{name!r} has no strength; possible: {", ".join(with_one)}'
      )
    found[name] = _number(item, value, 'strength', 'method:number')
  _once('strengths', [item.partition(':')[0] for item in given])
  return found


def as_published(config: Config) -> bool:
  """Whether a published number was measured with these settings.

  Seeds, methods, memories and strengths may differ.
  """
  fields = 'sizes', 'iterations', 'batch_size', 'rate', 'train_examples'
  fields += tuple(name for name in ('tasks',) if hasattr(config, name))
  protocol = type(config)()
  return all(getattr(config, k) == getattr(protocol, k) for k in fields)


def _once(what: str, names: Sequence[str]) -> None:
  twice = [name for k, name in enumerate(names) if name in names[:k]]
  if twice:
    raise fmeta.UsageError(
      f'config.{what} has {twice[0]!r} twice; give it once'
    )


def rates_of(
  given: Sequence[str], tunings: Collection[str] = ()
) -> dict[str, float]:
  """`tuning:value` of a config as numbers."""
  found = {}
  for item in given:
    name, _, value = item.partition(':')
    if name not in tunings:
      raise fmeta.UsageError(
        f'rate {item!r} names no tuning; possible: '
        + (', '.join(tunings) or 'none here, give --config.rate')
      )
    found[name] = _number(item, value, 'rate', 'tuning:number')
    if not found[name]:
      raise fmeta.UsageError(f'rate {item!r}; give a number above 0')
  return found


def _number(item: str, value: str, what: str, form: str) -> float:
  try:
    found = float(value)
  except ValueError:
    found = np.nan
  if not 0 <= found < np.inf:
    raise fmeta.UsageError(
      f'{what} {item!r}; give {form}, for example {form.partition(":")[0]}:1e-3'
    )
  return found
