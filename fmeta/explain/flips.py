"""Examples whose predicted class is another one after fine-tuning."""

from typing import NamedTuple

import numpy as np

from fmeta.errors import UsageError


class Flip(NamedTuple):
  """One example that changed its class.

  Attributes:
    index: row of the example.
    label: its true class.
    before: class predicted before, and its probability.
    after: class predicted after, and its probability.
  """

  index: int
  label: int
  before: tuple[int, float]
  after: tuple[int, float]

  @property
  def kind(self) -> str:
    """'fixed', 'broken', or 'still wrong'."""
    if self.after[0] == self.label:
      return 'fixed'
    return 'broken' if self.before[0] == self.label else 'still wrong'


def flips(
  before: np.ndarray, after: np.ndarray, labels: np.ndarray
) -> list[Flip]:
  """Examples with another predicted class, the surest new answers first.

  Args:
    before: probabilities [N, C] of the model at its start.
    after: probabilities [N, C] of the fine-tuned one.
    labels: true classes [N].

  Raises:
    UsageError: if the shapes do not fit.
  """
  before, after = np.asarray(before), np.asarray(after)
  if before.shape != after.shape or before.shape[:1] != np.shape(labels):
    raise UsageError(
      f'probabilities {before.shape} and {after.shape} for labels '
      f'{np.shape(labels)}; give [N, C], [N, C] and [N]'
    )
  old, new = before.argmax(-1), after.argmax(-1)
  rows = np.flatnonzero(old != new)
  rows = rows[np.argsort(-after[rows, new[rows]], kind='stable')]
  return [
    Flip(
      int(i),
      int(labels[i]),
      (int(old[i]), float(before[i, old[i]])),
      (int(new[i]), float(after[i, new[i]])),
    )
    for i in rows
  ]
