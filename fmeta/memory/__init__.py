"""What the data remember: fixed-size pytrees inside the train state."""

from fmeta.memory.class_balanced import class_balanced, merge_balanced, quotas
from fmeta.memory.herding import herding
from fmeta.memory.mix import append, beside
from fmeta.memory.per_task import per_task, task_rows
from fmeta.memory.ranked import bytes_of, occupied
from fmeta.memory.reservoir import merge, reservoir

__all__ = [
  'append',
  'beside',
  'bytes_of',
  'class_balanced',
  'herding',
  'merge',
  'merge_balanced',
  'occupied',
  'per_task',
  'quotas',
  'reservoir',
  'task_rows',
]
