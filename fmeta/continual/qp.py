"""Quadratic programs of a few nonnegative variables, exactly, inside jit.

An active-set method after Lawson & Hanson (1974, Solving Least Squares
Problems, chapter 23): variables enter a passive set one by one, where the
objective falls fastest, and leave it where they would become negative. The
answer is the solution of one linear system, so it is exact after finitely
many iterations and has a derivative (the passive set is locally constant).
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from fmeta.types import Array, Scalar


class Search(NamedTuple):
  """Where the search is; variables are named by bool [t].

  Attributes:
    passive: those that are not held at zero.
    entered: the one that entered last.
    held: the passive set that was solved last.
    barred: those that had to leave at once. Only rounding does that, where no
      v has slopes of zero (p is not in the range of Q): they stay at zero.
    at: [t], feasible.
    done: whether no variable wants to enter.
    count: iterations so far.
  """

  passive: Array
  entered: Array
  held: Array
  barred: Array
  at: Array
  done: Array
  count: Array


def nonnegative_qp(
  quadratic: Array,
  linear: Array,
  mask: Array | None = None,
  scale: Scalar = 0.0,
) -> Array:
  """argmin over v >= 0 of v'Qv / 2 + p'v for positive semidefinite Q.

  Q may be singular: a variable whose row depends on those of the passive set
  to within rounding stays zero. So one minimiser of many is returned, and it
  is finite even where rounding makes p inconsistent with Q. All is computed
  for rows of unit length (Q_ii = 1): rows of very different size do no harm.

  With eps the dtype's rounding, u_i = v_i sqrt(Q_ii) / s and the slopes
  w_i = (Qv + p)_i / (s sqrt(Q_ii)), the result satisfies u >= 0 and
  w_i >= -2 t eps (1 + sum u), and w_i is that small where u_i > 0. The
  exception are variables whose rows depend on those of others to a distance
  of sqrt(2 t eps): their slope may be that much below zero, in parts of the
  residual's length.

  Args:
    quadratic: Q, [t, t].
    linear: p, [t].
    mask: bool [t]; where it is false, v is zero and Q and p are not read.
    scale: at least s, the size of p_i / sqrt(Q_ii) whose rounding counts as
      zero; for p = G g the length of g. The largest of these by default.

  Returns:
    v, [t].
  """
  size = linear.shape[0]
  chex.assert_shape(quadratic, (size, size))
  mask = jnp.ones(size, bool) if mask is None else mask
  chex.assert_shape(mask, (size,))
  square = jax.lax.stop_gradient(jnp.diagonal(quadratic))
  present = mask & (square > 0)
  # Constants of the derivative: v does not depend on the scale.
  length = jnp.sqrt(jnp.where(present, square, 1))
  vector = jnp.where(present, linear, 0) / length
  scale = jnp.maximum(scale, jnp.abs(vector).max())
  scale = jax.lax.stop_gradient(scale).astype(vector.dtype)
  scale = jnp.where(scale > 0, scale, 1)
  both = _outer(present)
  matrix = jnp.where(both, quadratic, 0) / (length[:, None] * length[None])
  vector = vector / scale
  found = search(*jax.lax.stop_gradient((matrix, vector, present)))
  return _minimum(matrix, vector, found.held)[0] * scale / length


def _outer(mask):
  return mask[:, None] & mask[None]


def _minimum(matrix, vector, passive):
  """Over the passive variables; and how far each row is from their span.

  The second is squared, of rows of length one.
  """
  system = jnp.where(_outer(passive), matrix, jnp.eye(vector.shape[0]))
  rows = jnp.where(passive[:, None], matrix, 0)
  right = jnp.concatenate([-vector[:, None], rows], 1)
  right = jnp.where(passive[:, None], right, 0)
  # LU: a pivot that rounding makes negative is no square root of it.
  solved = jnp.linalg.solve(system.astype(right.dtype), right)
  return solved[:, 0], 1 - jnp.sum(rows * solved[:, 1:], 0)


def search(matrix: Array, vector: Array, present: Array) -> Search:
  """Where the search for the variables that are not zero ends.

  Args:
    matrix: Q of rows of length one, [t, t].
    vector: p, [t].
    present: bool [t].
  """
  size = vector.shape[0]
  rounding = 2 * size * jnp.finfo(vector.dtype).eps

  def advance(now):
    there, distance = _minimum(matrix, vector, now.passive)
    regular = jnp.isfinite(there).all()
    wrong = now.passive & (there <= 0) & regular
    slope = matrix @ there + vector
    solved = now._replace(held=now.passive, at=there)
    able = present & ~now.passive & ~now.barred & (distance > rounding)
    able &= slope < -rounding * (1 + there.sum())
    return jax.tree.map(
      lambda x, y, z: jnp.where(wrong.any(), x, jnp.where(regular, y, z)),
      _blocked(now, there, wrong),
      _entering(solved, slope, able),
      _rejected(now),
    )

  nobody = jnp.zeros(size, bool)
  start = Search(
    passive=nobody,
    entered=nobody,
    held=nobody,
    barred=nobody,
    at=jnp.zeros_like(vector),
    done=jnp.asarray(False),
    count=jnp.asarray(0),
  )
  # A bound that only rounding could meet: see the counts in the tests.
  unfinished = lambda now: ~now.done & (now.count < 10 * size)
  return jax.lax.while_loop(unfinished, advance, start)


def _blocked(now, there, wrong):
  """Goes on until a variable is zero, which leaves the passive set."""
  share = jnp.where(wrong, _share(now.at, there), 2)
  leave = wrong & (share <= share.min())
  return now._replace(
    passive=now.passive & ~leave,
    barred=now.barred | (leave & now.entered),
    at=now.at + share.min() * (there - now.at),
    count=now.count + 1,
  )


def _entering(now, slope, able):
  """The steepest variable joins a passive set that is solved."""
  steepest = jnp.argmin(jnp.where(able, slope, jnp.inf))
  enter = able & (jnp.arange(len(able)) == steepest)
  return now._replace(
    passive=now.passive | enter,
    entered=enter,
    done=~able.any(),
    count=now.count + 1,
  )


def _rejected(now):
  """What entered has made the system singular: back to before."""
  return now._replace(
    passive=now.held,
    barred=now.barred | now.entered,
    count=now.count + 1,
  )


def _share(at, there):
  """How much of the way each variable goes before it is negative."""
  return jnp.where(at > 0, at / jnp.where(at > 0, at - there, 1), 0)
