"""Streams of tasks: what continual learning moves through, in order.

A stream is a list of `Task`s: cut from labelled examples (`by_classes`,
`by_column`, `split_stream`), made of one set of images (`permuted`, `rotated`,
`corrupted`), or of several data sets (`of_datasets`); `blurry` mixes them.
Train on it task by task, in a single pass (`online`), or without boundaries
(`task_free`).

The boundary travels beside the batch, never in it: a column that tells the
task is there only if `numbered` or `with_allowed` put it there.
"""

from fmeta.stream.allowed import with_allowed
from fmeta.stream.blur import blurry
from fmeta.stream.classes import (
  Groups,
  Scenario,
  allowed_classes,
  class_mask,
  class_orders,
  task_order,
)
from fmeta.stream.corruptions import CORRUPTIONS
from fmeta.stream.images import corrupted, permuted, rotated
from fmeta.stream.order import (
  Flow,
  Span,
  drift_weights,
  online,
  task_free,
)
from fmeta.stream.tasks import (
  Task,
  by_classes,
  by_column,
  joint,
  numbered,
  of_datasets,
  split_stream,
)

__all__ = (
  'CORRUPTIONS',
  'Flow',
  'Groups',
  'Scenario',
  'Span',
  'Task',
  'allowed_classes',
  'blurry',
  'by_classes',
  'by_column',
  'class_mask',
  'class_orders',
  'corrupted',
  'drift_weights',
  'joint',
  'numbered',
  'of_datasets',
  'online',
  'permuted',
  'rotated',
  'split_stream',
  'task_free',
  'task_order',
  'with_allowed',
)
