"""What makes a run resumable: its identity, and a save on SIGTERM."""

import pathlib
import signal
import threading
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np

from fmeta.errors import UsageError
from fmeta.train.checkpoint import Checkpoints, digests, fingerprint
from fmeta.types import Array, Params, TrainState


class Saver:
  """Saves and restores one run and refuses another's checkpoint.

  Args:
    folder: of the checkpoints.
    keep: how many are kept.
    rng: root key; kept out of the state and compared on a resume.
    stages: likewise, by name and length.
    frozen: the frozen leaves of the first phase, see `hold`.
  """

  def __init__(
    self,
    folder: pathlib.Path,
    keep: int,
    rng: Array,
    stages: Sequence[Any],
    frozen: Params,
  ):
    self._checkpoints = Checkpoints(folder, keep)
    self._saved: int | None = None
    self._identity = {
      'key': np.asarray(jax.random.key_data(rng)).tolist(),
      'stages': [[stage.name, stage.num_steps] for stage in stages],
    }
    self.hold(frozen)

  def hold(self, frozen: Params) -> None:
    """Takes the frozen leaves of a phase; each distinct one is written once."""
    self._frozen, self._digests = frozen, digests(frozen)

  def progress(self) -> dict | None:
    """Where the last checkpoint is, None if there is none.

    Raises:
      UsageError: if it is of another run.
    """
    step = self._checkpoints.latest()
    if step is None:
      return None
    host = self._checkpoints.host(step)
    where = self.path(step)
    for name, what in (('key', 'random key'), ('stages', 'stages')):
      if host[name] != self._identity[name]:
        raise UsageError(
          f'checkpoint {where} was made with {what} {host[name]}, now it is '
          f'{self._identity[name]}; resume with the same settings'
        )
    self._saved = step
    return host['progress']

  def restore(
    self, state: TrainState, best: Any, fixed: Set[str]
  ) -> tuple[TrainState, Any]:
    """The last checkpoint as (state, best leaves or None).

    Args:
      state: shaped like it, with the caller's values of frozen leaves.
      best: shaped like its best leaves.
      fixed: frozen leaves that no phase has changed so far: the caller's
        values must be the checkpoint's. The others are loaded.

    Raises:
      UsageError: if it is of another model or tuning.
    """
    assert self._saved is not None
    saved = self._checkpoints.host(self._saved)['frozen']
    moving = state.replace(frozen={})
    loaded, kept = self._checkpoints.restore(self._saved, moving, best)
    frozen = self._checkpoints.load_frozen(saved, state.frozen, fixed)
    self.hold(frozen)
    self._checkpoints.require_frozen(saved, self._digests)
    return loaded.replace(frozen=frozen), kept

  def save(self, step: int, state: TrainState, best: Any, progress: dict):
    """Starts a save; the arrays may be donated when it returns."""
    self._checkpoints.save_frozen(self._frozen, self._digests)
    host = {
      **self._identity,
      'frozen': fingerprint(self._digests),
      'progress': progress,
    }
    self._checkpoints.save(step, state, host, best)
    self._saved = step

  def last_saved(self) -> int | None:
    """The last step saved or restored."""
    return self._saved

  def path(self, step: int) -> pathlib.Path:
    """Where a step's checkpoint is."""
    return self._checkpoints.path(step)

  def close(self) -> None:
    """Waits for the last save to be committed."""
    self._checkpoints.close()


@contextmanager
def on_sigterm(act: Callable[[], None]) -> Iterator[None]:
  """Calls `act` on SIGTERM; the previous handler is put back at the end.

  Only the main thread may handle signals; in any other nothing happens.
  """
  if threading.current_thread() is not threading.main_thread():
    yield
    return
  previous = signal.signal(signal.SIGTERM, lambda *_: act())
  try:
    yield
  finally:
    signal.signal(signal.SIGTERM, previous)
