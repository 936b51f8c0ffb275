"""Leaves that stand beside the parameter they adapt.

A sibling of `a/b/kernel` is called `a/b/kernel.<what>`; `a/b/kernel` is its
owner.
"""

import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from fmeta import tree
from fmeta.errors import UsageError
from fmeta.types import Array, Params

Born = Callable[[Params, Array], Params]


def owners(params: Params, patterns: Sequence[str]) -> list[str]:
  """Names of the ordinary parameters that match one of the patterns.

  Raises:
    UsageError: if a pattern matches nothing.
  """
  ordinary = [name for name in tree.names(params) if not is_sibling(name)]
  tree.check_patterns(patterns, ordinary)
  pairs = [(pattern, None) for pattern in patterns]
  return [
    name for name in ordinary if tree.first_match(name, pairs) is not None
  ]


def is_sibling(name: str) -> bool:
  """Whether an adapter has added the leaf of this name."""
  return '.' in name.rpartition('/')[2]


def module_path(name: str) -> str:
  """Path of the module that a leaf belongs to; '' for the outermost."""
  return name.rpartition('/')[0]


def grow(params: Params, leaves: Mapping[str, Array]) -> dict:
  """The parameters with leaves added under their full names."""
  nested: dict = {}
  for name, leaf in leaves.items():
    *path, last = name.split('/')
    at = nested
    for key in path:
      at = at.setdefault(key, {})
    at[last] = leaf
  return tree.combine(params, nested)


def key_for(rng: Array, name: str) -> Array:
  """A key that depends on the name only, not on what else is adapted."""
  return jax.random.fold_in(rng, zlib.crc32(name.encode()))


def collect(params: Params, suffix: str) -> dict[str, Array]:
  """`{owner: leaf}` of all leaves with this suffix."""
  return {
    name.removesuffix(suffix): tree.get(params, name)
    for name in tree.names(params)
    if name.endswith(suffix)
  }


def without(params: Params, suffixes: tuple[str, ...]) -> dict:
  """The parameters without the leaves of these suffixes."""
  return tree.partition(params, lambda name: not name.endswith(suffixes))[0]


def splitter(
  born: Born, suffixes: tuple[str, ...], also: tuple[str, ...]
) -> Callable[[Params, Array], tuple[Params, Params]]:
  """A `Tuning.init`: the siblings and the leaves matching `also` move.

  Siblings that are among the parameters already are used, so that an outer
  loop can own them; otherwise `born(params, rng)` adds them.

  Raises:
    UsageError: at `init`, if a pattern matches nothing or the siblings found
      are not those that `born` would add.
  """

  def init(params, rng):
    if any(name.endswith(suffixes) for name in tree.names(params)):
      _check_born(params, born, suffixes, rng)
    else:
      params = born(params, rng)
    tree.check_patterns(also, tree.names(params))
    pairs = [(pattern, None) for pattern in also]
    return tree.partition(
      params,
      lambda name: (
        name.endswith(suffixes) or tree.first_match(name, pairs) is not None
      ),
    )

  return init


def _check_born(params, born, suffixes, rng):
  expected = _shapes(
    jax.eval_shape(born, without(params, suffixes), rng), suffixes
  )
  found = _shapes(params, suffixes)
  for name in sorted(expected.keys() | found.keys()):
    if expected.get(name) != found.get(name):
      raise UsageError(
        f'the parameters hold {name!r} with shape {found.get(name)}, but the '
        f'tuning expects {expected.get(name)}; give the tuning and its *_init '
        'the same patterns and sizes'
      )


def _shapes(params, suffixes) -> dict[str, tuple[int, ...]]:
  chosen = tree.partition(params, lambda name: name.endswith(suffixes))[0]
  return tree_shapes(chosen)


def tree_shapes(params: Params) -> dict[str, tuple[int, ...]]:
  """`{name: shape}` of all leaves."""
  leaves: list[Any] = jax.tree.leaves(params)
  return {
    name: tuple(leaf.shape)
    for name, leaf in zip(tree.names(params), leaves, strict=True)
  }


def check_unrolled(module: Any, name: str, shape: Sequence[int]) -> None:
  """Refuses a module that sees a part of the leaf `name` of `shape`.

  Inside `nn.scan` or `nn.vmap` one adapter would silently serve all layers.

  Raises:
    UsageError: naming the leaf.
  """
  own = module.variables['params'][name.rpartition('/')[2]]
  if tuple(own.shape) != tuple(shape):
    raise UsageError(
      f'{name!r} of shape {tuple(shape)} is used in parts of '
      f'{tuple(own.shape)}, and one adapter would serve all of them; unroll '
      'the layers'
    )
