"""What a search has finished, kept in a folder so that a kill costs little.

An entry is `<name>.json`, written whole or not at all after what it needs
(`<name>.safetensors`). A process killed on the way leaves earlier entries as
they are and its own one absent, so the search runs that one again and no
other.
"""

import json
import os
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from safetensors.numpy import load_file, save_file

from fmeta.errors import UsageError
from fmeta.train.checkpoint import by_name, like, require_same


class Ledger:
  """Finished entries of one search, by name.

  Args:
    folder: made if needed; with several processes, one that all of them see.

  Raises:
    UsageError: if it cannot be written.
  """

  def __init__(self, folder: str | os.PathLike):
    self.folder = pathlib.Path(folder)
    try:
      self.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
      raise UsageError(
        f'cannot make the ledger {str(folder)!r}: {error.strerror}; give a '
        'folder that can be written'
      ) from error

  def under(self, name: str) -> 'Ledger':
    """A ledger in a folder of this one."""
    return Ledger(self.folder / name)

  def once(self, name: str, run: Callable[[], Any]) -> Any:
    """The entry's result; `run()` makes it if there is none yet.

    Args:
      name: of the entry, for example 'trial_3'.
      run: gives something JSON can hold (infinite bounds included, as Python
        writes them). What comes back is what JSON made of it, now and after a
        resume.

    Raises:
      UsageError: if the entry is there and cannot be read.
    """
    found = self._read(name)
    if found is None:
      self._write(name, run())
      found = self._read(name)
    return found['result']

  def once_with_arrays(
    self, name: str, run: Callable[[], tuple[Any, Any]], target: Any
  ) -> tuple[Any, Any]:
    """As `once`, for `run() -> (result, arrays)`.

    Args:
      name: of the entry.
      run: gives a result and a pytree of arrays; they come back bit by bit.
      target: a pytree with the shapes and dtypes of those arrays.

    Raises:
      UsageError: if the entry is of other arrays, or cannot be read.
    """
    path = self.folder / f'{name}.safetensors'
    found = self._read(name)
    if found is not None:
      named = load_file(path)
      require_same(named, by_name(target), path)
      arrays = jax.tree.map(jax.numpy.asarray, like(target, named))
      return found['result'], arrays
    result, arrays = run()
    named = {k: np.asarray(v) for k, v in by_name(arrays).items()}
    self._replace(path, lambda partial: save_file(named, partial))
    # Last: the entry exists from here on.
    self._write(name, result)
    return self._read(name)['result'], arrays

  def require(self, name: str, settings: Any) -> None:
    """Writes what a search was asked, and holds a resumed one to it.

    Raises:
      UsageError: if this ledger is of another search.
    """
    wanted = json.loads(json.dumps(settings))
    found = self.once(name, lambda: wanted)
    if found != wanted:
      differs = [k for k in wanted if found.get(k) != wanted[k]]
      raise UsageError(
        f'the ledger {str(self.folder)!r} is of a search with another '
        f'{(differs or sorted(found))[0]!r}; give the settings it was made '
        'with, or another folder'
      )

  def _read(self, name: str) -> Any:
    path = self.folder / f'{name}.json'
    try:
      return json.loads(path.read_text())
    except FileNotFoundError:
      return None
    except (OSError, ValueError) as error:
      raise UsageError(
        f'entry {str(path)!r} of the ledger cannot be read; delete it to run '
        'it again'
      ) from error

  def _write(self, name: str, result: Any) -> None:
    text = json.dumps({'result': result})
    self._replace(
      self.folder / f'{name}.json', lambda partial: partial.write_text(text)
    )

  def _replace(
    self, path: pathlib.Path, write: Callable[[pathlib.Path], Any]
  ) -> None:
    if jax.process_index() == 0:
      partial = path.with_name(path.name + '.partial')
      write(partial)
      os.replace(partial, path)
