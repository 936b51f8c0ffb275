"""The names of docparams, split for the few-shot panel."""

import hashlib
from typing import Any

import numpy as np

from experiments.fewshot.text_task import Bench
from fmeta import data
from fmeta.datasets import docparams
from fmeta.workdir import Context

SPLITS = {'train': 0.6, 'validation': 0.75, 'test': 1.0}  # upper ends


def split_of(name: str) -> str:
  """60 / 15 / 25 by the first 32 bits of the name's sha256."""
  place = int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) / 2**32
  return next(split for split, end in SPLITS.items() if place < end)


def open_bench(config: Any, context: Context) -> Bench:
  """All texts whose name has `min_examples` of them, by `split_of`."""
  splits = docparams.load(subset=False)
  columns = {
    key: np.concatenate([splits[name][key] for name in splits])
    for key in ('text', 'name')
  }
  names = docparams.few_shot_names(columns['name'], config.min_examples)
  texts = data.take(columns, np.isin(columns['name'].astype(str), names))
  classes = {
    split: [name for name in names if split_of(name) == split]
    for split in SPLITS
  }
  return Bench(config, context, texts, classes)
