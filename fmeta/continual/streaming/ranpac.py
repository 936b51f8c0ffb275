"""Ridge regression to one-hot labels, and RanPAC: on random features."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import jax.scipy.linalg

from fmeta.continual.streaming import sums
from fmeta.continual.streaming.sums import Streaming
from fmeta.errors import UsageError
from fmeta.types import Array, Scalar

# Of the released code of RanPAC.
STRENGTHS = tuple(10.0**k for k in range(-8, 9))


def ridge(num_classes: int, dim: int, strength: Scalar) -> Streaming:
  """Least squares to one-hot labels, without a constant.

    scores(x) = x' (G + strength I)^-1 [s_1 ... s_C],  G = sum_i x_i x_i'

  with s_c the class's sum of rows. It is what RanPAC solves, on features as
  they are.

  Args:
    num_classes: C, of the whole stream.
    dim: D.
    strength: positive; may be traced. What is small against G's rounding
      gives NaN where G is singular; `choose_strength` never picks that.

  Raises:
    UsageError: for a number that is not positive.
  """
  if isinstance(strength, int | float) and strength <= 0:
    raise UsageError(f'ridge strength={strength}; give a positive one')
  init, update = sums.moments(num_classes, dim)

  def solve(state):
    diagonal = jnp.diag_indices(dim)
    gram = jnp.asarray(state['second']).at[diagonal].add(strength)
    kernel = jax.scipy.linalg.solve(gram, state['sum'].T, assume_a='pos')
    return sums.linear_head(kernel, jnp.zeros(num_classes), state['count'] > 0)

  return Streaming(init, update, solve, sums.linear_scores)


def random_features(
  rng: Array, dim: int, size: int
) -> Callable[[Array], Array]:
  """x -> relu(x W) with W [dim, size] of independent standard normals.

  W is drawn anew wherever this is traced, so it is neither saved nor summed
  when states are merged. A draw takes as long as the update by a batch of 32
  at size 2,000, a fifth of it at size 10,000 (dim 384, 2 busy CPU cores,
  2026-11-26): give large batches.
  """

  def transform(features):
    weights = jax.random.normal(rng, (dim, size))
    features = jnp.asarray(features, weights.dtype)
    return jax.nn.relu(jnp.matmul(features, weights, precision='highest'))

  return transform


def ranpac(
  num_classes: int, dim: int, size: int, rng: Array, strength: Scalar
) -> Streaming:
  """`ridge` on random features relu(x W).

  (McDonnell et al. 2023, https://arxiv.org/abs/2307.02251.) The state holds
  size * (size + C) + C numbers: 400 MB at the paper's size of 10,000.

  Args:
    num_classes: C, of the whole stream.
    dim: D.
    size: number of random features.
    rng: key of W; the same in every call about one state.
    strength: see `ridge`, and `choose_strength`.
  """
  return sums.transformed(
    ridge(num_classes, size, strength), random_features(rng, dim, size)
  )


def choose_strength(
  classifier: Callable[[Scalar], Streaming],
  state: dict[str, Array],
  features: Array,
  label: Array,
  *,
  weight: Array | None = None,
  strengths: Array | tuple[float, ...] = STRENGTHS,
) -> tuple[Array, Array]:
  """The strength with the least squared error on held-out rows.

  The released code of RanPAC holds out the last fifth of each task and fits on
  the rest of that task alone:

    make = lambda strength: ranpac(classes, dim, size, rng, strength)
    part = make(1.0).update(make(1.0).init(), features[:k], label[:k])
    strength, _ = choose_strength(make, part, features[k:], label[k:])

  Args:
    classifier: `strength -> Streaming`, of `ridge` or `ranpac`.
    state: sums over rows that are not held out; of this task, or all so far.
    features: [B, D] of the held-out rows.
    label: [B].
    weight: [B], 0 for padding; all ones by default.
    strengths: [K], positive; the smallest wins a tie if they ascend.

  Returns:
    The strength, and the mean over rows of the squared distance between
    scores and one-hot labels for each of `strengths` [K]; inf where the
    system cannot be solved in this precision.
  """
  strengths = jnp.asarray(strengths)
  weight = jnp.ones(len(label)) if weight is None else jnp.asarray(weight)

  def error(strength):
    scores = classifier(strength).scores(state, features)
    # A class that the state has not seen is predicted by zero.
    scores = jnp.where(jnp.isneginf(scores), 0, scores)
    target = jax.nn.one_hot(label, scores.shape[-1], dtype=scores.dtype)
    rows = jnp.sum((scores - target) ** 2, axis=-1)
    rows = jnp.where(weight > 0, rows, 0)  # padding may be NaN
    total = jnp.sum(weight * rows) / weight.sum()
    return jnp.where(jnp.isnan(total), jnp.inf, total)

  # One at a time: each has a system of its own, [dim, dim].
  errors = jax.lax.map(error, strengths)
  return strengths[errors.argmin()], errors
