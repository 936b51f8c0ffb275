"""What experiments share: seeds, finished trials, how `fit` is placed."""

import json
import time
from collections.abc import Callable
from typing import Any

import jax

from fmeta import sharding
from fmeta.config import Seeds
from fmeta.workdir import Context

__all__ = ['Seeds', 'best_setting', 'fit_options', 'placement', 'trial']


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
