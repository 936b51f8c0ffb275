"""A run's folder: claimed once, described by what it holds.

`config.json` and `experiment.py` say what was asked, `run.json` in which
words; `result.json` (`fmeta.result`) is what came of it. Everything else in
the folder belongs to `fit` and the experiment.
"""

import dataclasses
import json
import math
import os
import pathlib
import shutil
import sys
from collections.abc import Mapping
from typing import Any

from fmeta.errors import UsageError

CONFIG, EXPERIMENT, RUN = 'config.json', 'experiment.py', 'run.json'


@dataclasses.dataclass(frozen=True)
class Context:
  """What an experiment's `run(config, context)` is told beside its config.

  Attributes:
    workdir: the run's own folder; it exists.
    data_dir: a local copy of the data, or None for the builders' default.
    mesh: as typed, for example `data:2`, or None for one device.
    resume: continue from the newest checkpoint in `workdir`.
  """

  workdir: pathlib.Path
  data_dir: str | None = None
  mesh: str | None = None
  resume: bool = False


def next_free(root: pathlib.Path) -> pathlib.Path:
  """Makes `root/<nnn>` with the first number above all that are there.

  Two processes that ask at once get two folders: `mkdir` decides.

  Raises:
    UsageError: if `root` cannot be written.
  """
  try:
    root.mkdir(parents=True, exist_ok=True)
    number = 1 + max(
      (int(path.name) for path in root.iterdir() if path.name.isdigit()),
      default=0,
    )
    while True:
      path = root / f'{number:03d}'
      try:
        path.mkdir()
        return path
      except FileExistsError:
        number += 1
  except OSError as error:
    raise _unwritable(root, error) from error


def claim(path: pathlib.Path) -> pathlib.Path:
  """Takes a folder that was named by the user; it must be new or empty.

  Raises:
    UsageError: if it holds anything, is a file, or cannot be written.
  """
  try:
    path.mkdir(parents=True, exist_ok=True)
    if any(path.iterdir()):
      raise UsageError(
        f'the workdir {str(path)!r} is not empty; continue it with --resume '
        f'or name another one'
      )
  except OSError as error:
    raise _unwritable(path, error) from error
  _check_writable(path)
  return path


def reopen(path: pathlib.Path) -> dict[str, Any]:
  """Returns the stored config of a run to resume.

  Raises:
    UsageError: if there is no such run, or it cannot be written.
  """
  if not path.is_dir():
    raise UsageError(
      f'there is no workdir {str(path)!r} to resume; start it without --resume'
    )
  stored = read_json(path / CONFIG)
  _check_writable(path)
  return stored


def read_json(path: pathlib.Path) -> Any:
  """Reads a file of the workdir; `UsageError` if it is absent or broken."""
  try:
    return json.loads(path.read_text())
  except OSError as error:
    raise UsageError(
      f'{str(path)!r} cannot be read ({error.strerror}); is '
      f'{str(path.parent)!r} the workdir of a run?'
    ) from error
  except ValueError as error:
    raise UsageError(f'{str(path)!r} is not JSON: {error}') from error


def _check_writable(path: pathlib.Path) -> None:
  if not os.access(path, os.W_OK | os.X_OK):
    raise _unwritable(path, PermissionError(13, 'Permission denied'))


def _unwritable(path: pathlib.Path, error: OSError) -> UsageError:
  return UsageError(
    f'the workdir {str(path)!r} cannot be written ({error.strerror}); name '
    f'another one with --workdir=DIR'
  )


def describe(
  workdir: pathlib.Path,
  config: Mapping[str, Any],
  experiment: str,
  source: pathlib.Path,
) -> None:
  """Writes what was asked: the config, the experiment file, the command.

  Args:
    workdir: a folder that `claim` or `next_free` returned.
    config: plain values, as `config.to_json` gives them.
    experiment: the run's name, `finetune/docparams`.
    source: the experiment file, copied as it is.
  """
  try:
    write_json(
      workdir / RUN, {'experiment': experiment, 'command': sys.argv[1:]}
    )
    shutil.copyfile(source, workdir / EXPERIMENT)
    write_json(workdir / CONFIG, config)
  except OSError as error:
    raise _unwritable(workdir, error) from error


def discard(workdir: pathlib.Path) -> None:
  """Takes back a folder in which nothing but `describe` has written.

  A run that ends before its first step, for a pattern that names nothing,
  should not force a new workdir on the corrected command.
  """
  described = {CONFIG, EXPERIMENT, RUN}
  if {path.name for path in workdir.iterdir()} <= described:
    shutil.rmtree(workdir)


def write_json(path: pathlib.Path, value: Any) -> None:
  """Writes all of it or nothing; a number that is not finite becomes null."""
  partial = path.with_name(path.name + '.partial')
  partial.write_text(
    json.dumps(_plain(value), indent=2, allow_nan=False) + '\n'
  )
  os.replace(partial, path)


def _plain(value: Any) -> Any:
  """Builtins only: arrays and numpy scalars as numbers or lists of them."""
  if isinstance(value, Mapping):
    return {str(key): _plain(inner) for key, inner in value.items()}
  if hasattr(value, 'tolist'):
    value = value.tolist()
  if isinstance(value, list | tuple):
    return [_plain(inner) for inner in value]
  if isinstance(value, float) and not math.isfinite(value):
    return None
  return value
