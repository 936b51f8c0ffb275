"""Interleaved timings of two programs, each in a process of its own.

A machine's speed drifts and its neighbours come and go, so only ratios of
runs that lie beside each other are reported: A, B, B, A, ... with a bootstrap
interval over the pairs. A contender waits on a pipe while the other runs, so
neither holds a core nor shares an allocator.
"""

import multiprocessing
import pathlib
import re
import resource
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import numpy as np

from fmeta.errors import UsageError

# Called in the child with its arguments; gives `run(steps)`, which blocks
# until the steps are done.
Make = Callable[..., Callable[[int], None]]


class Ratio(NamedTuple):
  """How many times faster the first of two is.

  Attributes:
    median: of the pairs' ratios.
    low: of the 95% percentile bootstrap of the median.
    high: likewise.
    seconds: median seconds per step of the first and of the second.
    pairs: how many.
  """

  median: float
  low: float
  high: float
  seconds: tuple[float, float]
  pairs: int


def peak_bytes() -> int:
  """The most memory this process has held resident, its high-water mark.

  On Linux that of this address space: `ru_maxrss` is also what the parent held
  when it forked.
  """
  status = pathlib.Path('/proc/self/status')
  text = status.read_text() if status.exists() else ''
  if found := re.search(r'VmHWM:\s+(\d+) kB', text):
    return int(found[1]) * 1024
  most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  return most if sys.platform == 'darwin' else most * 1024


def _serve(pipe: Connection, make: Make, arguments: dict[str, Any]) -> None:
  try:
    run = make(**arguments)
    pipe.send(None)
  except Exception as error:  # Told to the parent, which raises it.
    pipe.send(repr(error))
    raise
  while (steps := pipe.recv()) is not None:
    began = time.perf_counter()
    run(steps)
    pipe.send(((time.perf_counter() - began) / steps, peak_bytes()))


class Contender:
  """A program in a process of its own, warmed up and waiting.

  Args:
    name: for errors.
    make: a module-level function, see `Make`.
    **arguments: for it; pickled.

  Attributes:
    first_seconds: of its first step, which compiles; None before it.
    peak_bytes: high-water mark of its memory after its latest steps.

  Raises:
    UsageError: if it could not be made.
  """

  def __init__(self, name: str, make: Make, **arguments: Any):
    context = multiprocessing.get_context('spawn')
    self.name = name
    self.first_seconds: float | None = None
    self.peak_bytes = 0
    self._pipe, child = context.Pipe()
    self._process = context.Process(
      target=_serve, args=(child, make, arguments), daemon=True
    )
    self._process.start()
    child.close()
    failed = self._receive()
    if failed:
      raise UsageError(f'{name} could not start: {failed}')

  def _receive(self) -> Any:
    try:
      return self._pipe.recv()
    except EOFError as error:
      self._process.join()
      raise UsageError(
        f'{self.name} died with exit status {self._process.exitcode}'
      ) from error

  def seconds(self, steps: int) -> float:
    """Seconds per step of so many steps."""
    self._pipe.send(steps)
    seconds, self.peak_bytes = self._receive()
    if self.first_seconds is None:
      self.first_seconds = seconds * steps
    return seconds

  def close(self) -> None:
    """Lets the process end."""
    self._pipe.send(None)
    self._process.join()


def interleaved(
  contenders: Sequence[Contender], pairs: int, steps: int
) -> np.ndarray:
  """Seconds per step [pairs, contenders], the order reversed in between.

  Args:
    contenders: any number; each waits while the others run.
    pairs: at least 2; ten or more give an interval worth reading.
    steps: of each timing.
  """
  if pairs < 2:
    raise UsageError(f'pairs={pairs}; an interval needs at least 2')
  for contender in contenders:  # Compiles; warms caches.
    contender.seconds(1)
    contender.seconds(steps)
  times = np.zeros((pairs, len(contenders)))
  for pair in range(pairs):
    order = range(len(contenders))
    for which in order if pair % 2 == 0 else reversed(order):
      times[pair, which] = contenders[which].seconds(steps)
  return times


def compare(
  first: Contender, second: Contender, pairs: int, steps: int
) -> Ratio:
  """Runs both in turn: `first` is the one that is hoped to be faster."""
  return ratio_of(interleaved((first, second), pairs, steps))


def ratio_of(times: np.ndarray, resamples: int = 10_000) -> Ratio:
  """The ratio second / first of paired seconds [pairs, 2]."""
  ratios = times[:, 1] / times[:, 0]
  random = np.random.default_rng(0)
  drawn = random.integers(0, len(ratios), (resamples, len(ratios)))
  low, high = np.percentile(np.median(ratios[drawn], axis=1), (2.5, 97.5))
  seconds = np.median(times, axis=0)
  return Ratio(
    float(np.median(ratios)),
    float(low),
    float(high),
    (float(seconds[0]), float(seconds[1])),
    len(ratios),
  )
