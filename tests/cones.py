"""Random cones {z : G z >= 0} of up to 20 rows, and vectors outside them."""

import numpy as np
from scipy.optimize import lsq_linear, nnls

TASKS, SIZE = 20, 40


def _different_sizes(random, rows):
  return rows * 10.0 ** random.uniform(-6, 6, (len(rows), 1))


def _duplicates(random, rows):
  rows[random.integers(len(rows))] = rows[0]
  return rows


def _near_duplicates(random, rows):
  rows[-1] = rows[0] + 10.0 ** -random.integers(2, 8) * rows[-1]
  return rows


def _near_opposites(random, rows):
  rows[-1] = -rows[0] + 10.0 ** -random.integers(2, 5) * rows[-1]
  return rows


def _zero_rows(random, rows):
  rows[random.integers(len(rows), size=2)] = 0
  return rows


def _low_rank(random, rows):
  return rows[:, :4] @ random.normal(size=(4, rows.shape[1]))


def _opposed(random, rows):
  return rows + 3 * random.normal(size=rows.shape[1])


# Those whose rows do not nearly depend on one another come first.
WELL_CONDITIONED = {
  'random': lambda random, rows: rows,
  'opposed': _opposed,
  'different sizes': _different_sizes,
  'duplicates': _duplicates,
  'zero rows': _zero_rows,
}
KINDS = {
  **WELL_CONDITIONED,
  'low rank': _low_rank,
  'near duplicates': _near_duplicates,
  'near opposites': _near_opposites,
}


def draw(kind, number, seed=0):
  """`(G [number, 20, 40], present [number, 20], g [number, 40])`, float64.

  2 to 20 rows are present; the others are zero.
  """
  random = np.random.default_rng([seed, list(KINDS).index(kind)])
  cones = np.zeros((number, TASKS, SIZE))
  tasks = random.integers(2, TASKS + 1, number)
  vectors = random.normal(size=(number, SIZE))
  for cone, count, vector in zip(cones, tasks, vectors, strict=True):
    rows = random.normal(size=(count, SIZE))
    cone[:count] = KINDS[kind](random, rows)
    if kind == 'opposed':
      vector -= cone[:count].mean(0)
  return cones, np.arange(TASKS)[None] < tasks[:, None], vectors


def lengths(rows):
  found = np.linalg.norm(rows, axis=-1)
  return np.where(found > 0, found, 1)


def nearest(rows, vector, margin=0.0):
  """The vector of the cone that is nearest: g + G'v, v >= margin, by scipy.

  Of its two solvers the one that meets the constraints: with rows of low rank
  each of them fails at times.
  """
  units = rows / lengths(rows)[:, None]
  start = vector + margin * rows.sum(0)
  found = [
    start + units.T @ nnls(units.T, -start, maxiter=1000)[0],
    start + units.T @ lsq_linear(units.T, -start, (0, np.inf), 'bvls').x,
  ]
  return max(found, key=lambda moved: (units @ moved).min())
