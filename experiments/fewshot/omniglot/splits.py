"""Omniglot's characters, split before anything is done to their images."""

import os
from typing import Any

import numpy as np

import fmeta
from fmeta import data, draw, episodes
from fmeta.datasets import omniglot
from fmeta.workdir import Context

SPLITS = 'random', 'alphabets'


def load(
  config: Any, context: Context, *, turned: bool = True
) -> dict[str, dict]:
  """Images by split of the characters; those to train on in four turns.

  The split comes first: all turns of a character are on its side. Without
  `turned` those to train on are upright as well.
  """
  folder = context.data_dir or os.environ.get('FMETA_SHARED_DATA')
  splits = omniglot.load(folder)
  every = {
    key: np.concatenate([splits[name][key] for name in splits])
    for key in ('image', 'label', 'alphabet')
  }
  alphabets = every.pop('alphabet')
  _, first = np.unique(every['label'], return_index=True)
  train, validation, test = split_characters(config, alphabets[first])

  def rows(characters):
    return data.take(every, np.isin(every['label'], characters))

  upright = rows(train)
  return {
    'train': episodes.with_rotations(upright) if turned else upright,
    'validation': rows(validation),
    'test': rows(test),
  }


def split_characters(config: Any, alphabet: np.ndarray) -> list[np.ndarray]:
  """The characters to train on, to validate on and to test on.

  'random' cuts one random order of all characters (Finn et al. 2017), so a
  test character's alphabet has been trained on. 'alphabets' does so with whole
  alphabets: the first ones, until there are at least `train_characters`, then
  as many more as make `validation_characters`.

  Args:
    config: the task's.
    alphabet: [characters], of each.

  Raises:
    UsageError: if there is no such split, or too little is left to test on.
  """
  if config.split not in SPLITS:
    raise fmeta.UsageError(f'no split {config.split!r}; choose one of {SPLITS}')
  if min(config.train_characters, config.validation_characters) < 1:
    raise fmeta.UsageError(
      f'{config.train_characters} characters to train and '
      f'{config.validation_characters} to validate on; give at least 1 of each'
    )
  groups = np.arange(len(alphabet))
  if config.split == 'alphabets':
    groups = alphabet
  order = draw.permutation(config.split_seed, draw.EPOCH, 0, groups.max() + 1)
  # Characters in the order of their groups, and where each group ends.
  characters = np.argsort(np.argsort(order)[groups], kind='stable')
  ends = np.cumsum(np.bincount(groups)[order])
  wanted = config.train_characters
  cuts = [int(ends[np.searchsorted(ends, min(wanted, ends[-1]))])]
  wanted = min(cuts[0] + config.validation_characters, ends[-1])
  cuts.append(int(ends[np.searchsorted(ends, wanted)]))
  if cuts[1] + config.ways > len(alphabet):
    raise fmeta.UsageError(
      f'{cuts[1]} characters to train and validate on leave '
      f'{len(alphabet) - cuts[1]} of {len(alphabet)} to test on; '
      f'{config.ways} ways need more'
    )
  return np.split(characters, cuts)


def sha256(splits: dict[str, dict]) -> str:
  """Of all images and labels, split by split."""
  return data.fingerprint(
    {
      f'{split} {key}': column
      for split, columns in splits.items()
      for key, column in columns.items()
    }
  )
