"""What dense layers are run on, and orthonormal bases of it.

A gradient of a kernel W of y = x W is a sum of outer products of inputs x, so
the span of a task's inputs holds all its gradients. A basis is a matrix [n, n]
whose filled columns come first; those of zeros do nothing.
"""

import functools
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp

from fmeta.errors import UsageError
from fmeta.types import Array, Batch, Forward, ModelState, Params, Scalar

# batch -> [B] or [B, L], zero where a row, or a place in it, is padding.
Real = Callable[[Batch], Array]


def wide(dtype) -> jnp.dtype:
  """At least float32."""
  return jnp.promote_types(dtype, jnp.float32)


def check_dense(name: str, leaf: Array) -> None:
  """Refuses a leaf that is no kernel [in, out].

  Raises:
    UsageError: naming the leaf and its shape.
  """
  if leaf.ndim != 2 or not name.endswith('kernel'):
    raise UsageError(
      f'{name!r} {list(leaf.shape)} is no kernel of nn.Dense, [in, out]; '
      "give patterns such as 'body/.*/kernel'"
    )


def real_rows(batch: Batch) -> Array:
  """[B]: rows of positive weight."""
  size = jax.tree.leaves(batch)[0].shape[0]
  return batch.get('weight', jnp.ones(size)) > 0


def dense_inputs(
  forward: Forward,
  names: Sequence[str],
  params: Params,
  model_state: ModelState,
  batches: Sequence[Batch],
  real: Real = real_rows,
) -> Mapping[str, Array]:
  """Kernel -> [N, in]: what its layer is run on, padding as zeros.

  A pass in evaluation mode over batches, which may differ in shape.

  Args:
    forward: runs flax.linen modules.
    names: of kernels of `nn.Dense`.
    params: merged.
    model_state: not changed.
    batches: at least one.
    real: see `Real`. A layer run on more rows than the batch has is taken to
      see them in the order of `real`, those of one example in a row.

  Raises:
    UsageError: for a kernel that no `nn.Dense` ran with, or one run on rows
      that do not come from those of the batch.
  """
  names = tuple(names)
  seen = [
    _inputs(forward, names, real, params, model_state, batch)
    for batch in batches
  ]
  return jax.tree.map(lambda *x: jnp.concatenate(x), *seen)


# Functions are static: every task's pass is one compiled program.
@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _inputs(
  forward, names, real, params, model_state, batch
) -> Mapping[str, Array]:
  import flax.linen as nn

  mask = jnp.asarray(real(batch)) > 0
  seen = {name: [] for name in names}

  def watch(next_fun, args, kwargs, context):
    name = '/'.join((*context.module.path, 'kernel'))
    called = context.method_name == '__call__'
    if isinstance(context.module, nn.Dense) and called and name in seen:
      seen[name].append(_masked(name, args[0], mask))
    return next_fun(*args, **kwargs)

  with nn.intercept_methods(watch):
    forward(params, model_state, batch, None)
  missed = [name for name in names if not seen[name]]
  if missed:
    raise UsageError(
      f'no nn.Dense ran with {missed[0]!r}, so nobody can tell its inputs; '
      'leave it out of the patterns'
    )
  return {name: jnp.concatenate(found) for name, found in seen.items()}


def _masked(name: str, x: Array, mask: Array) -> Array:
  """Rows [N, in], zero where the mask is."""
  flat = x.astype(wide(x.dtype)).reshape(-1, x.shape[-1])
  if flat.shape[0] != mask.size:  # not a row per place: one or more per example
    mask = mask.reshape(mask.shape[0], -1).any(1)
  if flat.shape[0] % mask.size:
    raise UsageError(
      f'{name!r} is run on {x.shape}, whose rows are not those of a batch of '
      f'{mask.shape[0]}; leave it out of the patterns'
    )
  each = jnp.repeat(mask.reshape(-1), flat.shape[0] // mask.size)
  return jnp.where(each[:, None], flat, 0)


def empty_basis(kernel: Array) -> Array:
  """[in, in] without a column."""
  return jnp.zeros((len(kernel), len(kernel)), wide(kernel.dtype))


def without(basis: Array, columns: Array) -> Array:
  """What is orthogonal to the basis: (I - M M') X."""
  # Not in the reduced precision that is a default on accelerators.
  within = jnp.matmul(basis.T, columns, precision='highest')
  return columns - jnp.matmul(basis, within, precision='highest')


def new_directions(basis: Array, inputs: Array) -> tuple[Array, Array, Array]:
  """Left singular vectors and values of what inputs [N, n] add to a basis.

  Returns:
    Vectors [n, k], values [k] from large to small, and which values are more
    than rounding [k].
  """
  columns = inputs.astype(basis.dtype).T
  # Twice: of inputs that hardly leave the basis, rounding is much of the rest.
  rest = without(basis, without(basis, columns))
  if rest.shape[1] > rest.shape[0]:
    # The same left vectors and values, and none of the many right vectors: a
    # third of the time at 384 x 2,048 (CPU, 2026-11-26).
    rest = jnp.linalg.qr(rest.T, mode='r').T
  left, singular, _ = jnp.linalg.svd(rest, full_matrices=False)
  rounding = max(columns.shape) * jnp.finfo(basis.dtype).eps
  return left, singular, singular > rounding * jnp.linalg.norm(columns)


@jax.jit
def grown(basis: Array, inputs: Array, energy: Scalar) -> Array:
  """The basis [n, n] with the directions of inputs [N, n] that it lacks.

  Of those the first k, the smallest k such that with the basis they span
  `energy` of the inputs' sum of squares (Saha et al. 2021,
  https://arxiv.org/abs/2103.09762, eqs. 8 and 9).
  """
  left, singular, real = new_directions(basis, inputs)
  total = jnp.sum(inputs.astype(basis.dtype) ** 2)
  # What would still lack without each; summed from the smallest on.
  lacking = jnp.cumsum(singular[::-1] ** 2)[::-1]
  wanted = (lacking > (1 - energy) * total) & real
  return _filled(basis, left, wanted.sum())


def _filled(basis, new, number):
  """Puts the first columns of `new` behind those of the basis."""
  held = jnp.any(basis != 0, axis=0).sum()
  place = jnp.arange(basis.shape[1]) - held
  moved = new[:, jnp.clip(place, 0, new.shape[1] - 1)]
  take = (place >= 0) & (place < number)
  return basis + jnp.where(take[None], moved, 0)
