"""How much a layer can still learn: units that are off, directions in use."""

import numpy as np
from numpy.typing import ArrayLike

from fmeta.errors import UsageError


def dormant_units(activations: ArrayLike, tau: float = 0.0) -> float:
  """Share of a layer's units that are tau-dormant.

  Unit i is dormant if its mean |h_i| over the examples is at most tau times
  the mean of that over the layer's units (Sokar et al. 2023,
  https://arxiv.org/abs/2302.12902). In a layer that is all zero every unit
  is.

  Args:
    activations: [N, units], after the nonlinearity.
    tau: at least 0; 0 counts the units that never fire.

  Raises:
    UsageError: for another shape or a negative tau.
  """
  if tau < 0:
    raise UsageError(f'tau={tau}; give at least 0')
  size = np.abs(_matrix(activations)).mean(axis=0)
  return float(np.mean(size <= tau * size.mean()))


def effective_rank(features: ArrayLike) -> float:
  """exp of the entropy of the singular values' shares; of zeros, 0.

  Between 1 and the rank (Roy & Vetterli 2007, "The effective rank: a measure
  of effective dimensionality"). Features are not centred.

  Args:
    features: [N, units].

  Raises:
    UsageError: for another shape.
  """
  share = _shares(features)
  share = share[share > 0]
  return float(np.exp(-np.sum(share * np.log(share)))) if share.size else 0.0


def srank(features: ArrayLike, delta: float = 0.01) -> int:
  """Fewest singular values that hold a share 1 - delta of their sum.

  srank_delta = min {k: sum_{i<=k} s_i / sum_i s_i >= 1 - delta} (Kumar et al.
  2021, https://arxiv.org/abs/2010.14498, who take delta = 0.01). Of zeros, 0.

  Args:
    features: [N, units].
    delta: in [0, 1).

  Raises:
    UsageError: for another shape or a delta outside [0, 1).
  """
  if not 0 <= delta < 1:
    raise UsageError(f'delta={delta}; give one in [0, 1)')
  share = _shares(features)
  # The sum of all shares may round below one.
  reached = np.cumsum(share) >= min(1 - delta, share.sum())
  return int(np.argmax(reached)) + 1 if share.any() else 0


def _matrix(values: ArrayLike) -> np.ndarray:
  matrix = np.asarray(values, np.float64)
  if matrix.ndim != 2 or matrix.size == 0:
    raise UsageError(
      f'activations of shape {matrix.shape}; give [N, units], neither empty'
    )
  return matrix


def _shares(features: ArrayLike) -> np.ndarray:
  singular = np.linalg.svd(_matrix(features), compute_uv=False)
  return singular / singular.sum() if singular.any() else singular
