"""What a run has trained, for another test of it: other queries, precision."""

import pathlib
from typing import Any

from safetensors.numpy import save_file

from fmeta.mesh import gather_to_host
from fmeta.pretrained.files import read_tensors
from fmeta.train import checkpoint

NAME = 'weights.safetensors'


def save(folder: pathlib.Path, params: Any) -> None:
  """Writes `weights.safetensors` into a run's folder."""
  save_file(checkpoint.by_name(gather_to_host(params)), folder / NAME)


def load(folder: str, like: Any) -> Any:
  """Reads it into the structure of `like`.

  Raises:
    UsageError: without such a file, or if a leaf is missing, superfluous or of
      another shape: another method, or another number of ways.
  """
  path = pathlib.Path(folder) / NAME
  found = read_tensors(path)
  checkpoint.require_same(found, checkpoint.by_name(like), path)
  return checkpoint.like(like, found)
