"""Shape checks whose messages say what to give."""

import numpy as np
from numpy.typing import ArrayLike

from fmeta.errors import UsageError


def vector(values: ArrayLike, name: str) -> np.ndarray:
  """`values` as a non-empty array [N], or a `UsageError`."""
  array = np.asarray(values)
  if array.ndim != 1 or array.size == 0:
    raise UsageError(
      f'{name} has shape {array.shape}; give one non-empty axis [N]'
    )
  return array


def finite_vector(values: ArrayLike, name: str) -> np.ndarray:
  """`values` as floats [N] without NaN or infinity, or a `UsageError`."""
  array = vector(values, name).astype(np.float64)
  wrong = np.flatnonzero(~np.isfinite(array))
  if wrong.size:
    raise UsageError(
      f'{name}[{wrong[0]}] is {array[wrong[0]]}; give finite numbers'
    )
  return array


def same_length(first: np.ndarray, second: np.ndarray, what: str) -> None:
  """Refuses two arrays of different length."""
  if len(first) != len(second):
    raise UsageError(
      f'{what} have lengths {len(first)} and {len(second)}; '
      'give one entry per example in each'
    )
