"""Batches as pure functions of (seed, index).

A batch is drawn for all processes at once and each of them reads its rows,
so 1, 2 and 8 processes see the same data and resuming takes two
integers.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from fmeta.data.columns import Columns, check_columns, numeric, take
from fmeta.draw import EPOCH, permutation
from fmeta.errors import UsageError

Collate = Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Batches:
  """`batches(i)` is the i-th global batch, a dict of numpy arrays.

  Attributes:
    columns: the numeric columns that rows are taken from.
    batch_size: rows of a global batch.
    seed: with the index, all that a batch depends on.
    steps_per_epoch: batches after which every example kept in the epoch has
      been seen.
    rows: `i -> int [batch_size]`, the row numbers of batch i.
    collate: applied to the taken rows, for example padding to a bucket.
  """

  columns: Columns
  batch_size: int
  seed: int
  steps_per_epoch: int
  rows: Callable[[int], np.ndarray]
  collate: Collate | None = None

  def __call__(self, i: int) -> dict[str, np.ndarray]:
    """The i-th global batch."""
    batch = take(self.columns, self.rows(i))
    return self.collate(batch) if self.collate else batch


def batches(
  columns: Columns,
  batch_size: int,
  seed: int,
  *,
  collate: Collate | None = None,
) -> Batches:
  """Shuffled anew each epoch; every batch is full and may straddle epochs.

  String columns stay behind (`numeric`). `steps_per_epoch` is rounded up.

  Args:
    columns: N examples.
    batch_size: rows of the global batch, at most N.
    seed: names the order.
    collate: applied to each batch.

  Raises:
    UsageError: if the columns are empty or unequal, or too few for a batch.
  """
  size = check_batch_size(columns, batch_size)
  # Two epochs: a batch that straddles their border reads both.
  order = functools.lru_cache(maxsize=2)(
    lambda epoch: permutation(seed, EPOCH, epoch, size)
  )

  def rows(i):
    epoch, start = divmod(i * batch_size, size)
    first = order(epoch)[start : start + batch_size]
    missing = batch_size - len(first)
    if not missing:
      return first
    return np.concatenate([first, order(epoch + 1)[:missing]])

  steps = math.ceil(size / batch_size)
  return Batches(numeric(columns), batch_size, seed, steps, rows, collate)


def check_batch_size(columns: Columns, batch_size: int) -> int:
  """N, the number of examples, if a batch of that size fits into it.

  Raises:
    UsageError: if it does not.
  """
  size = check_columns(columns)
  if not 1 <= batch_size <= size:
    raise UsageError(
      f'batch_size {batch_size} does not fit {size} examples; give 1..{size}'
    )
  return size


def eval_batches(
  columns: Columns, batch_size: int, *, collate: Collate | None = None
) -> list[dict[str, np.ndarray]]:
  """All examples in order; `weight` float32 [B] is 0 on padding rows.

  The last batch is padded by repeating the last row (real values, so that no
  model meets an all-masked text); a given `weight` column is kept on the rest.

  Raises:
    UsageError: if the columns are empty or unequal, or batch_size < 1.
  """
  size = check_columns(columns)
  if batch_size < 1:
    raise UsageError(f'batch_size {batch_size} is not positive; give >= 1')
  columns = numeric(columns)
  weight = np.asarray(columns.get('weight', np.ones(size)), np.float32)
  columns['weight'] = weight
  out = []
  for start in range(0, size, batch_size):
    batch = take(columns, slice(start, start + batch_size))
    missing = start + batch_size - size
    if missing > 0:
      rows = np.minimum(np.arange(start, start + batch_size), size - 1)
      batch = take(columns, rows)
      batch['weight'][-missing:] = 0.0
    out.append(collate(batch) if collate else batch)
  return out


def rows_of_process(batch: Any, process_index: int, process_count: int) -> Any:
  """One process's contiguous rows of a global batch (any pytree of arrays).

  The block order is that of a mesh whose data axis runs over the processes.

  Raises:
    UsageError: if the rows do not divide, or there is no such process.
  """
  if not 0 <= process_index < process_count:
    raise UsageError(
      f'no process {process_index} of {process_count}; give'
      f' 0..{process_count - 1}'
    )

  def rows(array):
    share, left = divmod(len(array), process_count)
    if left:
      raise UsageError(
        f'{len(array)} rows do not divide over {process_count} processes;'
        f' give a batch_size that is a multiple of {process_count}'
      )
    return array[process_index * share : (process_index + 1) * share]

  return jax.tree.map(rows, batch)


class _Range:
  """A random-access source over `batches(start..stop-1)`."""

  def __init__(self, source: Callable[[int], Any], start: int, stop: int):
    self.source, self.start, self.stop = source, start, stop

  def __len__(self) -> int:
    return max(self.stop - self.start, 0)

  def __getitem__(self, index: Any) -> Any:
    return self.source(self.start + int(index))

  def __repr__(self) -> str:
    return f'batches[{self.start}:{self.stop}]'


def prefetch(
  source: Callable[[int], Any],
  start: int,
  stop: int,
  *,
  buffer: int = 4,
  num_threads: int = 1,
) -> Iterator[Any]:
  """Yields `source(start), ..., source(stop - 1)`, read ahead by Grain.

  Grain only reads in the background; the order is ours. Closing the iterator
  (or dropping it) ends its threads.

  Args:
    source: `i -> batch`: `Batches`, `Episodes` or any pure function.
    start: first index.
    stop: one past the last index.
    buffer: batches read ahead (untuned); 0 reads in the caller's thread.
    num_threads: readers (untuned: decoded arrays in memory need only one).
  """
  if start >= stop:
    return
  import grain  # Takes a second to import; most uses never prefetch.

  options = grain.ReadOptions(
    num_threads=num_threads, prefetch_buffer_size=buffer
  )
  dataset = grain.MapDataset.source(_Range(source, start, stop))
  iterator = iter(dataset.to_iter_dataset(options))
  try:
    yield from iterator
  finally:
    iterator.close()
