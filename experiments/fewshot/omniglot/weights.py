"""What a run has trained, for another test of it: other queries, precision."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
from safetensors import safe_open
from safetensors.numpy import save_file

from fmeta.errors import UsageError
from fmeta.mesh import gather_to_host
from fmeta.pretrained.files import read_tensors
from fmeta.train import checkpoint

NAME = 'weights.safetensors'


def experiment_of(folder: pathlib.Path) -> str:
  """The experiment that a run's folder is of."""
  run = folder / 'run.json'
  return json.loads(run.read_text())['experiment'] if run.exists() else ''


def save(folder: pathlib.Path, params: Any, facts: Mapping[str, str]) -> None:
  """Writes `weights.safetensors` into a run's folder.

  Args:
    folder: of the run.
    params: trained.
    facts: what another test has to share, such as the data's fingerprint.
  """
  leaves = checkpoint.by_name(gather_to_host(params))
  if jax.process_index():
    return
  partial = folder / f'{NAME}.tmp'
  save_file(leaves, partial, {**facts, 'experiment': experiment_of(folder)})
  partial.replace(folder / NAME)


def load(
  given: str, like: Any, folder: pathlib.Path, facts: Mapping[str, str]
) -> Any:
  """Reads them into the structure of `like`.

  Args:
    given: the folder of the run that has trained them.
    like: parameters of the method.
    folder: of this run.
    facts: as `save` got them.

  Raises:
    UsageError: without such a file, or if it is of another experiment, data
      set, split or norm, or a leaf of another shape (number of ways).
  """
  path = pathlib.Path(given) / NAME
  if not path.is_file():
    raise UsageError(
      f'config.weights is {given!r}, where there is no {NAME}; give the folder '
      'of an Omniglot run that has trained to its end'
    )
  found = read_tensors(path)
  with safe_open(path, 'np') as file:
    saved = file.metadata() or {}
  wanted = {**facts, 'experiment': experiment_of(folder)}
  for key, value in wanted.items():
    if saved.get(key) != value:
      raise UsageError(
        f'{path} was trained with {key} {saved.get(key)!r}, this run has '
        f'{value!r}; use the settings it was made with'
      )
  checkpoint.require_same(found, checkpoint.by_name(like), path)
  return checkpoint.like(like, found)
