"""Fine-tuning in a random subspace: the intrinsic dimension.

The leaves belong to no single parameter, so they stand at the top:
`subspace.direction` and, with groups, `subspace.scale`.
"""

import functools
import math
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import jax
import jax.numpy as jnp

from fmeta import tree
from fmeta.adapters import siblings
from fmeta.adapters.norms import running_statistics
from fmeta.errors import UsageError
from fmeta.tuning import keep_under
from fmeta.types import Array, Params, Scalar, Tuning

DIRECTION, SCALE = 'subspace.direction', 'subspace.scale'
LEAVES = (DIRECTION, SCALE)


def subspace_init(params: Params, dim: int, num_groups: int = 0) -> dict:
  """The parameters with a zero direction [dim] and unit scales [groups].

  Args:
    params: full parameters.
    dim: of the subspace.
    num_groups: as many scales; none for 0.

  Raises:
    UsageError: if `dim` is below 1.
  """
  if dim < 1:
    raise UsageError(f'subspace of dimension {dim}; give at least 1')
  dtype = jnp.result_type(*jax.tree.leaves(params))
  leaves = {DIRECTION: jnp.zeros(dim, dtype)}
  if num_groups:
    leaves[SCALE] = jnp.ones(num_groups, dtype)
  return {**params, **leaves}


def _scrambled(x: Array) -> Array:
  """A bijection of uint32 that spreads every bit (MurmurHash3's last steps)."""
  x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
  x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
  return x ^ (x >> 16)


def _projected(direction: Array, name: str, shape, seed) -> Array:
  """The rows of sqrt(D / dim) P that belong to the leaf `name`, times d."""
  salt = _scrambled(jnp.asarray(seed, jnp.uint32)) + jnp.uint32(
    zlib.crc32(name.encode())
  )
  index = jax.lax.iota(jnp.uint32, math.prod(shape))
  bits = _scrambled(_scrambled(index) ^ salt)
  sign = 1 - 2 * (bits >> 31).astype(direction.dtype)
  # The bias of the remainder is dim / 2^31.
  entry = (bits & 0x7FFFFFFF) % jnp.uint32(direction.shape[0])
  return (sign * direction[entry]).reshape(shape)


def _moved(patterns, seed, groups, trainable, frozen) -> Params:
  """theta0 + scale P d, and everything else as it is."""
  extra = {name for name in LEAVES if name in trainable}
  base = tree.combine(
    frozen, {k: v for k, v in trainable.items() if k not in extra}
  )
  direction, chosen = trainable[DIRECTION], _chosen(frozen, patterns)
  total = sum(math.prod(tree.get(frozen, name).shape) for name in chosen)
  unit = (direction.shape[0] / total) ** 0.5
  order = [(pattern, None) for pattern in groups]

  def moved(name, leaf):
    if name not in chosen:
      return leaf
    delta = unit * _projected(direction, name, leaf.shape, seed)
    if groups:
      delta = delta * trainable[SCALE][tree.first_match(name, order)]
    return leaf + delta.astype(leaf.dtype)

  return tree.map_with_name(moved, base)


def _chosen(frozen, patterns) -> set[str]:
  pairs = [(pattern, None) for pattern in patterns]
  return {
    name
    for name in tree.names(frozen)
    if tree.first_match(name, pairs) is not None
  }


def _parts(patterns, trainable, frozen) -> tuple[Params, Params]:
  """What moves and what does not, in the names of the full parameters."""
  chosen = _chosen(frozen, patterns)
  moving, still = tree.partition(frozen, chosen.__contains__)
  own = {k: v for k, v in trainable.items() if k not in LEAVES}
  return tree.combine(moving, own), still


@contextmanager
def _run(merge, patterns, trainable, frozen) -> Iterator[Params]:
  with running_statistics(*_parts(patterns, trainable, frozen)):
    yield merge(trainable, frozen)


def subspace(
  *patterns: str,
  dim: int,
  seed: Scalar = 0,
  groups: tuple[str, ...] = (),
  also: tuple[str, ...] = (),
) -> Tuning:
  """All matching parameters move in a random subspace of `dim` dimensions.

    theta = theta0 + P d,  theta in R^D, d in R^dim, d = 0 at the start

  (Li et al. 2018, https://arxiv.org/abs/1804.08838, section 2; Aghajanyan et
  al. 2020, https://arxiv.org/abs/2012.13255, eq. 1, for pre-trained models.)
  Row i of P has one entry, s_i sqrt(dim / D) in a column h_i, with sign and
  column hashed from (seed, the parameter's name, i); columns have unit length
  up to sampling and are orthogonal exactly. No D x dim matrix exists, and
  E |P d| = |d| as for the papers' Fastfood. With `groups` it is their
  structure-aware variant (SAID, eq. 3): theta_l = theta0_l + lambda_l (P d)_l
  with one trained lambda, 1 at the start, for each group.

  `merge` is exact. The gradient of every matching parameter is formed on the
  way to that of d: this saves parameters and state, not time.

  Args:
    *patterns: full-match regular expressions of what moves in the subspace.
    dim: of the subspace; the paper's d90 of BERT-base is 1,608 for MRPC and
      8,030 for QQP (Table 1).
    seed: which subspace; may be traced.
    groups: patterns that cover the matching parameters, first match wins.
    also: patterns of parameters that move freely, such as a new head.

  Raises:
    UsageError: if a pattern matches nothing, `dim` is below 1, or a group is
      missing.
  """

  def born(params, rng):
    del rng
    return subspace_init(params, dim, len(groups))

  split = siblings.splitter(born, LEAVES, also)

  def init(params, rng):
    known = tree.names(params)
    tree.check_patterns((*patterns, *groups), known)
    trainable, frozen = split(params, rng)
    order = [(pattern, None) for pattern in groups]
    for name in sorted(_chosen(frozen, patterns)) if groups else ():
      if tree.first_match(name, order) is None:
        raise UsageError(tree.uncovered(name, 'group'))
    return trainable, frozen

  merge = functools.partial(_moved, patterns, seed, groups)

  def keep(old, new, trainable, frozen):
    return keep_under(old, new, *_parts(patterns, trainable, frozen))

  return Tuning(init, merge, keep, functools.partial(_run, merge, patterns))
