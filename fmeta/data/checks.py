"""What a data set holds, as counts: one function per question.

All of them take `splits`: name -> columns, as in `reading.Source`, and give
plain numbers and arrays.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse

from fmeta.data import duplicates
from fmeta.data.columns import Texts

Splits = Mapping[str, Mapping[str, np.ndarray]]


class Unique(NamedTuple):
  """Examples without repetitions.

  Attributes:
    code: int64 [N], which unique example a row is; rows of all splits.
    first: int64 [U], a row of each unique example.
    split: int64 [N], the index of the row's split.
  """

  code: np.ndarray
  first: np.ndarray
  split: np.ndarray

  def counts(self, num_splits: int) -> np.ndarray:
    """Rows of each unique example in each split, int64 [U, S]."""
    flat = self.code * num_splits + self.split
    size = len(self.first) * num_splits
    return np.bincount(flat, minlength=size).reshape(-1, num_splits)


class Copies(NamedTuple):
  """Rows that stand in the data more than once; S splits.

  Attributes:
    equal: int64 [S, S]; at [a, b], a != b, rows of b that are equal to a row
      of a; at [a, a] rows of a beyond the first of equal ones.
    near: int64 [S, S]; at [a, b] rows of b that have a near-duplicate in a
      but, for a != b, no equal.
  """

  equal: np.ndarray
  near: np.ndarray


def pooled(splits: Splits, key: str) -> np.ndarray:
  """A column of all splits, one after the other."""
  return np.concatenate([columns[key] for columns in splits.values()])


def class_counts(splits: Splits, num_classes: int) -> np.ndarray:
  """Rows per split and class, int64 [S, C]."""
  return np.stack(
    [np.bincount(c['label'], minlength=num_classes) for c in splits.values()]
  )


def unique(splits: Splits, key: str) -> Unique:
  """Rows with the same text, letter by letter, or the same pixels."""
  values = pooled(splits, key)
  if values.dtype != object:
    flat = np.ascontiguousarray(values).reshape(len(values), -1)
    values = flat.view(np.dtype((np.void, flat[0].nbytes)))[:, 0]
  _, first, code = np.unique(values, return_index=True, return_inverse=True)
  sizes = [len(columns[key]) for columns in splits.values()]
  return Unique(code, first, np.repeat(np.arange(len(sizes)), sizes))


def copies(counts: np.ndarray, pairs: duplicates.Pairs) -> Copies:
  """Equal and nearly equal rows within and across splits.

  Args:
    counts: [U, S], from `Unique.counts`.
    pairs: of unique examples.
  """
  size = len(counts)
  ends = (pairs.first, pairs.second)
  graph = scipy.sparse.csr_array(
    (np.ones(len(pairs.first), int), ends), shape=(size, size)
  )
  present = counts > 0
  near = (graph + graph.T) @ present.astype(int) > 0
  equal_rows = present.T.astype(int) @ counts
  np.fill_diagonal(equal_rows, (counts - present).sum(0))
  near_rows = (near & ~present).T.astype(int) @ counts
  np.fill_diagonal(near_rows, (near * counts).sum(0))
  return Copies(equal_rows, near_rows)


def conflicts(
  values: Sequence[Any], labels: np.ndarray
) -> list[tuple[Any, np.ndarray]]:
  """Equal values that bear different labels, each with its rows.

  Args:
    values: [N], hashable; for texts their `duplicates.normalise`d form.
    labels: [N].
  """
  rows: dict[Any, list[int]] = {}
  for row, value in enumerate(values):
    rows.setdefault(value, []).append(row)
  return [
    (value, np.array(found))
    for value, found in rows.items()
    if len(found) > 1 and len(set(labels[found].tolist())) > 1
  ]


def words(text: str) -> list[str]:
  """Runs of letters and digits, lower case."""
  return re.findall(r'\w+', text.casefold())


def unseen_words(
  reference: Texts, texts: Texts
) -> tuple[float, float, list[tuple[str, int]]]:
  """How much of the vocabulary of texts the reference never shows.

  Returns:
    The share of distinct words, the share of running words, and the unseen
    words with their counts, the most frequent first.
  """
  seen = {word for text in reference for word in words(text)}
  counts = Counter(word for text in texts for word in words(text))
  unseen = {word: n for word, n in counts.items() if word not in seen}
  frequent = sorted(unseen.items(), key=lambda item: (-item[1], item[0]))
  return (
    len(unseen) / max(len(counts), 1),
    sum(unseen.values()) / max(counts.total(), 1),
    frequent,
  )


def shared_groups(splits: Splits) -> dict[tuple[str, str], list[str]]:
  """(split, later split) -> groups with rows in both."""
  groups = {name: set(c['group']) for name, c in splits.items()}
  names = list(groups)
  return {
    (a, b): sorted(groups[a] & groups[b])
    for i, a in enumerate(names)
    for b in names[i + 1 :]
    if groups[a] & groups[b]
  }


def summary(values: np.ndarray) -> dict[str, float]:
  """Minimum, median, mean, 95th and 99th percentile and maximum."""
  ends = np.percentile(values, [0, 50, 95, 99, 100])
  low, median, high, higher, top = map(float, ends)
  return {
    'min': low,
    'median': median,
    'mean': float(np.mean(values)),
    'p95': high,
    'p99': higher,
    'max': top,
  }
