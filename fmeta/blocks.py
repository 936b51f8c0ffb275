"""Blocks of a model: prefixes of names, in the order the input meets them.

A block is a name and an ordered-list pattern that its parameters match. Where
the order cannot be told from names (`embeddings` comes before `layer_0`, a
final `norm` after it) it is read from the program: a parameter stands where
it, or something made of parameters alone, first meets the data.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend import core

from fmeta import tree
from fmeta.errors import UsageError
from fmeta.types import Batch, Params

# Block name -> regular expression of its parameters, from input to output.
Blocks = Mapping[str, str]


class _From(NamedTuple):
  """What a value is made of: these parameters, and whether of data."""

  names: frozenset[str]
  data: bool


_NOTHING = _From(frozenset(), False)


def input_order(
  fun: Callable[[Params, Batch], Any], params: Params, batch: Batch
) -> list[str]:
  """Names of the parameters in the order in which the data meet them.

  Parameters that never meet the data come last.

  Args:
    fun: `(params, batch) -> anything`; it is traced, not run.
    params: nested dict.
    batch: arrays; whatever depends on one of them is data.
  """
  closed = jax.make_jaxpr(fun)(params, batch)
  names = tree.names(params)
  inputs = [_From(frozenset([name]), False) for name in names]
  inputs += [_From(frozenset(), True)] * (
    len(closed.jaxpr.invars) - len(inputs)
  )
  met: dict[str, None] = {}
  _walk(closed.jaxpr, inputs, met)
  return [*met, *sorted(set(names) - set(met), key=_natural)]


def _walk(
  jaxpr: core.Jaxpr, inputs: Sequence[_From], met: dict[str, None]
) -> list[_From]:
  """Notes meetings in order; returns what the outputs are made of."""
  known = dict(zip(jaxpr.invars, inputs, strict=True))

  def of(atom):
    literal = isinstance(atom, core.Literal)
    return _NOTHING if literal else known.get(atom, _NOTHING)

  for equation in jaxpr.eqns:
    given = [of(atom) for atom in equation.invars]
    inner = _inner(equation)
    if inner is not None:
      made = _walk(inner, given, met)
    else:
      made = [_meet(given, met)] * len(equation.outvars)
    known.update(zip(equation.outvars, made, strict=True))
  return [of(atom) for atom in jaxpr.outvars]


def _inner(equation: Any) -> core.Jaxpr | None:
  """The program that a call (jit, remat, scan ...) runs on its inputs."""
  for key in ('jaxpr', 'call_jaxpr', 'fun_jaxpr'):
    inner = equation.params.get(key)
    inner = getattr(inner, 'jaxpr', inner)
    if (
      inner is not None
      and len(inner.invars) == len(equation.invars)
      and len(inner.outvars) == len(equation.outvars)
    ):
      return inner
  return None


def _meet(given: Sequence[_From], met: dict[str, None]) -> _From:
  data = any(value.data for value in given)
  names = frozenset().union(*(v.names for v in given if not v.data))
  if not data:
    return _From(names, False)
  met.update(dict.fromkeys(sorted(names - set(met), key=_natural)))
  return _From(frozenset(), True)


def _natural(name: str) -> list:
  """Sorts layer_10 after layer_2."""
  parts = re.split(r'(\d+)', name)
  return [int(part) if part.isdigit() else part for part in parts]


def prefix_of(name: str, depth: int) -> str:
  """The first `depth` modules of a leaf's name; the leaf itself if none."""
  parts = name.split('/')
  return '/'.join(parts[: min(depth, len(parts) - 1)] or parts)


def find(
  fun: Callable[[Params, Batch], Any],
  params: Params,
  batch: Batch,
  *,
  depth: int = 2,
) -> dict[str, str]:
  """The model's blocks from input to output, name -> pattern.

  Args:
    fun: `(params, batch) -> anything`, the model or its loss; traced only.
    params: nested dict.
    batch: arrays that the model reads.
    depth: modules in a block's name: with 2, `body/layer_3/mlp/up/kernel`
      belongs to `body/layer_3`, and `head/kernel` to `head`.

  Raises:
    UsageError: if depth < 1.
  """
  if depth < 1:
    raise UsageError(f'depth={depth}; give at least 1')
  names = input_order(fun, params, batch)
  prefixes = dict.fromkeys(prefix_of(name, depth) for name in names)
  leaves = set(names)
  return {
    prefix: re.escape(prefix) + ('' if prefix in leaves else '/.*')
    for prefix in prefixes
  }


def assign(blocks: Blocks, names: Iterable[str]) -> dict[str, str]:
  """Parameter name -> block; names that no block covers are left out.

  Raises:
    UsageError: if a block's pattern matches no name.
  """
  names, pairs = list(names), [(p, block) for block, p in blocks.items()]
  tree.check_patterns(blocks.values(), names)
  found = {name: tree.first_match(name, pairs) for name in names}
  return {n: pairs[i][1] for n, i in found.items() if i is not None}


def totals(blocks: Blocks, leaves: Params) -> dict[str, float]:
  """Sum over each block's leaves of a tree of scalars.

  Raises:
    UsageError: if a block's pattern matches no name.
  """
  out = dict.fromkeys(blocks, 0.0)
  names = tree.names(leaves)
  owner = assign(blocks, names)
  for name, value in zip(names, jax.tree.leaves(leaves), strict=True):
    if name in owner:
      out[owner[name]] += float(value)
  return out
