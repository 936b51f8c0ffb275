"""What `fmeta.beside` puts into a batch, taken apart again."""

from fmeta.types import Array, Batch

PREFIX = 'memory_'


def apart(batch: Batch) -> tuple[dict[str, Array], dict[str, Array]]:
  """The batch's own keys, and those of the memory without their prefix.

  Args:
    batch: as `rehearse(..., mix=fmeta.beside)` makes it.
  """
  own = {k: v for k, v in batch.items() if not k.startswith(PREFIX)}
  past = {
    k.removeprefix(PREFIX): v for k, v in batch.items() if k.startswith(PREFIX)
  }
  return own, past
