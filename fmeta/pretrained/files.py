"""Reading weight files: safetensors, checked; pickles are refused."""

import hashlib
import json
import pathlib
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from fmeta.errors import UsageError

PICKLES = ('.bin', '.pt', '.pth', '.pkl', '.pickle', '.ckpt')


def refuse_pickle(path: pathlib.Path) -> None:
  """Raises `UsageError` if the file's suffix is one that pickles bear."""
  if path.suffix in PICKLES:
    raise UsageError(
      f'{path} is a pickle, and reading one runs whatever code it holds; '
      'only .safetensors is read: convert it where you trust it'
    )


def read_tensors(path: pathlib.Path | str) -> dict[str, np.ndarray]:
  """All tensors of a safetensors file.

  Raises:
    UsageError: for a pickle, a missing, truncated or malformed file.
  """
  path = pathlib.Path(path)
  refuse_pickle(path)
  if not path.is_file():
    raise UsageError(f'no weights at {path}; give a .safetensors file')
  try:
    with safe_open(path, 'np') as tensors:
      return {name: tensors.get_tensor(name) for name in tensors.keys()}
  except SafetensorError as error:
    raise UsageError(
      f'{path} ({path.stat().st_size:,} bytes) is truncated or not a '
      f'safetensors file ({error}); fetch it again'
    ) from error


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """A JSON object.

  Raises:
    UsageError: if the file is missing or holds something else.
  """
  if not path.is_file():
    raise UsageError(f'no {path.name} in {path.parent}; is it a model folder?')
  try:
    value = json.loads(path.read_text(encoding='utf-8'))
  except ValueError as error:
    raise UsageError(f'{path} is not JSON: {error}') from error
  if not isinstance(value, dict):
    raise UsageError(f'{path} holds a {type(value).__name__}, not an object')
  return value


def sha256(path: pathlib.Path | str) -> str:
  """Hex digest of a file's bytes."""
  with open(path, 'rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()


def check_sha256(path: pathlib.Path | str, expected: str) -> None:
  """Raises `UsageError` if the file is not the one that was recorded."""
  found = sha256(path)
  if found != expected:
    raise UsageError(
      f'{path} has sha256 {found}, expected {expected}; it is another version '
      'or damaged: fetch it again'
    )
