"""The outer search: Optuna for what no vmap can hold.

The rank of an adapter, the blocks that move or the optimiser decide the
program's structure, so each such trial is a run of its own. Optuna proposes
(extra `fmeta[search]`), a journal file remembers.
"""

import json
import math
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from fmeta.errors import UsageError
from fmeta.train.stages import Diverged

if TYPE_CHECKING:
  import optuna

_SPACE = 'space'


def optuna_search(
  objective: 'Callable[[dict[str, Any]], float]',
  space: 'Mapping[str, optuna.distributions.BaseDistribution]',
  *,
  num_trials: int,
  storage: str | os.PathLike,
  seed: int = 0,
  direction: str = 'maximize',
  sampler: 'Callable[[int], optuna.samplers.BaseSampler] | None' = None,
) -> 'optuna.Study':
  """Asks Optuna for settings until `num_trials` have been tried.

  Killed and called again with the same arguments it repeats no finished trial;
  the one that was running is tried again with the same settings. The proposals
  are a function of (seed, finished trials), so the resumed search is the
  uninterrupted one. One process at a time; if a kill leaves the journal's lock
  behind, Optuna takes it over after half a minute.

  Args:
    objective: `{name: value} -> float`. Not finite, or `Diverged`, counts as
      the worst possible value; any other exception ends the search.
    space: name -> `optuna.distributions.FloatDistribution(1e-5, 1e-1,
      log=True)`, `IntDistribution`, `CategoricalDistribution([...])`.
    num_trials: finished trials, those of before a kill included.
    storage: the journal file; made if needed, `workdir / 'search.journal'`.
    seed: of the sampler.
    direction: 'maximize' or 'minimize'.
    sampler: `seed -> sampler`; the tree-structured Parzen estimator (Bergstra
      et al. 2011), Optuna's default, by default.

  Returns:
    The study: `best_params`, `best_value`, `trials`.

  Raises:
    UsageError: for an empty space, a journal of another search, or without
      Optuna.
  """
  if num_trials < 1:
    raise UsageError(f'num_trials={num_trials}; give at least 1')
  if direction not in ('maximize', 'minimize'):
    raise UsageError(f'direction={direction!r}; give "maximize" or "minimize"')
  optuna = _optuna()
  _check_space(optuna, space)
  make = sampler or (lambda seed: optuna.samplers.TPESampler(seed=seed))
  study = _open(optuna, pathlib.Path(storage), direction)
  _require_same(optuna, study, space, seed)
  _retry_killed(optuna, study)
  while (finished := _finished(optuna, study)) < num_trials:
    # A sampler of its own for each trial: its draws do not depend on how many
    # were made in this process. Odd multiplier: no two seeds share a stream.
    study.sampler = make((seed * 1_000_003 + finished) % 2**32)
    trial = study.ask(dict(space))
    study.tell(trial, _value(objective, dict(trial.params), direction))
  return study


def _value(objective, settings, direction) -> float:
  try:
    value = float(objective(settings))
  except Diverged:
    value = math.nan
  # Optuna drops a NaN; the sampler should learn from it.
  worst = -math.inf if direction == 'maximize' else math.inf
  return value if math.isfinite(value) else worst


def _optuna() -> Any:
  try:
    import optuna
  except ImportError as error:
    raise UsageError(
      "optuna is not installed; pip install 'fmeta[search]'"
    ) from error
  return optuna


def _check_space(optuna, space) -> None:
  if not space:
    raise UsageError(
      'an empty search space; give at least one name with a distribution'
    )
  for name, of in space.items():
    if not isinstance(of, optuna.distributions.BaseDistribution):
      raise UsageError(
        f'{name!r} is {of!r}; give an optuna distribution, for example '
        'FloatDistribution(1e-5, 1e-1, log=True)'
      )


def _open(optuna, path: pathlib.Path, direction: str) -> Any:
  from optuna.storages.journal import JournalFileBackend

  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    backend = JournalFileBackend(str(path))
    return optuna.create_study(
      storage=optuna.storages.JournalStorage(backend),
      study_name='search',
      direction=direction,
      load_if_exists=True,
    )
  except (OSError, ValueError, KeyError) as error:
    raise UsageError(
      f'{str(path)!r} cannot be used as a journal '
      f'({str(error).splitlines()[0]}); name another file'
    ) from error


def _require_same(optuna, study, space, seed: int) -> None:
  to_json = optuna.distributions.distribution_to_json
  wanted = {name: json.loads(to_json(of)) for name, of in space.items()}
  wanted = {**wanted, 'seed of the search': seed}
  found = study.user_attrs.get(_SPACE)
  if found is None:
    study.set_user_attr(_SPACE, wanted)
  elif found != wanted:
    names = sorted({*found, *wanted})
    first = next(n for n in names if found.get(n) != wanted.get(n))
    raise UsageError(
      f'the journal is of a search with another {first!r}; give the space it '
      'was made with, or another storage'
    )


def _retry_killed(optuna, study) -> None:
  """A trial that never ended is tried again, with its settings, first."""
  state = optuna.trial.TrialState
  for trial in study.get_trials(states=[state.RUNNING]):
    study.tell(trial.number, state=state.FAIL)
    # The proposal is a function of the finished trials: it comes again.


def _finished(optuna, study) -> int:
  return len(study.get_trials(states=[optuna.trial.TrialState.COMPLETE]))
