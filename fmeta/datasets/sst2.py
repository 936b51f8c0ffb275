"""sst2: sentences of film reviews, negative or positive.

Socher et al. (2013), EMNLP D13-1170; whole sentences with the published
splits, as the clairett/pytorch-sentiment-classification repository (commit
457ffd8) has them, one `sentence TAB label` a line, whose sha256 are recorded.
Other builders' sst2 trains on phrases.
"""

import tensorflow_datasets as tfds

from fmeta.datasets import base

_URL = (
  'https://raw.githubusercontent.com/clairett/'
  'pytorch-sentiment-classification/master/data/SST2/'
)

LABELS = ('negative', 'positive')

_FILES = {'train': 'train.tsv', 'validation': 'dev.tsv', 'test': 'test.tsv'}


class Sst2(base.Dataset):
  """Sentences of film reviews and whether they praise."""

  VERSION = tfds.core.Version('1.0.0')
  FEATURES = {
    'text': tfds.features.Text(),
    'label': tfds.features.ClassLabel(names=LABELS),
  }
  RAW = {
    'train.tsv': base.RawFile(
      _URL + 'train.tsv',
      720259,
      'ec192f833a64da08f475488a77b0d0b47db47acd0f458bd18433fc793b569920',
    ),
    'dev.tsv': base.RawFile(
      _URL + 'dev.tsv',
      92057,
      'eddea6b39e601dd4e7a672b53cc40fdf6019fa80522f351206c24340ca5d9359',
    ),
    'test.tsv': base.RawFile(
      _URL + 'test.tsv',
      188749,
      '831169c7e2e429d6026e1bdbb542f33b636e3e596caad9602ebc953c205928b7',
    ),
  }

  def rows(self, files):
    """Examples in the order of the files."""
    return {
      split: [
        _row(line)
        for line in files[name].read_text('utf-8').split('\n')
        if line
      ]
      for split, name in _FILES.items()
    }


def _row(line: str) -> dict:
  text, label = line.rsplit('\t', 1)
  return {'text': text.strip(), 'label': int(label)}


def load(
  data_dir: base.PathLike | None = None,
  *,
  cache_dir: base.PathLike | None = None,
) -> dict[str, base.Columns]:
  """Loads SST-2.

  Args:
    data_dir: folder with the three files, or with an `sst2/` that holds them;
      else they are downloaded.
    cache_dir: where records are kept, see `fmeta.datasets.base`.

  Returns:
    'train' (6,920), 'validation' (872), 'test' (1,821) -> `text` object [N],
    `label` int32 [N], indices of `LABELS`.

  Raises:
    UsageError: if a file is altered, or neither there nor to be downloaded.
  """
  return base.load(Sst2(data_dir, cache_dir))
