"""Early stopping: the best evaluation so far, and how long ago it was."""

import dataclasses
import math
from collections.abc import Mapping

from fmeta.errors import UsageError, suggest


@dataclasses.dataclass(frozen=True)
class Monitor:
  """Which number of an evaluation decides.

  Attributes:
    name: a key of the evaluation; higher is better, with a leading '-'
      (`-loss`) lower is.
    patience: evaluations in a row without improvement that end a stage;
      None never does.
    min_delta: an improvement is larger than this.
  """

  name: str
  patience: int | None = None
  min_delta: float = 0.0

  def value(self, evaluation: Mapping[str, float]) -> float:
    """The monitored number, so that higher is better.

    Raises:
      UsageError: if the evaluation does not report it.
    """
    key = self.name.removeprefix('-')
    if key not in evaluation:
      raise UsageError(
        f'monitor {self.name!r} is not in the evaluation'
        f'{suggest(key, evaluation)}'
      )
    value = float(evaluation[key])
    return -value if self.name.startswith('-') else value


@dataclasses.dataclass
class Best:
  """The best value of a stage; plain numbers, so that it can be saved."""

  value: float | None = None
  step: int | None = None
  waited: int = 0

  def update(self, monitor: Monitor, value: float, step: int) -> bool:
    """Takes in an evaluation and says whether it improves on the best.

    A value that is not a number never does.
    """
    least = -math.inf if self.value is None else self.value + monitor.min_delta
    if value > least:
      self.value, self.step, self.waited = value, step, 0
      return True
    self.waited += 1
    return False

  def exhausted(self, monitor: Monitor) -> bool:
    """Whether patience has run out."""
    return monitor.patience is not None and self.waited >= monitor.patience
