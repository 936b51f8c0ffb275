"""What experiments share: seeds, finished trials, how `fit` is placed."""

import json
import math
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax

from fmeta import gradients, sharding
from fmeta.config import Seeds
from fmeta.errors import UsageError
from fmeta.types import ValueAndGrad
from fmeta.workdir import Context

__all__ = [
  'Seeds',
  'best_setting',
  'data_devices',
  'fit_options',
  'in_turn',
  'placement',
  'require',
  'trial',
]


def placement(context: Context) -> dict[str, Any]:
  """The keyword arguments of `fit` for the mesh that was asked for."""
  if not context.mesh:
    return {}
  return {'mesh': sharding.make_mesh(sharding.parse_mesh(context.mesh))}


def fit_options(context: Context) -> dict[str, Any]:
  """Placement, workdir and resume for an experiment with one `fit`."""
  return {
    'workdir': context.workdir / 'fit',
    'resume': context.resume,
    **placement(context),
  }


def data_devices(context: Context) -> int:
  """How many devices of the mesh share the rows of a batch."""
  axes = sharding.parse_mesh(context.mesh) if context.mesh else {}
  return axes.get('data', 1)


def require(
  config: Any, least: Mapping[str, int], positive: Iterable[str] = ()
) -> None:
  """Refuses numbers that mean nothing, before anything is loaded.

  Args:
    config: an experiment's; fields that it has not are passed over.
    least: field -> the smallest value that it, or an item of it, may have.
    positive: fields that must be above 0 and finite, such as rates.

  Raises:
    UsageError: naming the first that is not.
  """
  rules = [(name, f'at least {low}', low, False) for name, low in least.items()]
  rules += [(name, 'a number above 0', 0, True) for name in positive]
  for name, words, low, strict in rules:
    given = getattr(config, name, ())
    for value in given if isinstance(given, tuple) else (given,):
      if value < low or (strict and not low < value < math.inf):
        raise UsageError(f'config.{name} is {given}; give {words}')


def in_turn(tasks: int, chunk: int, devices: int) -> ValueAndGrad:
  """The gradient of a meta-batch, `chunk` tasks at a time on each device.

  Args:
    tasks: of a meta-batch.
    chunk: 0: all at once.
    devices: that share the tasks.

  Raises:
    UsageError: if the tasks do not divide so.
  """
  if chunk < 0:
    raise UsageError(f'chunks of {chunk} tasks; give 0 (all at once) or more')
  if tasks % (max(chunk, 1) * devices):
    parts = f' in chunks of {chunk}' if chunk else ''
    raise UsageError(
      f'{tasks} tasks do not divide over {devices} device(s){parts}; give a '
      f'multiple of {max(chunk, 1) * devices} tasks, or choose another '
      '--config.chunk or --mesh'
    )
  if not chunk:
    return gradients.plain
  return gradients.accumulate(tasks // chunk, lanes=devices)


def trial(
  context: Context, name: str, run: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
  """Runs a trial once per workdir: a resumed job repeats no finished one.

  Args:
    context: of the job.
    name: unique in the job; slashes make folders.
    run: gives JSON-ready results; `seconds` is added.
  """
  path = context.workdir / 'trials' / f'{name}.json'
  if path.exists():
    return json.loads(path.read_text())
  began = time.perf_counter()
  result = run()
  result['seconds'] = time.perf_counter() - began
  path.parent.mkdir(parents=True, exist_ok=True)
  partial = path.with_suffix('.tmp')
  if jax.process_index() == 0:
    partial.write_text(json.dumps(result))
    partial.replace(path)
  return result


def best_setting(tried: dict[str, float]) -> str:
  """The setting with the highest validation value; the first of a tie."""
  return max(tried, key=lambda name: tried[name])
