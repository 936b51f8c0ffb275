"""Everything the report says of a data set, as one JSON-able dict.

`measure(source)` is pure; `fmeta.data.findings` puts it into words,
`fmeta.data.pictures` and `fmeta.data.page` draw it.
"""

import dataclasses
from typing import Any

import numpy as np

from fmeta.data import checks, contents, duplicates, label_errors
from fmeta.data.reading import Source
from fmeta.errors import UsageError

_SHOWN = 20  # examples of each kind that are listed
# Rows x features x classes of a dense problem above which label errors are
# not looked for: about ten minutes on one core (untuned).
_MOST_WORK = 2e10


@dataclasses.dataclass(frozen=True)
class Options:
  """What one may change about the report.

  Attributes:
    reference: the split that others are compared with; None: 'train', or the
      first split where there is none.
    threshold: of text similarity, see `duplicates.near_texts`.
    folds: of the search for label errors; 0 leaves it out.
    seed: of the folds and the solver.
    tokenizer: counts tokens instead of words (`text.load_tokenizer`).
    features: [rows of all splits, D] instead of TF-IDF or pixels.
    features_are: what they are, in words.
  """

  reference: str | None = None
  threshold: float = duplicates.TEXT_THRESHOLD
  folds: int = 5
  seed: int = 0
  tokenizer: Any = None
  features: np.ndarray | None = None
  features_are: str = 'the given features'


def measure(source: Source, options: Options | None = None) -> dict[str, Any]:
  """Measures balance, sizes, copies, conflicts, vocabulary, groups, labels.

  Args:
    source: the data set.
    options: see `Options`.

  Returns:
    A dict of numbers, names and lists, ready for `json.dumps` but for numpy
    scalars and arrays.

  Raises:
    UsageError: if an option does not fit the data.
  """
  options = options or Options()
  reference = _reference(source, options.reference)
  counts = checks.class_counts(source.splits, len(source.classes))
  unique = checks.unique(source.splits, source.kind)
  out = {
    'name': source.name,
    'kind': source.kind,
    'reference': reference,
    'splits': {k: len(c['label']) for k, c in source.splits.items()},
    'classes': list(source.classes),
    'balance': dict(zip(source.splits, counts.tolist(), strict=True)),
    'copies': _copies(source, unique, options),
    'conflicts': _conflicts(source, unique),
    'label_errors': _label_errors(source, unique, options),
  }
  if source.kind == 'text':
    out['lengths'] = contents.lengths(source, options.tokenizer)
    out['unseen'] = contents.unseen(source, reference)
  else:
    out['images'] = contents.images(source)
  if source.grouped:
    out['groups'] = contents.groups(source)
  return out


def _reference(source: Source, name: str | None) -> str:
  names = list(source.splits)
  if name is None:
    return 'train' if 'train' in names else names[0]
  if name not in names:
    raise UsageError(f'no split {name!r} to compare with; possible: {names}')
  return name


class _Rows:
  """Row number of all splits together -> where it is and what it holds."""

  def __init__(self, source: Source):
    self.names = list(source.splits)
    sizes = [len(c['label']) for c in source.splits.values()]
    self.starts = np.concatenate([[0], np.cumsum(sizes)])
    self.labels = checks.pooled(source.splits, 'label')
    self.classes = source.classes
    text = source.kind == 'text'
    self.texts = checks.pooled(source.splits, 'text') if text else None

  def describe(self, row: Any) -> dict[str, Any]:
    """Split, row within it, label and, for texts, the text."""
    index = int(np.searchsorted(self.starts, row, side='right')) - 1
    out = {
      'split': self.names[index],
      'row': int(row - self.starts[index]),
      'label': self.classes[self.labels[row]],
    }
    return out if self.texts is None else {**out, 'text': self.texts[row]}


def _copies(source: Source, unique: checks.Unique, options: Options) -> dict:
  values = checks.pooled(source.splits, source.kind)[unique.first]
  if source.kind == 'text':
    pairs = duplicates.near_texts(values, options.threshold)
    rule = {'threshold': options.threshold, 'shingle': duplicates.SHINGLE}
  else:
    pairs = duplicates.near_images(values)
    rule = {
      'threshold': duplicates.IMAGE_THRESHOLD,
      'bits': duplicates.IMAGE_BITS,
    }
  found = checks.copies(unique.counts(len(source.splits)), pairs)
  return {
    'rule': rule,
    'equal': found.equal,
    'near': found.near,
    'equal_pairs': _equal_examples(source, unique),
    'near_pairs': _near_examples(source, unique, pairs),
  }


def _equal_examples(source: Source, unique: checks.Unique) -> list[list[dict]]:
  """Two rows each of repeated examples, those across splits first."""
  rows = _Rows(source)
  order = np.argsort(unique.code, kind='stable')
  same = unique.code[order][1:] == unique.code[order][:-1]
  first, second = order[:-1][same], order[1:][same]
  across = unique.split[first] != unique.split[second]
  best = np.argsort(~across, kind='stable')[:_SHOWN]
  return [[rows.describe(first[k]), rows.describe(second[k])] for k in best]


def _near_examples(
  source: Source, unique: checks.Unique, pairs: duplicates.Pairs
) -> list[list[Any]]:
  """Similarity and a row each, across splits first, then the most similar."""
  rows = _Rows(source)
  first, second = unique.first[pairs.first], unique.first[pairs.second]
  across = unique.split[first] != unique.split[second]
  first, second = np.minimum(first, second), np.maximum(first, second)
  best = np.lexsort((-pairs.similarity, ~across))[:_SHOWN]
  return [
    [
      float(pairs.similarity[k]),
      rows.describe(first[k]),
      rows.describe(second[k]),
    ]
    for k in best
  ]


def _conflicts(source: Source, unique: checks.Unique) -> dict[str, Any]:
  rows = _Rows(source)
  values = unique.code.tolist()
  if rows.texts is not None:
    # A text without a word conflicts with itself alone.
    values = [
      duplicates.normalise(text) or code
      for text, code in zip(rows.texts, values, strict=True)
    ]
  found = checks.conflicts(values, rows.labels)
  examples = [[rows.describe(row) for row in some] for _, some in found]
  return {
    'values': len(found),
    'rows': sum(len(some) for _, some in found),
    'examples': examples[:_SHOWN],
  }


def _label_errors(
  source: Source, unique: checks.Unique, options: Options
) -> dict[str, Any]:
  rows = _Rows(source)
  features, what = _features(source, options)
  reason = _too_much(features, options.folds, len(source.classes))
  if reason:
    return {'left_out': reason}
  groups = unique.code
  if source.grouped:
    groups = checks.pooled(source.splits, 'group').astype(str)
  probabilities = label_errors.out_of_fold(
    features, rows.labels, groups, options.folds, options.seed
  )
  found, suggested = label_errors.confident_errors(probabilities, rows.labels)
  right = probabilities.argmax(1) == rows.labels
  own = probabilities[found, rows.labels[found]]
  listed = [
    {
      **rows.describe(row),
      'confidence': float(p),
      'suggested': source.classes[other],
      'suggested_confidence': float(probabilities[row, other]),
    }
    for row, other, p in zip(found, suggested, own, strict=True)
  ]
  return {
    'features': what,
    'folds': options.folds,
    'accuracy': float(right.mean()),
    'count': len(found),
    'by_split': {
      name: sum(item['split'] == name for item in listed)
      for name in source.splits
    },
    'pairs': _most_confused(rows.labels[found], suggested, source.classes),
    'found': listed,
  }


def _features(source: Source, options: Options) -> tuple[Any, str]:
  values = checks.pooled(source.splits, source.kind)
  if options.features is not None:
    features = np.asarray(options.features)
    if features.ndim != 2 or len(features) != len(values):
      raise UsageError(
        f'features have shape {features.shape}; give one row for each of the '
        f'{len(values)} rows of all splits, in their order'
      )
    if not np.isfinite(features).all():
      raise UsageError('features hold NaN or infinity; give finite numbers')
    return label_errors.scaled(features), options.features_are
  if source.kind == 'text':
    return label_errors.tfidf(values), 'TF-IDF of words and word pairs'
  return label_errors.scaled(values.reshape(len(values), -1)), 'pixels'


def _too_much(features: Any, folds: int, num_classes: int) -> str:
  if folds == 0:
    return 'folds is 0'
  if num_classes < 2:
    return 'there is one class'
  work = features.shape[0] * features.shape[1] * num_classes
  if isinstance(features, np.ndarray) and work > _MOST_WORK:
    size = ' x '.join(f'{n:,}' for n in (*features.shape, num_classes))
    return f'{size} (rows, features, classes) would take too long'
  return ''


def _most_confused(labels, suggested, classes) -> list[list[Any]]:
  codes, counts = np.unique(
    labels * len(classes) + suggested, return_counts=True
  )
  best = np.argsort(-counts, kind='stable')[:_SHOWN]
  return [
    [classes[codes[k] // len(classes)], classes[codes[k] % len(classes)]]
    + [int(counts[k])]
    for k in best
  ]
