"""Kronecker factors of the Fisher's diagonal blocks, one block per layer."""

import functools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fmeta.errors import UsageError
from fmeta.fisher.labels import Labels
from fmeta.fisher.passes import (
  Pass,
  Program,
  keys_of,
  over_labels,
  passed,
  without_padding,
)
from fmeta.fisher.uses import Use, only_use
from fmeta.types import Array, Batch, Forward, ModelState, Params


class Factors(NamedTuple):
  """F of a layer is about A (x) G.

  Attributes:
    a: [K, K], second moment of what enters; K counts a bias as one input.
    g: [O, O], second moment of the cotangents of what comes out.
  """

  a: Array
  g: Array


def bias_of(kernel: str) -> str:
  """Name of the bias beside a kernel."""
  return kernel.removesuffix('kernel') + 'bias'


def kronecker_fisher(
  forward: Forward,
  params: Params,
  moving: Params,
  model_state: ModelState,
  batches: Iterable[Batch],
  rng: Array,
  *,
  kernels: Sequence[str],
  labels: Labels,
) -> dict[str, Factors]:
  """K-FAC: factors of each dense layer's block of the Fisher.

  For y = W^T a + b let a' = (a, 1), or a without a moving bias. With one
  position per example the block of (W, b) is E[a' a'^T (x) g g^T], and

    A = E_x[a' a'^T],   G = E_x sum_y p(y | x) g g^T,   g = d log p(y | x) / dy

  (Martens & Grosse 2015, https://arxiv.org/abs/1503.05671) replaces the mean
  of the product by the product of means; that is exact where a' or g g^T is
  the same for all examples. With T positions (tokens, padding among them) A
  is also their mean and G their sum, as if positions had nothing to do with
  each other (Eschenhagen et al. 2023, https://arxiv.org/abs/2311.00636, call
  it K-FAC-expand).

  Args:
    forward: outputs are logits [B, classes].
    params: full merged parameters.
    moving: the subtree that moves.
    model_state: read only.
    batches: host batches with optional `weight`, 0 for padding.
    rng: for `labels.drawn`.
    kernels: names of kernels [K, O] in `moving`.
    labels: from `fisher.labels`.

  Returns:
    Name of the kernel -> factors.

  Raises:
    UsageError: if a kernel does anything but multiply once, or its bias is
      not added to that product.
  """
  total, count = None, jnp.zeros((), jnp.int32)
  for batch in batches:
    added, count = _of_batch(
      labels,
      forward,
      tuple(kernels),
      count,
      params,
      moving,
      model_state,
      batch,
      rng,
    )
    total = added if total is None else jax.tree.map(jnp.add, total, added)
  if total is None:
    raise UsageError('no batches to take factors from; give at least one')
  return jax.tree.map(lambda t: t / jnp.maximum(count, 1), total)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _of_batch(
  labels, forward, kernels, count, params, moving, model_state, batch, rng
):
  batch, real = without_padding(batch)
  one = passed(forward, params, moving, model_state, batch)
  names = one.program.names
  for kernel in kernels:
    _require_dense(one.program, kernel, bias_of(kernel) in names)

  def outputs(cotangents):
    slopes, _ = one.pullback(cotangents)
    return {name: _moment(_rows(slopes[name])) for name in kernels}

  keys = keys_of(rng, count, real)
  g = over_labels(labels, one, batch, keys, real, outputs)
  factors = {}
  for name in kernels:
    a = _entering(one, name, bias_of(name) in names)
    a = jnp.where(real[:, None, None], a, 0)
    factors[name] = Factors(_moment(a) / a.shape[1], g[name])
  some = real.any()
  factors = jax.tree.map(lambda x: jnp.where(some, x, 0), factors)
  return factors, count + real.sum()


def _rows(x: Array) -> Array:
  """[B, ..., n] -> [B, T, n]."""
  return x.reshape(x.shape[0], -1, x.shape[-1])


def _entering(one: Pass, kernel: str, has_bias: bool) -> Array:
  """[B, T, K], what meets a kernel, and 1 for its bias."""
  numbers = one.program.uses[kernel].equation.params['dimension_numbers']
  ((axis,), _), _ = numbers
  a = _rows(jnp.moveaxis(one.inputs[kernel], axis + 1, -1))
  return jnp.pad(a, ((0, 0), (0, 0), (0, int(has_bias))), constant_values=1)


def _moment(rows: Array) -> Array:
  """sum r r^T over [B, T, n]."""
  flat = rows.reshape(-1, rows.shape[-1])
  flat = flat.astype(jnp.promote_types(flat.dtype, jnp.float32))
  return flat.T @ flat


def _require_dense(program: Program, kernel: str, has_bias: bool) -> None:
  use = program.uses.get(kernel)
  if not use or use.kind != 'dot_general' or use.views or not _is_plain(use):
    raise UsageError(
      f'{kernel!r} is no kernel [in, out] that multiplies once, so it has no '
      'Kronecker factors; leave it out of kernels=, and it gets a diagonal'
    )
  if has_bias and not _meet(program, kernel, bias_of(kernel)):
    raise UsageError(
      f'{bias_of(kernel)!r} is not added to what {kernel!r} gives, so they '
      'are no dense layer; leave the kernel out of kernels='
    )


def _is_plain(use: Use) -> bool:
  """Whether it is x W with W [K, O]."""
  (_, contracted), _ = use.equation.params['dimension_numbers']
  rank = use.equation.invars[use.place].aval.ndim
  return use.place == 1 and rank == 2 and tuple(contracted) == (0,)


def _meet(program: Program, kernel: str, bias: str) -> bool:
  """Whether a bias is added to the product of a kernel, and only that."""
  through = ('reshape', 'broadcast_in_dim', 'convert_element_type')
  inputs = dict(zip(program.names, program.closed.jaxpr.invars, strict=False))
  added = only_use(program.closed.jaxpr, inputs[bias], through=through)
  (made,) = program.uses[kernel].equation.outvars
  if added is None or added.kind != 'add':
    return False
  return added.equation.invars[added.other] is made
