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

from fmeta.types import Array


class _Search(NamedTuple):
  """Where the search is.

  Attributes:
    passive: bool [t], the variables that are not held at zero.
    barred: bool [t], those that entered and had to leave at once, which only
      rounding does; until the objective falls again.
    at: [t], feasible.
    best: the lowest objective of a solved passive set.
    last: the variable that entered last.
    done: whether no variable wants to enter.
    count: iterations so far.
  """

  passive: Array
  barred: Array
  at: Array
  best: Array
  last: Array
  done: Array
  count: Array


def nonnegative_qp(
  quadratic: Array, linear: Array, mask: Array | None = None
) -> Array:
  """argmin over v >= 0 of v'Qv / 2 + p'v for positive semidefinite Q.

  Q may be singular: a variable whose row depends on those of the passive set
  to within rounding stays zero. So one minimiser of many is returned, and it
  is finite even where rounding makes p inconsistent with Q. All is computed
  for rows of unit length (Q_ii = 1): rows of very different size do no harm.

  With eps the dtype's rounding and u_i = v_i sqrt(Q_ii) / s, where s is the
  largest |p_i| / sqrt(Q_ii), the result satisfies v >= 0 and the slopes
  w_i = (Qv + p)_i / (s sqrt(Q_ii)) are at least -2 t eps (1 + sum u), and
  that small where v_i > 0. The exception are variables left out for the
  dependence of their rows: there w_i is at least about -sqrt(2 t eps) times
  the length of the residual.

  Args:
    quadratic: Q, [t, t].
    linear: p, [t].
    mask: bool [t]; where it is false, v is zero and Q and p are not read.

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
  scale = jax.lax.stop_gradient(jnp.max(jnp.abs(vector)))
  scale = jnp.where(scale > 0, scale, 1)
  both = _outer(present)
  matrix = jnp.where(both, quadratic, 0) / (length[:, None] * length[None])
  vector = vector / scale
  passive = _passive_set(*jax.lax.stop_gradient((matrix, vector, present)))
  return _minimum(matrix, vector, passive)[0] * scale / length


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


def _passive_set(matrix, vector, present):
  size = vector.shape[0]
  rounding = 2 * size * jnp.finfo(vector.dtype).eps

  def advance(search):
    there, distance = _minimum(matrix, vector, search.passive)
    wrong = search.passive & (there <= 0)
    share = jnp.where(wrong, _share(search.at, there), 2)
    leave = wrong & (share <= share.min())
    blocked = search._replace(
      passive=search.passive & ~leave,
      at=jnp.where(leave, 0, _between(search.at, there, share.min())),
      barred=search.barred | (leave & search.last & (share <= 0)),
    )
    value = vector @ there / 2
    barred = search.barred & (value >= search.best)
    slope = -(matrix @ there + vector)
    able = present & ~search.passive & ~barred & (distance > rounding)
    able &= slope > rounding * (1 + there.sum())
    enter = jnp.arange(size) == jnp.argmax(jnp.where(able, slope, -jnp.inf))
    enter &= able
    solved = _Search(
      search.passive | enter,
      barred,
      there,
      jnp.minimum(value, search.best),
      enter,
      ~able.any(),
      search.count,
    )
    chosen = jax.tree.map(
      lambda x, y: jnp.where(wrong.any(), x, y), blocked, solved
    )
    return chosen._replace(count=search.count + 1)

  nobody = jnp.zeros(size, bool)
  start = _Search(
    passive=nobody,
    barred=nobody,
    at=jnp.zeros_like(vector),
    best=jnp.asarray(jnp.inf, vector.dtype),
    last=nobody,
    done=jnp.asarray(False),
    count=jnp.asarray(0),
  )
  # A bound that only rounding could meet; see the counts in the tests.
  unfinished = lambda search: ~search.done & (search.count < 10 * size)
  return jax.lax.while_loop(unfinished, advance, start).passive


def _share(at, there):
  """How much of the way each variable goes before it is negative."""
  return jnp.where(at > 0, at / jnp.where(at > 0, at - there, 1), 0)


def _between(at, there, share):
  return at + share * (there - at)
