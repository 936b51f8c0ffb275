"""Reservoir sampling: every row seen is held with equal probability."""

from collections.abc import Sequence

from fmeta.memory import ranked
from fmeta.types import Memory


def reservoir(capacity: int, spec: ranked.Spec) -> Memory:
  """Reservoir sampling: every row seen is held with equal probability.

  Row number s draws a priority from `fold_in(rng, s)`, and the `capacity`
  rows of highest priority are held: a uniform sample without replacement
  (the keys of Efraimidis & Spirakis 2006,
  https://doi.org/10.1016/j.ipl.2005.11.003, with equal weights). Contents
  therefore depend neither on batch size nor on the number of devices, and
  reservoirs of parts of a stream merge into that of the whole: see `merge`.

  A row's number is how many came before, or the batch's own `number` where
  it has one: a process that reads every eighth row says so there.

  Args:
    capacity: rows held.
    spec: key -> array or ShapeDtypeStruct of ONE row, without batch axis.
      Other keys of the inserted rows are ignored; `outputs` may be among
      them.

  Raises:
    UsageError: if the capacity is not positive.
  """
  ranked.check_capacity(capacity)

  def insert(memory, rows, weight, rng):
    return ranked.offer(memory, rows, weight, rng, _leave)

  return Memory(lambda: ranked.empty(capacity, spec), insert, ranked.sample)


def merge(memories: Sequence[ranked.Held], capacity: int) -> ranked.Held:
  """The reservoir of a whole stream from those of its parts.

  The same rows, bit for bit and in the same order, however the stream was
  cut, if all parts were inserted under one key and with the `number` each
  row has in the whole. Of a single reservoir it is the rows in canonical
  order.

  Args:
    memories: states of reservoirs over disjoint parts.
    capacity: rows held, at most those of the smallest part.

  Raises:
    UsageError: if a part is smaller, or there is none.
  """
  return ranked.merged(memories, capacity, _leave)


def _leave(column, priority, count):
  del column
  return ranked.lowest(priority, count)
