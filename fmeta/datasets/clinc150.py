"""clinc150: 150 intents of ten domains, and questions out of scope.

Larson et al. (2019), EMNLP D19-1131; `data_full.json` and `domains.json` of
the authors' repository, whose sha256 (at commit 828f809) are recorded. Five
texts stand in two splits, four of them with two intents; they are left as
published.
"""

import json

import tensorflow_datasets as tfds

from fmeta.datasets import base, intents

_URL = 'https://raw.githubusercontent.com/clinc/oos-eval/master/data/'

NUM_INTENTS = 150
OUT_OF_SCOPE = NUM_INTENTS  # the label of out-of-scope texts

_SPLITS = {
  'train': 'train',
  'validation': 'val',
  'test': 'test',
  'oos_train': 'oos_train',
  'oos_validation': 'oos_val',
  'oos_test': 'oos_test',
}


class Clinc150(base.Dataset):
  """Requests to an assistant, their intents and the domains of those."""

  VERSION = tfds.core.Version('1.0.0')
  FEATURES = {
    'text': tfds.features.Text(),
    'intent': tfds.features.Text(),
    'domain': tfds.features.Text(),
    'label': tfds.features.ClassLabel(num_classes=NUM_INTENTS + 1),
  }
  RAW = {
    'data_full.json': base.RawFile(
      _URL + 'data_full.json',
      2495390,
      '36923c3705a59e08fe9c3883d8bc2dd966ef93e22cb78ac41171782a698d56e0',
    ),
    'domains.json': base.RawFile(
      _URL + 'domains.json',
      3818,
      'b947b579d3b8e74b06f93b01083d8efaff2888b43a3e362533bd88a6e1211b3a',
    ),
  }

  def rows(self, files):
    """Examples in the order of the file; intents numbered by name."""
    data = json.loads(files['data_full.json'].read_text('utf-8'))
    domains = json.loads(files['domains.json'].read_text('utf-8'))
    domain = {name: key for key, names in domains.items() for name in names}
    label = {name: index for index, name in enumerate(sorted(domain))}
    return {
      split: [
        {
          'text': text,
          'intent': intent,
          'domain': domain.get(intent, 'oos'),
          'label': label.get(intent, OUT_OF_SCOPE),
        }
        for text, intent in data[key]
      ]
      for split, key in _SPLITS.items()
    }


def load(
  data_dir: base.PathLike | None = None,
  *,
  cache_dir: base.PathLike | None = None,
) -> dict[str, base.Columns]:
  """Loads CLINC150.

  Args:
    data_dir: folder with `data_full.json` and `domains.json`, or with a
      `clinc150/` that holds them; else they are downloaded.
    cache_dir: where records are kept, see `fmeta.datasets.base`.

  Returns:
    'train' (15,000), 'validation' (3,000), 'test' (4,500), 'oos_train' (100),
    'oos_validation' (100), 'oos_test' (1,000) -> `text`, `intent`, `domain`
    object [N]; `label` int32 [N], 0-149 in the order of the intents' names,
    150 out of scope.

  Raises:
    UsageError: if a file is altered, or neither there nor to be downloaded.
  """
  return base.load(Clinc150(data_dir, cache_dir))


def few_shot(
  splits: dict[str, base.Columns],
  shots: int,
  data_dir: base.PathLike | None = None,
) -> base.Columns:
  """`intents.few_shot` of this data set: 150 * shots rows."""
  return intents.few_shot('clinc150', splits, shots, data_dir)


def episodic_folds(
  splits: dict[str, base.Columns],
  fold: int,
  data_dir: base.PathLike | None = None,
) -> dict[str, base.Columns]:
  """`intents.episodic_folds` of this data set: 50 intents in each split."""
  return intents.episodic_folds('clinc150', splits, fold, data_dir)
