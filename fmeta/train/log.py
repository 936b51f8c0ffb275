"""What a run leaves to read: metrics.jsonl, TensorBoard events, a live line.

A line of `metrics.jsonl` is one step, or one evaluation (it then has the key
`evaluation`). Losses are also written as hex floats, so that two runs can be
compared bit by bit; no line holds a time, so equal runs leave equal files.
"""

import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, TextIO

from fmeta.errors import UsageError

Record = dict[str, Any]


def step_record(step: int, stage: str, metrics: Mapping[str, Any]) -> Record:
  """The record of one step: floats, and the loss in hex as well."""
  record: Record = {'step': step, 'stage': stage}
  record.update({name: float(value) for name, value in metrics.items()})
  if 'loss' in record:
    record['loss_hex'] = record['loss'].hex()
  return record


def _encode(record: Record) -> str:
  # JSON has no nan: null stands for any number that is not finite.
  def finite(value):
    if isinstance(value, Mapping):
      return {key: finite(x) for key, x in value.items()}
    bad = isinstance(value, float) and not math.isfinite(value)
    return None if bad else value

  return json.dumps(finite(record), allow_nan=False)


def read_metrics(path: pathlib.Path, last_step: int | None = None):
  """The complete records of a file, optionally only up to a step.

  A line that a killed process left unfinished is dropped.
  """
  records = []
  if not path.exists():
    return records
  for line in path.read_text().splitlines(keepends=True):
    if not line.endswith('\n'):
      break
    record = json.loads(line)
    if last_step is None or record['step'] <= last_step:
      records.append(_nan_for_null(record))
  return records


def _nan_for_null(value):
  if isinstance(value, dict):
    return {key: _nan_for_null(x) for key, x in value.items()}
  return math.nan if value is None else value


class Metrics:
  """The records of a run, in memory and (with a workdir) on disk.

  Opening truncates the file to the records up to `step`, so that a resumed
  run writes no line twice.

  Attributes:
    records: all of them, those of before a resume included.
  """

  def __init__(self, workdir: pathlib.Path | None, step: int, write: bool):
    self.records: list[Record] = []
    self._file: TextIO | None = None
    self._events: Any = None
    if workdir is None:
      return
    path = workdir / 'metrics.jsonl'
    self.records = read_metrics(path, step)
    if write:
      self._open(path, step)

  def _open(self, path: pathlib.Path, step: int) -> None:
    from tensorboardX import SummaryWriter

    new = path.with_suffix('.jsonl.new')
    new.write_text(''.join(_encode(r) + '\n' for r in self.records))
    os.replace(new, path)
    self._file = path.open('a')
    self._events = SummaryWriter(str(path.parent), purge_step=step + 1)

  def write(self, record: Record) -> None:
    """Adds a record; it has left this process when the call returns."""
    self.records.append(record)
    if self._file is not None:
      self._file.write(_encode(record) + '\n')
      self._file.flush()

  def scalars(self, step: int, values: Mapping[str, Any]) -> None:
    """Adds TensorBoard scalars."""
    if self._events is not None:
      for name, value in values.items():
        if isinstance(value, float):
          self._events.add_scalar(name, value, step)

  def sync(self) -> None:
    """Lines up to here survive a crash of the machine."""
    if self._file is not None:
      os.fsync(self._file.fileno())

  def close(self) -> None:
    """Closes the files."""
    if self._file is not None:
      self._file.close()
      self._events.close()


def refuse_used(workdir: pathlib.Path) -> None:
  """Refuses a folder in which another run has left something.

  Raises:
    UsageError: naming what was found.
  """
  for name in ('metrics.jsonl', 'checkpoints'):
    if (workdir / name).exists():
      raise UsageError(
        f'{str(workdir)!r} already holds {name!r} of a run; resume it, or give '
        'another workdir'
      )


def duration(seconds: float) -> str:
  """For example '1:02:03' or '2:03'."""
  minutes, seconds = divmod(int(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  if hours:
    return f'{hours}:{minutes:02d}:{seconds:02d}'
  return f'{minutes}:{seconds:02d}'


class Live:
  """One line that tells how far a run is.

  On a terminal it is rewritten in place twice a second; elsewhere a plain
  line appears every ten seconds.

  Args:
    first: step the run starts from.
    total: step it ends at.
    stream: stderr unless given.
    clock: seconds; replaced by tests.
    quiet: prints nothing.
  """

  def __init__(
    self,
    first: int,
    total: int,
    *,
    stream: TextIO | None = None,
    clock: Callable[[], float] = time.monotonic,
    quiet: bool = False,
  ):
    self._stream = sys.stderr if stream is None else stream
    self._tty = self._stream.isatty()
    self._first, self._total = first, total
    self._clock, self._quiet = clock, quiet
    self._began = self._shown = clock()
    self._width = 0

  def update(
    self, record: Mapping[str, Any], rate: float, *, last: bool = False
  ) -> None:
    """Shows a step's record and the examples per second, when it is time."""
    now = self._clock()
    interval = 0.5 if self._tty else 10.0
    if self._quiet or (now - self._shown < interval and not last):
      return
    self._shown = now
    text = self.text(record, rate, now - self._began)
    if self._tty:
      # Blanks cover what is left of a longer line.
      self._stream.write('\r' + text.ljust(self._width))
      self._width = len(text)
    else:
      self._stream.write(text + '\n')
    self._stream.flush()

  def close(self) -> None:
    """Leaves the line on a terminal."""
    if self._width:
      self._stream.write('\n')
      self._width = 0

  def text(self, record: Mapping[str, Any], rate: float, elapsed: float) -> str:
    """The line itself."""
    step = record['step']
    parts = [f'{record.get("stage", "")} step {step}/{self._total}'.strip()]
    parts += [
      f'{name} {record[name]:.4f}'
      for name in ('loss', 'accuracy')
      if name in record
    ]
    parts.append(f'{rate:.0f} examples/s')
    done = step - self._first
    if done > 0:
      left = elapsed / done * (self._total - step)
      parts.append(f'ETA {duration(left)}')
    return '  '.join(parts)
