"""Sums of squared per-example gradients, from what a use of a leaf has seen.

Every matrix product and every convolution is y_t = W^T a_t for positions t,
and an example's gradient is sum_t a_t d_t^T with d_t the cotangent of y_t.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fmeta.fisher.uses import Use
from fmeta.types import Array

PRODUCTS = ('dot_general', 'conv_general_dilated')


def is_known(use: Use) -> bool:
  """Whether `sum_of_squares` knows the use."""
  params = use.equation.params
  if use.kind == 'dot_general':
    return not any(params['dimension_numbers'][1])
  if use.kind == 'conv_general_dilated':
    groups = params['feature_group_count'], params['batch_group_count']
    return use.place == 1 and groups == (1, 1)
  return use.kind == 'gather' and use.place == 0 and _takes_rows(use)


def sum_of_squares(use: Use, inputs: Array, slopes: Array) -> Array:
  """sum_i g_i^2 over the examples i, shaped like the use's operand.

  With one position (T = 1) the gradient is an outer product, so the sum is

    (A * A)^T (D * D)

  (Goodfellow 2015, https://arxiv.org/abs/1510.01799, has the trick). With
  more, positions are summed before the square: sum_i (A_i^T D_i)^2. Writing
  that as products of pairs of positions would take T (T + 1) / 2 products
  for T here. For a lookup D is summed over positions of equal index, then
  squared and added to that row.

  Args:
    use: a known one, see `is_known`.
    inputs: [B, ...], the operand that met the leaf; indices for a lookup.
    slopes: [B, ...], cotangents of the result.
  """
  if use.kind == 'gather':
    return _looked_up(use, inputs, slopes)
  a, d = as_rows(use, inputs, slopes)
  precision = use.equation.params['precision']
  if a.shape[1] == 1:
    a, d = jnp.square(a[:, 0]), jnp.square(d[:, 0])
    squares = jnp.einsum('bk,bo->ko', a, d, precision=precision)
  else:
    each = jnp.einsum('btk,bto->bko', a, d, precision=precision)
    squares = jnp.square(each).sum(0)
  return as_operand(use, squares)


def as_rows(use: Use, inputs: Array, slopes: Array) -> tuple[Array, Array]:
  """What enters and what comes back, [B, T, K] and [B, T, O], >= float32.

  Args:
    use: of a matrix product or a convolution.
    inputs: [B, ...], the operand that met the kernel.
    slopes: [B, ...], cotangents of the result.
  """
  wide = jnp.promote_types(slopes.dtype, jnp.float32)
  inputs, slopes = inputs.astype(wide), slopes.astype(wide)
  size = slopes.shape[0]
  if use.kind == 'conv_general_dilated':
    return _patches(use, inputs, slopes)
  contracted = use.equation.params['dimension_numbers'][0][use.other]
  free = [k for k in range(inputs.ndim - 1) if k not in contracted]
  a = inputs.transpose(0, *(k + 1 for k in (*free, *contracted)))
  count = math.prod(inputs.shape[k + 1] for k in free)
  if use.place == 1:
    return a.reshape(size, count, -1), slopes.reshape(size, count, -1)
  d = slopes.reshape(size, -1, count).swapaxes(1, 2)
  return a.reshape(size, count, -1), d


def as_operand(use: Use, matrix: Array) -> Array:
  """[K, O] in the shape of the use's operand."""
  shape = use.equation.invars[use.place].aval.shape
  order = _axes(use, len(shape))
  values = matrix.reshape([shape[axis] for axis in order])
  return values.transpose(np.argsort(order))


def _axes(use: Use, rank: int) -> tuple[int, ...]:
  """The operand's axes as K and O have them."""
  numbers = use.equation.params['dimension_numbers']
  if use.kind == 'conv_general_dilated':
    out, into, *space = numbers.rhs_spec
    return (*space, into, out)
  contracted = numbers[0][use.place]
  return (*contracted, *(k for k in range(rank) if k not in contracted))


def _patches(use: Use, inputs: Array, slopes: Array) -> tuple[Array, Array]:
  """Windows [B, T, K], entries by place, then channel, and [B, T, O]."""
  params = use.equation.params
  numbers = params['dimension_numbers']
  kernel = use.equation.invars[1].aval.shape
  size = slopes.shape[0]
  x = _channels_last(inputs, numbers.lhs_spec)
  d = _channels_last(slopes, numbers.out_spec)
  edges = zip(params['padding'], params['lhs_dilation'], strict=True)
  space = [(low, high, step - 1) for (low, high), step in edges]
  fixed = (0, 0, 0)
  x = jax.lax.pad(x, jnp.zeros((), x.dtype), [fixed, fixed, *space, fixed])
  windows = []
  for offset in itertools.product(
    *(range(kernel[axis]) for axis in numbers.rhs_spec[2:])
  ):
    first = np.multiply(offset, params['rhs_dilation'])
    strides = params['window_strides']
    last = first + np.multiply(np.subtract(d.shape[2:-1], 1), strides) + 1
    windows.append(
      jax.lax.slice(
        x,
        (0, 0, *first, 0),
        (*x.shape[:2], *last, x.shape[-1]),
        (1, 1, *strides, 1),
      )
    )
  count = math.prod(d.shape[1:-1])
  a = jnp.concatenate(windows, -1).reshape(size, count, -1)
  return a, d.reshape(size, count, -1)


def _channels_last(x: Array, spec: Sequence[int]) -> Array:
  """[B, ...] of a convolution -> [B, N, space..., C]."""
  rows, channels, *space = (axis + 1 for axis in spec)
  return x.transpose(0, rows, *space, channels)


def _takes_rows(use: Use) -> bool:
  """Whether a gather is `table[ids]` of a matrix."""
  params, table = use.equation.params, use.equation.invars[0].aval
  numbers = params['dimension_numbers']
  return (
    table.ndim == 2
    and tuple(params['slice_sizes']) == (1, table.shape[1])
    and tuple(numbers.collapsed_slice_dims) == (0,)
    and tuple(numbers.start_index_map) == (0,)
    and tuple(numbers.offset_dims) == (use.equation.outvars[0].aval.ndim - 1,)
    and not numbers.operand_batching_dims
  )


def _looked_up(use: Use, inputs: Array, slopes: Array) -> Array:
  rows, width = use.equation.invars[0].aval.shape
  size = slopes.shape[0]
  # Where they land: clipped indices meet in one row.
  ids = _landing(use, inputs.reshape(size, -1), rows)
  d = slopes.reshape(size, -1, width)
  d = d.astype(jnp.promote_types(d.dtype, jnp.float32))
  # Each position's sum is collected where its index comes first.
  first = jnp.argmax(ids[:, :, None] == ids[:, None, :], axis=-1)
  example = jnp.arange(size)[:, None]
  summed = jnp.zeros_like(d).at[example, first].add(d)
  table = jnp.zeros((rows, width), d.dtype)
  return table.at[ids].add(jnp.square(summed), mode='drop')


def _landing(use: Use, ids: Any, rows: int) -> Array:
  """Rows that indices read; `rows`, which is dropped, for those outside."""
  if use.equation.params['mode'] == jax.lax.GatherScatterMode.CLIP:
    return jnp.clip(ids, 0, rows - 1)
  return jnp.where((ids >= 0) & (ids < rows), ids, rows)
