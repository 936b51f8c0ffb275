"""Streaming linear discriminant analysis."""

import jax.numpy as jnp

from fmeta.continual.streaming import sums
from fmeta.continual.streaming.sums import Streaming
from fmeta.errors import UsageError
from fmeta.types import Array, Scalar


def slda(num_classes: int, dim: int, shrinkage: Scalar = 1e-4) -> Streaming:
  """Class means and one covariance; the nearest mean in its metric.

    score_c(x) = x' L m_c - m_c' L m_c / 2,
    L = ((1 - shrinkage) S + shrinkage I)^-1

  (Hayes & Kanan 2020, https://arxiv.org/abs/1909.01520.) Classes have equal
  priors. S is the pooled covariance within classes, with divisor n,

    S = 1/n (sum_i x_i x_i' - sum_c n_c m_c m_c'),

  a function of sums and so of the set of examples alone. The paper's S is
  another one: it adds t / (t + 1) (x - m)(x - m)' / (t + 1) for row t, with m
  the class's mean BEFORE the row, zero for a new class. That depends on the
  order, and a first example brings in its distance from the origin.

  In float32 the difference loses |m|^2 / variance of its seven digits. For
  features far from the origin, subtract one fixed vector, for example the mean
  of the first batch: answers are the same (`transformed`).

  Args:
    num_classes: C, of the whole stream.
    dim: D.
    shrinkage: in (0, 1]; may be traced. 1e-4 is that of the released code.

  Raises:
    UsageError: for a number outside (0, 1].
  """
  if isinstance(shrinkage, int | float) and not 0 < shrinkage <= 1:
    raise UsageError(f'slda shrinkage={shrinkage}; give one in (0, 1]')
  init, update = sums.moments(num_classes, dim)

  def solve(state):
    means = sums.means(state)
    values, vectors = jnp.linalg.eigh(within_covariance(state))
    # Below zero by rounding only, which would turn the metric round.
    values = (1 - shrinkage) * jnp.maximum(values, 0) + shrinkage
    turned = _product(means, vectors)
    kernel = _product(vectors, (turned / values[None, :]).T)
    bias = -0.5 * jnp.sum(turned**2 / values[None, :], axis=1)
    return sums.linear_head(kernel, bias, state['count'] > 0)

  return Streaming(init, update, solve, sums.linear_scores)


def within_covariance(state: dict[str, Array]) -> Array:
  """Pooled covariance within classes [D, D] of `moments`, divisor n."""
  scatter = state['second'] - _product(sums.means(state).T, state['sum'])
  count = state['count'].sum()
  return scatter / jnp.where(count > 0, count, 1)


def _product(a: Array, b: Array) -> Array:
  return jnp.matmul(a, b, precision='highest')
