"""Leaves beside a leaf: how low-rank tunings name, add, find and use them.

All of them run the model with W' = g (W + a b) in place of W. A method says
how its leaves are born and which `Change` they make; `low_rank` is the tuning.
"""

import functools
import math
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import jax

from fmeta import tree
from fmeta.adapters.layers import Change, enter
from fmeta.adapters.norms import running_statistics
from fmeta.errors import UsageError
from fmeta.tuning import keep_under
from fmeta.types import Array, Params, Tuning

# The leaves beside one kernel, by suffix.
Leaves = Mapping[str, Array]


class Method(NamedTuple):
  """A member of the low-rank family.

  Attributes:
    suffixes: of the trainable leaves; a parameter with one of them says that
      they have been born already.
    birth: `(params, rng) -> params` with the leaves beside their kernels.
    change: `(kernel, leaves, frozen) -> Change`.
    check: `(name, leaves)`, refuses leaves that do not fit the tuning.
    constants: names of frozen leaves that are no parameters of the model.
  """

  suffixes: tuple[str, ...]
  birth: Callable[[Params, Array], Params]
  change: Callable[[Array, Leaves, Params], Change]
  check: Callable[[str, Leaves], None]
  constants: tuple[str, ...] = ()


def chosen(
  params: Params, patterns: tuple[str, ...], suffixes: tuple[str, ...]
) -> dict[str, Array]:
  """The leaves by name whose whole name matches a pattern, factors aside.

  Raises:
    UsageError: if there is no pattern or one matches nothing.
  """
  if not patterns:
    raise UsageError('no pattern; name the kernels to adapt, as in ".*/kernel"')
  leaf_names = tree.names(params)
  tree.check_patterns(patterns, leaf_names)
  pairs = [(pattern, None) for pattern in patterns]
  return {
    name: tree.get(params, name)
    for name in leaf_names
    if tree.first_match(name, pairs) is not None and not name.endswith(suffixes)
  }


def check_rank(what: str, name: str, leaf: Array, rank: int) -> None:
  """Refuses a leaf that has no factors of this rank.

  Raises:
    UsageError: naming the leaf, its shape and what is possible.
  """
  if leaf.ndim not in (2, 4):
    raise UsageError(
      f'{what} needs [in, out] kernels, tables or [h, w, in, out] kernels, but '
      f'{name!r} has shape {leaf.shape}; narrow the pattern, or unroll scanned '
      'layers'
    )
  largest = min(math.prod(leaf.shape[:-1]), leaf.shape[-1])
  if not 0 < rank <= largest:
    raise UsageError(
      f'{what} rank {rank} for {name!r} of shape {leaf.shape}; possible: '
      f'1..{largest}'
    )


def check_born(what: str, rank: int, suffix: str):
  """A `Method.check`: the born factors have this rank on their last axis."""

  def check(name, leaves):
    if leaves[suffix].shape[-1] != rank:
      raise UsageError(
        f'factors of {name!r} have rank {leaves[suffix].shape[-1]}, but the '
        f'{what} says rank={rank}; give both the same'
      )

  return check


def key_of(rng: Array, name: str) -> Array:
  """A key that depends on `rng` and the name only."""
  return jax.random.fold_in(rng, zlib.crc32(name.encode()))


def beside(
  params: Mapping, leaves: Mapping[str, Leaves], prefix: str = ''
) -> dict:
  """`params` with `<name><suffix>` leaves after each named leaf.

  The suffix '' replaces the leaf itself.
  """
  out = {}
  for key, value in params.items():
    name = f'{prefix}{key}'
    if isinstance(value, Mapping):
      out[key] = beside(value, leaves, name + '/')
    else:
      out[key] = value
      for suffix, leaf in leaves.get(name, {}).items():
        out[f'{key}{suffix}'] = leaf
  return out


def leaves_of(
  params: Params, suffixes: tuple[str, ...]
) -> dict[str, dict[str, Array]]:
  """The leaves that `beside` added, by the name that they stand beside.

  Raises:
    UsageError: if some but not all of a kernel's leaves are there.
  """
  found: dict[str, dict[str, Array]] = {}
  for name, leaf in zip(
    tree.names(params), jax.tree.leaves(params), strict=True
  ):
    for suffix in suffixes:
      if name.endswith(suffix):
        found.setdefault(name.removesuffix(suffix), {})[suffix] = leaf
  for name, leaves in found.items():
    missing = [suffix for suffix in suffixes if suffix not in leaves]
    if missing:
      raise UsageError(
        f'{name!r} has {sorted(leaves)[0]!r} but no {missing[0]!r}; the tuning '
        f'needs {", ".join(suffixes)}'
      )
  return found


def without(params: Params, suffixes: tuple[str, ...]) -> dict:
  """The tree without leaves that end in one of the suffixes."""
  return tree.partition(params, lambda name: not name.endswith(suffixes))[0]


def low_rank(method: Method, also: tuple[str, ...]) -> Tuning:
  """The tuning of a low-rank method.

  Args:
    method: see `Method`.
    also: patterns of ordinary parameters that move too.

  Raises:
    UsageError: at `init`, see `Method` and `tree.check_patterns`.
  """
  pairs = [(pattern, None) for pattern in also]

  def moves(name):
    return (
      name.endswith(method.suffixes)
      or tree.first_match(name, pairs) is not None
    )

  def init(params, rng):
    if not any(name.endswith(method.suffixes) for name in tree.names(params)):
      params = method.birth(params, rng)
    _check_constants(method, params)
    for name, leaves in leaves_of(params, method.suffixes).items():
      method.check(name, leaves)
    tree.check_patterns(also, tree.names(params))
    return tree.partition(params, moves)

  def merge(trainable, frozen):
    base, changes = _opened(method, trainable, frozen)

    def changed(name, leaf):
      return changes[name].apply(leaf) if name in changes else leaf

    return tree.map_with_name(changed, base)

  intercept = functools.partial(_through_activations, method)
  return Tuning(init, merge, keep_under, intercept)


def _check_constants(method: Method, params: Params) -> None:
  missing = sorted(set(method.constants) - set(tree.names(params)))
  if missing:
    raise UsageError(
      f'the factors were born without {missing[0]!r}; put all that the _init '
      'function of the tuning adds into the parameters'
    )


def _opened(method, trainable, frozen) -> tuple[dict, dict[str, Change]]:
  """The model's own parameters, and what is to be changed about them."""
  still = tree.partition(frozen, lambda name: name not in method.constants)[0]
  base = tree.combine(still, without(trainable, method.suffixes))
  changes = {
    name: method.change(tree.get(base, name), leaves, frozen)
    for name, leaves in leaves_of(trainable, method.suffixes).items()
  }
  return base, changes


@contextmanager
def _through_activations(method, trainable, frozen) -> Iterator[Params]:
  base, changes = _opened(method, trainable, frozen)
  with enter(changes), running_statistics(trainable, frozen):
    yield base


def run_merged(tuning: Tuning) -> Tuning:
  """The same tuning, run on merged weights; for any layer.

  The same function of the factors at the cost of a full-size weight gradient,
  for layers that an adapter cannot enter.
  """

  @contextmanager
  def intercept(trainable, frozen):
    with running_statistics(trainable, frozen):
      yield tuning.merge(trainable, frozen)

  return tuning._replace(intercept=intercept)
