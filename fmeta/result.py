"""What came of a run: `result.json`."""

import importlib.metadata
import os
import pathlib
import platform
import resource
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import jax

from fmeta import scores
from fmeta.workdir import write_json

RESULT = 'result.json'

_REPORTED = (
  'absl-py array_record chex fmeta flax grain jax jaxlib ml_collections numpy '
  'optax orbax-checkpoint safetensors scikit-learn scipy tensorflow-datasets '
  'tokenizers'
).split()

# What an experiment's `run` returns; all but the first may be absent.
OUTCOME = (
  'metrics',
  'ci95',
  'steps',
  'examples_per_second',
  'flops_per_step',
  'peak_bytes',
  'trainable_parameters',
  'total_parameters',
  'data_sha256',
  'scores',
)


def write(
  workdir: pathlib.Path,
  experiment: str,
  outcome: Mapping[str, Any],
  wall_seconds: float,
) -> dict[str, Any]:
  """Writes `result.json` and returns what it holds.

  Args:
    workdir: the run's folder.
    experiment: the run's name, `finetune/docparams`.
    outcome: what the experiment returned: `metrics` (name -> number) and any
      other of `OUTCOME`; what is absent is null, except `peak_bytes`, which
      is then measured. `scores` (name -> `Scores`) go to `scores.npz`.
    wall_seconds: of this process, set-up and compilation included.

  Raises:
    ValueError: for a key that is not in `OUTCOME`, or without `metrics`.
  """
  unknown = set(outcome) - set(OUTCOME)
  if unknown or 'metrics' not in outcome:
    raise ValueError(
      f'run() returned {sorted(outcome)}; possible: {list(OUTCOME)}, of which '
      f'metrics must be there'
    )
  result = {
    'experiment': experiment,
    'metrics': outcome['metrics'],
    'ci95': outcome.get('ci95', {}),
    'steps': outcome.get('steps'),
    'examples_per_second': outcome.get('examples_per_second'),
    'wall_seconds': round(wall_seconds, 3),
    'flops_per_step': outcome.get('flops_per_step'),
    'peak_bytes': outcome.get('peak_bytes') or peak_bytes(),
    'trainable_parameters': outcome.get('trainable_parameters'),
    'total_parameters': outcome.get('total_parameters'),
    'devices': devices(),
    'data_sha256': outcome.get('data_sha256'),
    'versions': versions(),
    'commit': commit(),
  }
  if outcome.get('scores'):
    scores.save(workdir, outcome['scores'])
  write_json(workdir / RESULT, result)
  return result


def peak_bytes() -> int:
  """The accelerator's peak, or on CPU the process's largest resident size."""
  stats = jax.local_devices()[0].memory_stats() or {}
  if 'peak_bytes_in_use' in stats:
    return stats['peak_bytes_in_use']
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  return peak if sys.platform == 'darwin' else peak * 1024  # Linux: KiB.


def devices() -> dict[str, Any]:
  """What the run had: platform, kind, how many, in how many processes."""
  first = jax.devices()[0]
  return {
    'platform': first.platform,
    'kind': first.device_kind,
    'count': jax.device_count(),
    'processes': jax.process_count(),
    'host_cores': os.cpu_count(),
  }


def versions() -> dict[str, str]:
  """Of Python and of the packages that numbers depend on."""
  found = {'python': platform.python_version()}
  for name in _REPORTED:
    try:
      found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      continue
  return found


def commit() -> str | None:
  """The checkout's commit, `-dirty` if files differ; None without one."""
  root = pathlib.Path(__file__).resolve().parents[1]
  # Of an installed copy, an enclosing repository would be somebody else's.
  if not (root / '.git').exists():
    return None
  try:
    head = _git(root, 'rev-parse', 'HEAD')
    changed = _git(root, 'status', '--porcelain', '--untracked-files=no')
  except (OSError, subprocess.CalledProcessError):  # No git, or no commit.
    return None
  return head + ('-dirty' if changed else '')


def _git(root: pathlib.Path, *args: str) -> str:
  command = ['git', '-C', str(root), *args]
  done = subprocess.run(command, capture_output=True, text=True, check=True)
  return done.stdout.strip()
