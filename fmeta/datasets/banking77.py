"""banking77: 77 intents of a bank's customers.

Casanueva et al. (2020), https://arxiv.org/abs/2003.04807; `train.csv` and
`test.csv` of the authors' repository (commit 57ec275), whose sha256 are
recorded. There is no validation split. Texts are left as published: 13 hold a
line break.
"""

import csv

import tensorflow_datasets as tfds

from fmeta.datasets import base, intents

_URL = (
  'https://raw.githubusercontent.com/PolyAI-LDN/task-specific-datasets/master/'
  'banking_data/'
)

NUM_INTENTS = 77


class Banking77(base.Dataset):
  """Questions to a bank and their intents."""

  VERSION = tfds.core.Version('1.0.0')
  FEATURES = {
    'text': tfds.features.Text(),
    'intent': tfds.features.Text(),
    'label': tfds.features.ClassLabel(num_classes=NUM_INTENTS),
  }
  RAW = {
    'train.csv': base.RawFile(
      _URL + 'train.csv',
      839073,
      'b06e26ac675513959a63135f11b94ea7786ed02da65db93a5650d8838cbc664b',
    ),
    'test.csv': base.RawFile(
      _URL + 'test.csv',
      239961,
      'd12d6e3bc4c3103966ae786dc435913c0c563dfa328f5a3646d0e62cfeeb474d',
    ),
  }

  def rows(self, files):
    """Examples in the order of the files; intents numbered by name."""
    splits = {
      name.removesuffix('.csv'): _lines(path) for name, path in files.items()
    }
    # Without case: one name begins with a capital.
    names = {row['category'] for row in splits['train']}
    order = sorted(names, key=str.lower)
    label = {name: index for index, name in enumerate(order)}
    return {
      split: [
        {
          'text': row['text'],
          'intent': row['category'],
          'label': label[row['category']],
        }
        for row in lines
      ]
      for split, lines in splits.items()
    }


def _lines(path) -> list[dict[str, str]]:
  with path.open(encoding='utf-8', newline='') as file:
    return list(csv.DictReader(file))


def load(
  data_dir: base.PathLike | None = None,
  *,
  cache_dir: base.PathLike | None = None,
) -> dict[str, base.Columns]:
  """Loads BANKING77.

  Args:
    data_dir: folder with `train.csv` and `test.csv`, or with a `banking77/`
      that holds them; else they are downloaded.
    cache_dir: where records are kept, see `fmeta.datasets.base`.

  Returns:
    'train' (10,003), 'test' (3,080) -> `text`, `intent` object [N]; `label`
    int32 [N], 0-76 in the order of the intents' names without case.

  Raises:
    UsageError: if a file is altered, or neither there nor to be downloaded.
  """
  return base.load(Banking77(data_dir, cache_dir))


def few_shot(
  splits: dict[str, base.Columns],
  shots: int,
  data_dir: base.PathLike | None = None,
) -> base.Columns:
  """`intents.few_shot` of this data set: 77 * shots rows."""
  return intents.few_shot('banking77', splits, shots, data_dir)


def episodic_folds(
  splits: dict[str, base.Columns],
  fold: int,
  data_dir: base.PathLike | None = None,
) -> dict[str, base.Columns]:
  """`intents.episodic_folds` of this data set: 25, 25 and 27 intents."""
  return intents.episodic_folds('banking77', splits, fold, data_dir)
