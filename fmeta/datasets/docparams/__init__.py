"""docparams: what the scientific stack's documentation says of parameters.

A text is the description of one parameter in the numpydoc sections of numpy,
scipy, scikit-learn, matplotlib, pandas and networkx, read from the installed
wheels without importing them; its label is the declared type, normalised to
ten classes (`LABELS`). The type line is not part of the text. So the task is
to infer a type from its documentation. Beside text and label stand

- `name`, the parameter's name: names with 20 descriptions or more serve as
  classes of few-shot episodes;
- `package`, the distribution: a stream of domains with the same labels;
- `file`, the source file relative to site-packages, the unit in which
  differences between methods are bootstrapped.

Each text stands once: of equal texts the first copy (by package, then path)
is kept if all copies are declared with the same class, otherwise none. Files
are split 70/10/20 by the sha256 of their path, so no file is on both sides.
Rows are ordered by the sha256 of their text; the subsets are first rows.
"""

import hashlib
import importlib.metadata
import importlib.util
import pathlib
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import tensorflow_datasets as tfds

from fmeta.datasets import base
from fmeta.datasets.docparams import numpydoc
from fmeta.datasets.docparams.declared import LABELS, label_of
from fmeta.errors import UsageError

# Distribution -> its import packages, in the order that decides which of
# several equal texts is the first.
PACKAGES = {
  'numpy': ('numpy',),
  'scipy': ('scipy',),
  'scikit-learn': ('sklearn',),
  'matplotlib': ('matplotlib', 'mpl_toolkits'),
  'pandas': ('pandas',),
  'networkx': ('networkx',),
}
SUBSET = {'train': 4000, 'validation': 800, 'test': 2000}

# Tests document nothing, and `externals` are copies of other packages.
_SKIPPED = frozenset({'tests', 'externals'})
_MIN_WORDS = 3  # untuned; shorter ones are 'See above.' and the like


class Example(NamedTuple):
  """One labelled description."""

  text: str
  label: str
  name: str
  package: str
  file: str


class Docparams(base.Dataset):
  """Parameter descriptions of the scientific stack and their types."""

  VERSION = tfds.core.Version('1.0.0')
  FEATURES = {
    'text': tfds.features.Text(),
    'label': tfds.features.ClassLabel(names=LABELS),
    'name': tfds.features.Text(),
    'package': tfds.features.Text(),
    'file': tfds.features.Text(),
  }

  @classmethod
  def get_default_builder_config(cls):
    """Names the installed versions, so that other wheels are other records."""
    names = (f'{name}-{version}' for name, version in versions().items())
    return tfds.core.BuilderConfig(name='_'.join(names))

  def rows(self, files):
    """Every split's examples, in the order of the sha256 of their text."""
    del files  # the raw data are the installed wheels
    splits = {name: [] for name in SUBSET}
    for example in examples():
      splits[split_of(example.file)].append(example._asdict())
    for rows in splits.values():
      rows.sort(key=lambda row: _sha256(row['text']))
    return splits


def load(
  data_dir: base.PathLike | None = None,
  subset: bool = True,
  *,
  cache_dir: base.PathLike | None = None,
) -> dict[str, base.Columns]:
  """Loads docparams; the first call parses the wheels and takes a while.

  Args:
    data_dir: unused, there are no raw files; every `load` takes it.
    subset: keep the first 4,000 / 800 / 2,000 rows only.
    cache_dir: where records are kept, see `fmeta.datasets.base`.

  Returns:
    'train', 'validation', 'test' -> `text` object [N], `label` int32 [N],
    `name`, `package`, `file` object [N].

  Raises:
    UsageError: if one of the packages is not installed.
  """
  splits = base.load(Docparams(data_dir, cache_dir))
  if not subset:
    return splits
  return {
    split: {key: column[: SUBSET[split]] for key, column in columns.items()}
    for split, columns in splits.items()
  }


def examples() -> Iterator[Example]:
  """Every example, each text once, in the order of packages and paths."""
  by_text: dict[str, list[Example | None]] = {}
  for package in PACKAGES:
    for file, path in source_files(package):
      for entry in numpydoc.source_entries(path.read_text('utf-8')):
        label = label_of(entry.type)
        by_text.setdefault(entry.text, []).append(
          Example(entry.text, label, entry.name, package, file)
          if label
          else None
        )
  for text, copies in by_text.items():
    if len(text.split()) >= _MIN_WORDS and _agree(copies):
      assert copies[0] is not None
      yield copies[0]


def _agree(copies: list[Example | None]) -> bool:
  labels = {copy.label if copy else None for copy in copies}
  return len(labels) == 1 and None not in labels


def source_files(package: str) -> Iterator[tuple[str, pathlib.Path]]:
  """(path relative to site-packages, path) of a distribution's modules."""
  for module in PACKAGES[package]:
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
      raise _missing(package)
    root = pathlib.Path(next(iter(spec.submodule_search_locations)))
    paths = {path.relative_to(root.parent): path for path in root.rglob('*.py')}
    for relative in sorted(paths):
      if not _SKIPPED.intersection(relative.parts):
        yield relative.as_posix(), paths[relative]


def versions() -> dict[str, str]:
  """The installed version of every documented distribution.

  Raises:
    UsageError: naming the one that is missing.
  """
  found = {}
  for package in PACKAGES:
    try:
      found[package] = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError as error:
      raise _missing(package) from error
  return found


def split_of(file: str) -> str:
  """70 / 10 / 20 by the first 32 bits of the sha256 of a relative path."""
  place = int(_sha256(file)[:8], 16) / 2**32
  return 'train' if place < 0.7 else 'validation' if place < 0.8 else 'test'


def few_shot_names(names: Iterable[str], at_least: int = 20) -> list[str]:
  """Parameter names with enough descriptions to be few-shot classes."""
  unique, counts = np.unique(np.asarray(list(names), str), return_counts=True)
  return [str(name) for name in unique[counts >= at_least]]


def _sha256(text: str) -> str:
  return hashlib.sha256(text.encode()).hexdigest()


def _missing(package: str) -> UsageError:
  return UsageError(
    f'docparams reads the sources of {", ".join(PACKAGES)}, and {package} is '
    f'not installed; pip install {package}'
  )
