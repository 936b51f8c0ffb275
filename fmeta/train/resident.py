"""Data that stay on the device, for devices that outrun the host."""

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fmeta.data import Columns, check_columns, numeric
from fmeta.train.dispatch import Program
from fmeta.types import Learner


class Resident(Program):
  """A `Program` whose data stay on the device; batches say which rows.

    program = train.Resident(learner, columns)
    stage = train.Stage('meta', source.by_row, num_steps)
    train.fit(learner, state, [stage], rng, program=program)

  A dispatch then sends row numbers instead of examples, so that a device that
  is faster than the host is not kept waiting, and many steps fit into one.

  Args:
    learner: as for `Program`.
    columns: arrays [N, ...]; strings stay behind.
    mesh: that of `fit`; each of its devices has all rows.

  Raises:
    UsageError: if the columns have unequal lengths.
  """

  def __init__(
    self, learner: Learner, columns: Columns, mesh: Mesh | None = None
  ):
    super().__init__(learner)
    check_columns(columns)
    where = None if mesh is None else NamedSharding(mesh, PartitionSpec())
    self.resident = jax.device_put(numeric(columns), where)
