"""Finished streams as they lie in the folders of runs.

An experiment keeps one JSON per method and seed,
`trials/<method>/seed_<k>.json`, with the rows of its accuracy matrix under
`matrix`; a method trained on all tasks at once has a single row. Read where
they are there: `tasks` (names), `evaluations` (of `Fitted`), `seconds`,
`steps`, `flops_per_step`, `memory_bytes`, `penalty_bytes` and `cost` (the
fields of `metrics.Cost`, which win where they are not null).
"""

import dataclasses
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from fmeta import metrics
from fmeta.errors import UsageError
from fmeta.metrics import Cost, Curves
from fmeta.workdir import read_json


class Method(NamedTuple):
  """A row of a comparison; everything by seed.

  Attributes:
    finals: mean accuracy over all tasks at the end.
    matrices: [T, T]; empty for a method that sees all tasks at once.
    curves: where tasks were evaluated often.
    cost: mean over seeds.
  """

  finals: dict[int, float]
  matrices: dict[int, np.ndarray]
  curves: dict[int, Curves]
  cost: Cost


def read_runs(
  folders: Sequence[str | pathlib.Path],
) -> tuple[dict[str, Method], list[str]]:
  """The methods of all runs, and the names of the tasks.

  A method's name is the folder of its trials, without what all of them share;
  where two runs have a method of one name, the run stands before it.

  Raises:
    UsageError: a folder without such trials, or streams of different lengths.
  """
  found = {}
  for folder in map(pathlib.Path, folders):
    for name, trials in _trials(folder).items():
      found[folder, name] = trials
  names = _names(list(found))
  sizes = {
    names[key]: len(trial['matrix'][-1])
    for key, trials in found.items()
    for trial in trials.values()
  }
  if len(set(sizes.values())) > 1:
    raise UsageError(
      f'streams of different lengths cannot be compared: tasks by method'
      f' {sizes}; give runs of one stream'
    )
  count = next(iter(sizes.values()))
  tasks = _task_names(found.values(), count)
  methods = {
    names[key]: _method(trials, tasks) for key, trials in found.items()
  }
  return methods, tasks


def _trials(folder: pathlib.Path) -> dict[str, dict[int, dict[str, Any]]]:
  """Method -> seed -> what its trial stored."""
  if not folder.is_dir():
    raise UsageError(f'no run at {str(folder)!r}; give the workdir of a run')
  out: dict[str, dict[int, dict[str, Any]]] = {}
  for path in sorted((folder / 'trials').rglob('seed_*.json')):
    seed = path.stem.removeprefix('seed_')
    trial = read_json(path)
    if seed.isdigit() and isinstance(trial, dict) and trial.get('matrix'):
      name = path.parent.relative_to(folder / 'trials').as_posix()
      out.setdefault(name, {})[int(seed)] = trial
  if not out:
    raise UsageError(
      f'{str(folder)!r} has no trials/<method>/seed_<k>.json with a matrix;'
      ' give the workdir of a run over a stream of tasks'
    )
  return {name: dict(sorted(trials.items())) for name, trials in out.items()}


def _names(keys: Sequence[tuple[pathlib.Path, str]]) -> dict[tuple, str]:
  """What to call each (run, folder of trials)."""
  folders = _without_shared([folder.absolute().parts for folder, _ in keys])
  methods = _without_shared([tuple(name.split('/')) for _, name in keys])
  plain = ['/'.join(parts) for parts in methods]
  return {
    key: name if plain.count(name) == 1 else f'{"/".join(run)}: {name}'
    for key, name, run in zip(keys, plain, folders, strict=True)
  }


def _without_shared(parts: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
  """Without the leading parts that all of them share; the last one stays."""
  shared = len(os.path.commonprefix([list(part[:-1]) for part in parts]))
  return [part[shared:] for part in parts]


def _task_names(found, count: int) -> list[str]:
  for trials in found:
    for trial in trials.values():
      names = trial.get('tasks')
      if isinstance(names, list) and len(names) == count:
        return [str(name) for name in names]
  return [str(k + 1) for k in range(count)]


def _method(trials: Mapping[int, Mapping], tasks: Sequence[str]) -> Method:
  matrices, curves = {}, {}
  for seed, trial in trials.items():
    # A single row of all tasks: learned at once, not one after the other.
    if len(trial['matrix']) > 1 or len(tasks) == 1:
      matrices[seed] = metrics.accuracy_matrix(trial['matrix'])
      if len(trial.get('evaluations') or ()) > len(tasks):
        curves[seed] = metrics.task_curves(trial['evaluations'], tasks)
  finals = {k: float(np.mean(t['matrix'][-1])) for k, t in trials.items()}
  cost = metrics.mean_cost([_cost(trial) for trial in trials.values()])
  return Method(finals, matrices, curves, cost)


def _cost(trial: Mapping[str, Any]) -> Cost:
  flops = trial.get('flops_per_step')
  if flops is not None and trial.get('steps') is not None:
    flops = flops * trial['steps']
  else:
    flops = None
  held = [trial.get('memory_bytes'), trial.get('penalty_bytes')]
  known = [size for size in held if size is not None]
  measured = {
    'flops': flops,
    'seconds': trial.get('seconds'),
    'memory_bytes': sum(known) if known else None,
  }
  known_fields = {field.name for field in dataclasses.fields(Cost)}
  given = {k: v for k, v in trial.get('cost', {}).items() if v is not None}
  if set(given) - known_fields:
    raise UsageError(
      f'unknown cost {sorted(set(given) - known_fields)}; possible:'
      f' {sorted(known_fields)}'
    )
  return Cost(**{**measured, **given})
