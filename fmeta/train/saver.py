"""What makes a run resumable: its identity, and a save on SIGTERM."""

import pathlib
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
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
    frozen: the frozen leaves, written once per distinct content.
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
    self._frozen, self._digests = frozen, digests(frozen)
    self._saved: int | None = None
    self._identity = {
      'key': np.asarray(jax.random.key_data(rng)).tolist(),
      'stages': [[stage.name, stage.num_steps] for stage in stages],
      'frozen': fingerprint(self._digests),
    }

  def restore(
    self, state: TrainState, best: Any
  ) -> tuple[TrainState, Any, dict] | None:
    """The last checkpoint as (state, best leaves or None, progress).

    Raises:
      UsageError: if it is of another run, model or tuning.
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
    loaded, kept = self._checkpoints.restore(step, state, best)
    self._checkpoints.require_frozen(host['frozen'], self._digests)
    self._saved = step
    return loaded, kept, host['progress']

  def save(self, step: int, state: TrainState, best: Any, progress: dict):
    """Starts a save; the arrays may be donated when it returns."""
    self._checkpoints.save_frozen(self._frozen, self._digests)
    host = {**self._identity, 'progress': progress}
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
