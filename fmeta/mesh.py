"""The mesh: devices, processes and batches, under named axes.

What lies where on it is `fmeta.sharding`'s business.
"""

import math
import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from fmeta import tree
from fmeta.errors import UsageError, suggest

AXES = ('data', 'fsdp', 'tensor')
BATCH_AXES = ('data', 'fsdp')


def parse_mesh(text: str, num_devices: int | None = None) -> dict[str, int]:
  """`'data:2,fsdp:4'` -> `{'data': 2, 'fsdp': 4}`.

  Args:
    text: comma-separated `axis:size`; axes are `data` (batch), `fsdp` (batch
      and parameters) and `tensor` (parameters).
    num_devices: if given, the product of the sizes must divide it.

  Raises:
    UsageError: for an unknown or repeated axis, a size that is no positive
      integer, or a mesh that does not divide the devices.
  """
  axes: dict[str, int] = {}
  for part in text.split(','):
    name, _, size = (piece.strip() for piece in part.partition(':'))
    if name not in AXES:
      raise UsageError(f'mesh {text!r}: no axis {name!r}{suggest(name, AXES)}')
    if name in axes:
      raise UsageError(f'mesh {text!r} names {name!r} twice; give it once')
    if not size.isdecimal() or int(size) < 1:
      raise UsageError(
        f'mesh {text!r}: the size of {name!r} is {size!r}; give an integer of'
        f' at least 1, as in {name}:2'
      )
    axes[name] = int(size)
  if num_devices is not None:
    check_divides(axes, num_devices)
  return axes


def check_divides(axes: Mapping[str, int], num_devices: int) -> None:
  """Refuses a mesh whose size does not divide the number of devices.

  Raises:
    UsageError: with the sizes that do.
  """
  size = math.prod(axes.values())
  if num_devices % size:
    possible = [n for n in range(1, num_devices + 1) if not num_devices % n]
    raise UsageError(
      f'mesh {mesh_text(axes)} needs {size} devices, there are {num_devices};'
      f' possible sizes: {possible}. On a CPU, XLA_FLAGS='
      f'--xla_force_host_platform_device_count={size} makes that many'
    )


def mesh_text(axes: Mapping[str, int]) -> str:
  """The inverse of `parse_mesh`."""
  return ','.join(f'{name}:{size}' for name, size in axes.items())


def make_mesh(axes: Mapping[str, int]) -> Mesh:
  """A mesh over the first devices; over all of them with several processes.

  Axes are `Auto`: XLA chooses how arrays inside a step are laid out. (Since
  jax 0.9 `jax.make_mesh` defaults to `Explicit`, where every operation must
  be told.)

  Args:
    axes: axis name -> size, see `parse_mesh`.

  Raises:
    UsageError: if the mesh does not divide the devices, leaves out those of
      another process, or would deadlock (see `synchronous_dispatch`).
  """
  devices = jax.devices()
  size = math.prod(axes.values())
  check_divides(axes, len(devices))
  if jax.process_count() > 1 and size != len(devices):
    raise UsageError(
      f'mesh {mesh_text(axes)} has {size} of the {len(devices)} devices of'
      f' {jax.process_count()} processes; a mesh over processes takes all'
    )
  if size > 1 and devices[0].platform == 'cpu':
    _check_synchronous()
  return jax.make_mesh(
    tuple(axes.values()),
    tuple(axes),
    axis_types=(AxisType.Auto,) * len(axes),
    devices=devices[:size],
  )


def synchronous_dispatch() -> None:
  """Makes CPU devices run each program before the next is dispatched.

  Several host devices and an unblocked loop of sharded steps otherwise
  deadlock: the devices' all-reduces wait for each other's threads. Call it
  before the first computation; it does nothing to accelerators.
  """
  jax.config.update('jax_cpu_enable_async_dispatch', False)


def _check_synchronous() -> None:
  # Setting it here would be too late: the CPU client already exists.
  if jax.config.read('jax_cpu_enable_async_dispatch'):
    raise UsageError(
      'several CPU devices deadlock with asynchronous dispatch; call'
      ' fmeta.sharding.synchronous_dispatch() before anything else uses jax,'
      ' or set JAX_CPU_ENABLE_ASYNC_DISPATCH=0'
    )


def _check_step(tasks: int) -> None:
  if 'SLURM_STEP_NODELIST' not in os.environ:
    raise UsageError(
      f'SLURM_NTASKS={tasks}, but this process was not started by srun and is'
      ' alone; start it with srun, or set SLURM_NTASKS=1'
    )


def initialize_processes(
  num_processes: int | None = None,
  process_id: int | None = None,
  coordinator: str | None = None,
  *,
  timeout: int = 300,
) -> int:
  """Joins the processes of one run; call it before anything else uses jax.

  Either all three arguments are given, or none: then SLURM's variables say
  (one task per process), and without them there is one process.

  Args:
    num_processes: how many were launched.
    process_id: which of them this is, from 0.
    coordinator: `host:port` of process 0, the port free there.
    timeout: seconds to wait for the others (300 is jax's default).

  Returns:
    The number of processes.

  Raises:
    UsageError: if only some arguments are given, or the processes did not
      find each other, or SLURM was asked for several and srun was forgotten
      (each would silently train alone).
  """
  synchronous_dispatch()
  given = (num_processes, process_id, coordinator)
  if any(x is None for x in given) and any(x is not None for x in given):
    raise UsageError(
      'give all of num_processes, process_id and coordinator, or none; got'
      f' {given}'
    )
  slurm = int(os.environ.get('SLURM_NTASKS', 1))
  if num_processes is None and slurm > 1:
    _check_step(slurm)
  wanted = slurm if num_processes is None else num_processes
  if num_processes is not None and num_processes > 1:
    jax.distributed.initialize(
      coordinator, num_processes, process_id, initialization_timeout=timeout
    )
  elif slurm > 1:
    jax.distributed.initialize(initialization_timeout=timeout)
  check_processes(wanted)
  return wanted


def check_processes(wanted: int) -> None:
  """Refuses to run as another number of processes than was launched.

  Raises:
    UsageError: naming both numbers.
  """
  found = jax.process_count()
  if found != wanted:
    raise UsageError(
      f'{found} process(es) found each other although {wanted} were launched;'
      ' call initialize_processes before anything else uses jax, with one'
      ' coordinator address for all'
    )


def batch_sharding(rank: int, mesh: Mesh, axis: int = 0) -> NamedSharding:
  """The batch axis over those of `data` and `fsdp` that the mesh has."""
  axes = tuple(name for name in BATCH_AXES if name in mesh.shape)
  if rank <= axis or not axes:
    return NamedSharding(mesh, P())
  return NamedSharding(mesh, P(*[None] * axis, axes))


def check_batch(batch: Any, mesh: Mesh, axis: int = 0, times: int = 1) -> None:
  """Refuses a batch whose rows do not divide over the mesh.

  Args:
    batch: a pytree of arrays; those without a batch axis are ignored.
    mesh: as the state's.
    axis: where the rows are.
    times: processes that hold as many rows each.

  Raises:
    UsageError: with the size and the possible ones.
  """
  parts = math.prod(mesh.shape.get(name, 1) for name in BATCH_AXES)
  for name, leaf in zip(tree.names(batch), jax.tree.leaves(batch), strict=True):
    if np.ndim(leaf) <= axis:
      continue
    size = np.shape(leaf)[axis] * times
    if size % parts or not size:
      lower = size // parts * parts
      near = [n for n in (lower, lower + parts) if n]
      raise UsageError(
        f'{size} rows or tasks of {name!r} do not divide over the {parts}'
        f' batch parts of mesh {mesh_text(mesh.shape)}; give a multiple of'
        f' {parts}, such as {" or ".join(map(str, near))}'
      )


def place_batch(
  batch: Mapping[str, Any], mesh: Mesh, *, stacked: bool = False
) -> dict[str, Any]:
  """The global batch on the mesh, its rows split over `data` and `fsdp`.

  Episodes (`{'support': ..., 'query': ...}`) are split by task. With several
  processes each gives the same global batch and keeps only its rows.

  Args:
    batch: numpy arrays [B, ...], nested or not; one of rank 0 is replicated.
    mesh: as the state's.
    stacked: arrays are [num_steps, B, ...], a chunk for `lax.scan`.

  Raises:
    UsageError: if B does not divide, with the sizes that would.
  """
  check_batch(batch, mesh, int(stacked))
  return _place_rows(batch, mesh, int(stacked), 1)


def place_process_rows(
  rows: Mapping[str, Any], mesh: Mesh, *, stacked: bool = False
) -> dict[str, Any]:
  """Like `place_batch`, but each process gives only its own rows.

  These are `data.rows_of_process` of the global batch: for readers that need
  not touch the rest. The mesh's batch axes must run over the processes.

  Raises:
    UsageError: if the global batch does not divide.
  """
  check_batch(rows, mesh, int(stacked), jax.process_count())
  return _place_rows(rows, mesh, int(stacked), jax.process_count())


def _place_rows(batch, mesh, axis, times) -> dict[str, Any]:
  def place(array):
    array = np.asarray(array)
    shape = [
      size * times if index == axis else size
      for index, size in enumerate(array.shape)
    ]
    return jax.make_array_from_process_local_data(
      batch_sharding(array.ndim, mesh, axis), array, tuple(shape)
    )

  return jax.tree.map(place, dict(batch))


def gather_to_host(values: Any) -> Any:
  """Whole numpy arrays in every process, whatever their sharding.

  With several processes it is a collective: all of them must call it.
  """

  def gather(leaf):
    if not isinstance(leaf, jax.Array):
      return np.asarray(leaf)
    if leaf.is_fully_addressable or leaf.is_fully_replicated:
      return np.asarray(leaf)
    return multihost_utils.process_allgather(leaf, tiled=True)

  return jax.tree.map(gather, values)
