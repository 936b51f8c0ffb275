"""Data: columns in memory, batches of them, splits, and a look at them first.

`python -m fmeta.data report ...` (`fmeta.data.report`) and the augmentations
(`fmeta.data.augment`, `augment_images`, `augment_text`) are modules of their
own: importing `fmeta.data` loads neither matplotlib nor scikit-learn.
"""

from fmeta.data.batching import (
  Batches,
  Collate,
  batches,
  check_batch_size,
  eval_batches,
  prefetch,
  rows_of_process,
)
from fmeta.data.columns import (
  ROW,
  Columns,
  check_columns,
  check_labels,
  column,
  fingerprint,
  numeric,
  take,
)
from fmeta.data.splits import grouped, hashed, stratified, stratified_grouped

__all__ = (
  'ROW',
  'Batches',
  'Collate',
  'Columns',
  'batches',
  'check_batch_size',
  'check_columns',
  'check_labels',
  'column',
  'eval_batches',
  'fingerprint',
  'grouped',
  'hashed',
  'numeric',
  'prefetch',
  'rows_of_process',
  'stratified',
  'stratified_grouped',
  'take',
)
