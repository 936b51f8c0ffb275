"""What a method costs, beside what it achieves."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from fmeta import tree
from fmeta.errors import UsageError


@dataclasses.dataclass(frozen=True)
class Cost:
  """Of one run over a whole stream; None where it was not measured.

  Attributes:
    examples: seen in training, repetitions and replayed ones counted.
    flops: of all training steps; what a task's end computes is not in it.
    seconds: of training.
    memory_bytes: of remembered data and of what a penalty keeps.
    parameters_added: parameters beyond those of the model.
  """

  examples: float | None = None
  flops: float | None = None
  seconds: float | None = None
  memory_bytes: float | None = None
  parameters_added: float | None = None

  def __post_init__(self):
    for name, value in dataclasses.asdict(self).items():
      if value is not None and not value >= 0:
        raise UsageError(f'cost {name}={value}; give a number >= 0 or None')


def mean_cost(costs: Sequence[Cost]) -> Cost:
  """Mean over runs of each number that all of them have.

  Raises:
    UsageError: if there are no runs.
  """
  if not costs:
    raise UsageError('no costs to average; give at least one run')
  means = {}
  for field in dataclasses.fields(Cost):
    values = [getattr(cost, field.name) for cost in costs]
    if None not in values:
      means[field.name] = sum(values) / len(values)
  return Cost(**means)


def cost_of(
  fitted: Any,
  examples_per_step: int,
  parameters: int,
  seconds: float | None = None,
) -> Cost:
  """The cost of a `train.fit` with one kind of step.

  Args:
    fitted: what `fit` returned.
    examples_per_step: rows of a batch, and remembered rows that join it.
    parameters: of the model itself; the rest of `fitted.params` was added.
    seconds: of training.
  """
  flops = fitted.flops_per_step
  kept = (fitted.state.memory, fitted.state.penalty_state)
  return Cost(
    examples=fitted.steps * examples_per_step,
    flops=None if flops is None else fitted.steps * flops,
    seconds=seconds,
    memory_bytes=tree.num_bytes(kept),
    parameters_added=tree.size(fitted.params) - parameters,
  )
