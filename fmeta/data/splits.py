"""Train, validation and test rows as functions of (columns, fractions, seed).

Each function gives `name -> rows`, int64 and ascending; `data.take` makes
columns of them. `stratified` keeps class shares; `grouped` and `hashed` keep
groups (files, speakers, users) whole and do not depend on the order of rows;
`stratified_grouped` does both as well as it can. Groups are ordered by the
sha256 of seed and name, so other machines and other files agree.
"""

import hashlib
import math
from collections.abc import Mapping

import numpy as np

from fmeta.data.columns import Columns, check_columns, column
from fmeta.draw import SPLIT, permutation
from fmeta.errors import UsageError

Rows = dict[str, np.ndarray]
Fractions = Mapping[str, float]


def stratified(
  columns: Columns, fractions: Fractions, seed: int, *, by: str = 'label'
) -> Rows:
  """Random rows, with every class in every split in nearly its share.

  A split gets floor(f n) or ceil(f n) of the n rows of a class, and at least
  one, which may cost a larger split of a rare class a row more. Roundings of
  one class are made up for in the next, so splits keep their sizes, too.

  Args:
    columns: N examples.
    fractions: name -> share, positive and with sum 1.
    seed: of the choice within each class.
    by: the column of classes.

  Raises:
    UsageError: for bad fractions, or a class with fewer rows than splits.
  """
  size, shares = check_columns(columns), _check(fractions)
  names, codes = np.unique(column(columns, by).astype(str), return_inverse=True)
  counts = np.bincount(codes)
  _check_enough(names, counts, len(shares), 'rows')
  shuffled = permutation(seed, SPLIT, 0, size)
  place = np.empty(size, np.int64)
  debt = np.zeros(len(shares))
  for code, count in enumerate(counts):
    given = _apportion(count, shares, debt)
    debt += count * shares - given
    rows = shuffled[codes[shuffled] == code]
    place[rows] = np.repeat(np.arange(len(shares)), given)
  return _rows(fractions, place)


def _apportion(count: int, shares: np.ndarray, debt: np.ndarray) -> np.ndarray:
  """Integers >= 1 of sum `count` beside `count * shares`, int64 [K]."""
  target = count * shares
  given = np.maximum(np.floor(target + 1e-9), 1).astype(np.int64)
  while given.sum() < count:
    # Nobody gets two more than the floor before everybody has one.
    open_ = target - given > 1e-9
    given[np.argmax(np.where(open_, target - given + debt, -np.inf))] += 1
  while given.sum() > count:
    given[np.argmax(np.where(given > 1, given - target, -np.inf))] -= 1
  return given


def grouped(
  columns: Columns, fractions: Fractions, seed: int, *, by: str = 'group'
) -> Rows:
  """Whole groups, in the order of their sha256, until a split has its share.

  The borders between splits are off by at most half the largest group.
  A function of the set of rows: their order does not matter. New groups may
  move the borders; see `hashed` where data will grow.

  Args:
    columns: N examples.
    fractions: name -> share of rows, positive and with sum 1.
    seed: goes into the sha256.
    by: the column of groups.

  Raises:
    UsageError: for bad fractions, or a split that is left without a group.
  """
  check_columns(columns)
  shares = _check(fractions)
  names, codes = _groups(columns, by)
  sizes = np.bincount(codes)
  order = _hash_order(names, seed)
  # The share of rows that stand before the middle of each group.
  middle = (np.cumsum(sizes[order]) - sizes[order] / 2) / len(codes)
  place = np.empty(len(names), np.int64)
  place[order] = _interval(middle, shares)
  _check_all_filled(place, fractions, len(names))
  return _rows(fractions, place[codes])


def hashed(
  columns: Columns, fractions: Fractions, seed: int, *, by: str = 'group'
) -> Rows:
  """Whole groups, each by its own sha256 alone.

  A group keeps its split whatever rows or groups are added or removed; the
  price is that shares hold only on average.

  Args:
    columns: N examples.
    fractions: name -> probability, positive and with sum 1.
    seed: goes into the sha256.
    by: the column of groups.

  Raises:
    UsageError: for bad fractions, or a split that is left without a group.
  """
  check_columns(columns)
  shares = _check(fractions)
  names, codes = _groups(columns, by)
  point = np.array([_hash(name, seed) / 2**64 for name in names])
  place = _interval(point, shares)
  _check_all_filled(place, fractions, len(names))
  return _rows(fractions, place[codes])


def stratified_grouped(
  columns: Columns,
  fractions: Fractions,
  seed: int,
  *,
  by: str = 'label',
  group: str = 'group',
) -> Rows:
  """Whole groups, placed so that every class keeps its share where possible.

  Groups with the most uneven classes come first (ties by sha256), each goes
  to the split that makes sum_{split, class} (have - share n_c)^2 / n_c^2
  smallest: the greedy rule of scikit-learn's `StratifiedGroupKFold`, with
  unequal shares. The order of rows does not matter.

  Args:
    columns: N examples.
    fractions: name -> share, positive and with sum 1.
    seed: breaks ties between groups.
    by: the column of classes.
    group: the column of groups.

  Raises:
    UsageError: for bad fractions, a class in fewer groups than splits, or a
      split that is left without a group.
  """
  check_columns(columns)
  shares = _check(fractions)
  names, codes = _groups(columns, group)
  classes, labels = np.unique(
    column(columns, by).astype(str), return_inverse=True
  )
  table = np.zeros((len(names), len(classes)))
  np.add.at(table, (codes, labels), 1)
  _check_enough(classes, (table > 0).sum(0), len(shares), f'{group}s')
  order = _hash_order(names, seed)
  order = order[np.argsort(-table[order].std(1), kind='stable')]
  place = np.empty(len(names), np.int64)
  place[order] = _place_greedily(table[order], shares)
  _check_all_filled(place, fractions, len(names))
  return _rows(fractions, place[codes])


def _place_greedily(table: np.ndarray, shares: np.ndarray) -> np.ndarray:
  """The split of each group; table [G, C] counts rows, shares [K]."""
  relative = table / table.sum(0)
  missing = np.repeat(shares[:, None], table.shape[1], 1)
  place = np.empty(len(table), np.int64)
  for index, row in enumerate(relative):
    # |missing - row|^2 - |missing|^2 without the term all splits share.
    place[index] = np.argmax(missing @ row)
    missing[place[index]] -= row
  return place


def _check(fractions: Fractions) -> np.ndarray:
  values = np.array(list(fractions.values()), float)
  whole = math.isclose(values.sum(), 1, abs_tol=1e-6)
  if len(values) < 2 or not whole or not (values > 0).all():
    raise UsageError(
      f'fractions {dict(fractions)} sum to {values.sum():g}; give two or more '
      "positive ones of sum 1, as in {'train': 0.8, 'test': 0.2}"
    )
  return values


def _check_enough(names, counts, needed: int, what: str) -> None:
  scarce = int(np.argmin(counts))
  if counts[scarce] < needed:
    raise UsageError(
      f'class {str(names[scarce])!r} has {counts[scarce]} {what} for {needed} '
      'splits; merge or drop the class, or make fewer splits'
    )


def _check_all_filled(place, fractions: Fractions, num_groups: int) -> None:
  sizes = np.bincount(place, minlength=len(fractions))
  if not sizes.all():
    empty = list(fractions)[int(np.argmin(sizes))]
    raise UsageError(
      f'split {empty!r} (share {fractions[empty]:g}) gets none of the '
      f'{num_groups} groups; give it a larger share, use more groups or '
      'another seed'
    )


def _groups(columns: Columns, by: str) -> tuple[np.ndarray, np.ndarray]:
  return np.unique(column(columns, by).astype(str), return_inverse=True)


def _hash(name: str, seed: int) -> int:
  digest = hashlib.sha256(f'{seed}/{name}'.encode()).digest()
  return int.from_bytes(digest[:8], 'big')


def _hash_order(names: np.ndarray, seed: int) -> np.ndarray:
  keys = np.array([_hash(name, seed) for name in names], np.uint64)
  return np.argsort(keys, kind='stable')


def _interval(points: np.ndarray, shares: np.ndarray) -> np.ndarray:
  """Which of the consecutive intervals of [0, 1) each point lies in."""
  return np.searchsorted(np.cumsum(shares)[:-1], points, side='right')


def _rows(fractions: Fractions, place: np.ndarray) -> Rows:
  return {
    name: np.flatnonzero(place == index) for index, name in enumerate(fractions)
  }
