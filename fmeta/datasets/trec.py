"""trec: questions and the kind of answer they ask for, six classes.

Li & Roth (2002), COLING C02-1150; the two files of the harvardnlp
sent-conv-torch repository (commit 656a7ea), one `label text` a line, whose
sha256 are recorded. There is no validation split.
"""

import tensorflow_datasets as tfds

from fmeta.datasets import base

_URL = (
  'https://raw.githubusercontent.com/harvardnlp/sent-conv-torch/master/data/'
)

# In the order of the files' numbers.
LABELS = (
  'description',
  'entity',
  'abbreviation',
  'human',
  'location',
  'number',
)

_FILES = {'train': 'TREC.train.all', 'test': 'TREC.test.all'}


class Trec(base.Dataset):
  """Questions and the kind of answer they ask for."""

  VERSION = tfds.core.Version('1.0.0')
  FEATURES = {
    'text': tfds.features.Text(),
    'label': tfds.features.ClassLabel(names=LABELS),
  }
  RAW = {
    'TREC.train.all': base.RawFile(
      _URL + 'TREC.train.all',
      292402,
      'c8183fd8c2a5cc4a9a1c56548d7c6410a8b71ed7843df9ef1f0a05cd7cf2fb3e',
    ),
    'TREC.test.all': base.RawFile(
      _URL + 'TREC.test.all',
      19479,
      '92a6a3cede5678b447ef5f1d7ec474134fcda211e6590e6fa627b4a2c68e4566',
    ),
  }

  def rows(self, files):
    """Examples in the order of the files."""
    return {
      split: [
        _row(line)
        for line in files[name].read_text('latin-1').split('\n')
        if line
      ]
      for split, name in _FILES.items()
    }


def _row(line: str) -> dict:
  label, text = line.split(' ', 1)
  return {'text': text.strip(), 'label': int(label)}


def load(
  data_dir: base.PathLike | None = None,
  *,
  cache_dir: base.PathLike | None = None,
) -> dict[str, base.Columns]:
  """Loads TREC-6.

  Args:
    data_dir: folder with the two files, or with a `trec/` that holds them;
      else they are downloaded.
    cache_dir: where records are kept, see `fmeta.datasets.base`.

  Returns:
    'train' (5,452), 'test' (500) -> `text` object [N], tokens separated by
    spaces; `label` int32 [N], indices of `LABELS`.

  Raises:
    UsageError: if a file is altered, or neither there nor to be downloaded.
  """
  return base.load(Trec(data_dir, cache_dir))
