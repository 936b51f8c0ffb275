"""Controls: episodes whose accuracy must be chance, or something has leaked."""

import functools
import zlib
from collections.abc import Mapping

import numpy as np

from fmeta.draw import LABEL_SHUFFLE, permutation
from fmeta.episodes import Episode


def fingerprint(support: Mapping[str, np.ndarray], task: int) -> int:
  """A number that depends on all that a task's support holds."""
  return functools.reduce(
    lambda crc, name: zlib.crc32(support[name][task].tobytes(), crc),
    sorted(support),
    0,
  )


def shuffle_support_labels(episode: Episode, seed: int) -> Episode:
  """A control: each task's support labels are shuffled, queries stay true.

  What still beats 1/ways then has leaked. The shuffle is a function of
  (seed, the task's support): one shuffle for all episodes would have one
  number of fixed points, and an accuracy far from 1/ways.
  """
  support = episode['support']
  labels = support['label'].copy()
  for task in range(len(labels)):
    check = fingerprint(support, task)
    order = permutation(seed, LABEL_SHUFFLE, check, labels.shape[1])
    labels[task] = labels[task][order]
  return {**episode, 'support': {**support, 'label': labels}}


def rename_support_classes(episode: Episode, seed: int) -> Episode:
  """A control: a task's classes swap their labels in the support, at random.

  Queries stay true. Whatever the method and the shots, the expected accuracy
  is 1 / ways, and more has leaked. (To shuffle the rows' labels, as
  `shuffle_support_labels` does, is no control here: with unbalanced
  shots most rows of the largest class keep their label.) The permutation is
  uniform and a function of (seed, the task's support).

  Args:
    episode: with `label` and `weight` in its support.
    seed: of the permutations.
  """
  support = episode['support']
  labels = support['label'].copy()
  for task, given in enumerate(labels):
    ways = int(given[support['weight'][task] > 0].max()) + 1
    order = permutation(seed, LABEL_SHUFFLE, fingerprint(support, task), ways)
    labels[task] = order[given]
  return {**episode, 'support': {**support, 'label': labels}}
