"""Which classes a task may be made of, where classes are related."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from fmeta.errors import UsageError

Pools = tuple[np.ndarray, ...]


def by_group(
  members: Mapping[Any, np.ndarray], groups: np.ndarray, fewest: int
) -> Pools:
  """Classes (indices) by group, in the groups' sorted order.

  Args:
    members: class -> its row numbers.
    groups: [N], of each row.
    fewest: groups of fewer classes are left out.

  Raises:
    UsageError: if a class is in two groups, or no group is large enough.
  """
  for name, rows in members.items():
    if len(several := np.unique(groups[rows])) > 1:
      raise UsageError(
        f'class {name!r} is in the groups {several.tolist()}; give each class '
        'one, or the nodes of a hierarchy with the classes below them'
      )
  of_class = np.array([groups[rows[0]] for rows in members.values()])
  pools = [np.flatnonzero(of_class == name) for name in np.unique(of_class)]
  return _with_enough(pools, fewest)


def below_nodes(
  nodes: Mapping[Any, Iterable[Any]],
  classes: Sequence[Any],
  known: Iterable[Any],
  fewest: int,
) -> Pools:
  """Those of `classes` (indices) below each node, in the order of the nodes.

  Args:
    nodes: node -> all classes below it.
    classes: to draw from.
    known: all that have examples.
    fewest: nodes of fewer classes are left out.

  Raises:
    UsageError: if a class has no examples, or no node is large enough.
  """
  below = [set(np.asarray(list(given)).tolist()) for given in nodes.values()]
  unknown = set().union(*below) - set(known)
  if unknown:
    raise UsageError(
      f'the hierarchy has {len(unknown)} class(es) without examples, such as '
      f'{min(unknown, key=str)!r}; leave them out'
    )
  pools = [
    np.flatnonzero([name in given for name in classes]) for given in below
  ]
  return _with_enough(pools, fewest)


def _with_enough(pools: Sequence[np.ndarray], fewest: int) -> Pools:
  enough = tuple(pool for pool in pools if len(pool) >= fewest)
  if not enough:
    raise UsageError(
      f'no group has {fewest} classes, the largest has '
      f'{max(map(len, pools), default=0)}; lower min_ways'
    )
  return enough
