"""Two methods on the same seeds and task orders."""

from collections.abc import Callable, Hashable, Mapping

from numpy.typing import ArrayLike

from fmeta.errors import UsageError
from fmeta.metrics.intervals import Interval, paired_t


def paired_difference(
  first: Mapping[Hashable, ArrayLike],
  second: Mapping[Hashable, ArrayLike],
  measure: Callable[[ArrayLike], float],
  interval: Callable[..., Interval] = paired_t,
) -> Interval:
  """`measure` of the first minus `measure` of the second, run by run.

    paired_difference(ewc, naive, average_accuracy)
    paired_difference(ewc, naive, forgetting_chaudhry, paired_bootstrap)

  Args:
    first: run -> its accuracy matrix (or what `measure` takes); a run is a
      seed, or a pair of seed and task order.
    second: of the same runs, in any order.
    measure: for example `average_accuracy`.
    interval: `paired_t`, for few runs, or `paired_bootstrap`.

  Raises:
    UsageError: if a run is missing on one side.
  """
  if not first:
    raise UsageError('no runs to compare; give at least two')
  for run in (*first, *second):
    if run not in first or run not in second:
      raise UsageError(
        f'run {run!r} is there for one method only; compare the same seeds and'
        ' orders'
      )
  values = [[measure(side[run]) for run in first] for side in (first, second)]
  return interval(*values)
