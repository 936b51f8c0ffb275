"""What the splits hold: lengths, intensities, vocabulary and groups."""

from typing import Any

import numpy as np

from fmeta.data import checks
from fmeta.data.reading import Source

_SHOWN = 20  # words and groups that are listed
_BINS = 32


def lengths(source: Source, tokenizer: Any) -> dict[str, Any]:
  """Words, or tokens where there is a tokenizer, per text and split."""
  found, unknown = {}, {}
  for name, columns in source.splits.items():
    if tokenizer is None:
      found[name] = np.array([len(checks.words(t)) for t in columns['text']])
    else:
      coded = tokenizer.encode_batch_fast([str(t) for t in columns['text']])
      found[name] = np.array([len(e.ids) for e in coded])
      strange = sum(e.ids.count(tokenizer.token_to_id('[UNK]')) for e in coded)
      unknown[name] = strange / max(int(found[name].sum()), 1)
  out = {
    'unit': 'words' if tokenizer is None else 'tokens',
    'summary': {name: checks.summary(x) for name, x in found.items()},
    'empty': {
      name: sum(not t.strip() for t in c['text'])
      for name, c in source.splits.items()
    },
    'histogram': _histogram(found, whole=True),
  }
  return {**out, 'unknown_tokens': unknown} if tokenizer else out


def _histogram(values: dict[str, np.ndarray], whole: bool) -> dict[str, Any]:
  """Shares per bin and split; of whole numbers the last bin has no end."""
  together = np.concatenate(list(values.values()))
  low = float(together.min())
  high = float(np.percentile(together, 99.5 if whole else 100))
  step = (high - low) / _BINS
  if whole:
    low, step = np.floor(low), np.ceil(max(step, 1))
  edges = low + max(step, 1e-6) * np.arange(_BINS + 1)
  edges = edges[: max(int(np.searchsorted(edges, high, side='right')) + 1, 2)]
  shares = {}
  for name, x in values.items():
    counts, _ = np.histogram(np.minimum(x, edges[-1] - 1e-9), edges)
    shares[name] = counts / len(x)
  return {'edges': edges, 'shares': shares}


def unseen(source: Source, reference: str) -> dict[str, Any]:
  """Words of each other split that the reference never shows."""
  known = source.splits[reference]['text']
  out = {}
  for name, columns in source.splits.items():
    if name != reference:
      kinds, running, most = checks.unseen_words(known, columns['text'])
      out[name] = {
        'distinct': kinds,
        'running': running,
        'most': [list(item) for item in most[:_SHOWN]],
      }
  return out


def images(source: Source) -> dict[str, Any]:
  """Sizes and mean intensities of the images of each split."""
  means, sizes, constant = {}, {}, {}
  for name, columns in source.splits.items():
    flat = columns['image'].reshape(len(columns['image']), -1)
    means[name] = flat.mean(1, dtype=np.float64)
    sizes[name] = list(columns['image'].shape[1:])
    constant[name] = int((flat.max(1) == flat.min(1)).sum())
  return {
    'size': sizes,
    'constant': constant,
    'summary': {name: checks.summary(x) for name, x in means.items()},
    'histogram': _histogram(means, whole=False),
  }


def groups(source: Source) -> dict[str, Any]:
  """How many groups there are, and those that stand in two splits."""
  shared = checks.shared_groups(source.splits)
  return {
    'count': {k: len(set(c['group'])) for k, c in source.splits.items()},
    'shared': [[a, b, len(g), g[:_SHOWN]] for (a, b), g in shared.items()],
  }
