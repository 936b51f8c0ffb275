"""Hyper-parameters: many runs of the one step, side by side.

A learner is a function of its hyper-parameters, so trials are a leading axis
[T] on them and on what they move. Nothing here updates parameters: `Trials`
repeats `Learner.step` through `adapt`, and the searches only decide which
trials go on, and with which values.
"""

from fmeta.search.halving import (
  Halved,
  Rung,
  brackets,
  halving,
  hyperband,
  rungs,
)
from fmeta.search.hyper import grid, injected, log_uniform
from fmeta.search.ledger import Ledger
from fmeta.search.lr_range import Range, figure, range_test
from fmeta.search.outer import optuna_search
from fmeta.search.population import (
  Exploration,
  Population,
  lineage,
  population,
)
from fmeta.search.trials import Trials, keys, one, take, validation
from fmeta.search.ways import Comparison, compare, looped, mapped, vmapped

__all__ = (
  'Comparison',
  'Exploration',
  'Halved',
  'Ledger',
  'Population',
  'Range',
  'Rung',
  'Trials',
  'brackets',
  'compare',
  'figure',
  'grid',
  'halving',
  'hyperband',
  'injected',
  'keys',
  'lineage',
  'log_uniform',
  'looped',
  'mapped',
  'one',
  'optuna_search',
  'population',
  'range_test',
  'rungs',
  'take',
  'validation',
  'vmapped',
)
