"""Heads that learn a task in closed form, as differentiable functions.

A head maps a task's embedded support set and queries to logits, in one
function on one task; `vmap` gives episodes:

  head(support [S, D], labels [S], queries [Q, D], ways, weight [S] or None)
    -> logits [Q, ways]

`baselines.nearest_mean_cosine`, the baseline of a frozen encoder, is one too.
`ways` is static. A support row of weight zero is padding and changes
nothing; a class without a row of positive weight gets -inf, so it is never
predicted and takes no probability. With the two, tasks of any number of ways
and shots share one shape (`fmeta.fewshot.varied_episodes`).

Hyper-parameters are arguments of a factory and may be traced; to learn them
give `Learned(hyper -> head)` to `head_loss`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fmeta.baselines import class_means, nearest_mean_euclid, unit_length
from fmeta.errors import UsageError
from fmeta.types import Array, Params, Scalar

# (support, labels, queries, ways, weight=None) -> logits [Q, ways]
Head = Callable[..., Array]


class Learned(NamedTuple):
  """A head whose hyper-parameters are outer parameters.

  Attributes:
    head_of: `hyper -> head`.
  """

  head_of: Callable[[Any], Head]


def check_task(
  support: Array, labels: Array, queries: Array, weight: Array | None
) -> None:
  """Refuses arrays that are no task.

  Raises:
    UsageError: if ranks, widths or numbers of rows do not fit.
  """
  shapes = [jnp.shape(x) for x in (support, labels, queries)]
  (rows, width), asked = shapes[0][:2] or (0, 0), shapes[2]
  fits = (
    list(map(len, shapes)) == [2, 1, 2]
    and shapes[1] == (rows,)
    and asked[1] == width
    and (weight is None or jnp.shape(weight) == (rows,))
  )
  if not fits:
    raise UsageError(
      f'support {shapes[0]}, labels {shapes[1]}, queries {shapes[2]}, weight '
      f'{None if weight is None else jnp.shape(weight)} are no task; give '
      '[S, D], [S], [Q, D] and [S], one task at a time (vmap for more)'
    )


def members(
  labels: Array, ways: int, weight: Array | None, dtype: Any
) -> tuple[Array, Array]:
  """Weights [S, ways] of each row in its class; which classes have any."""
  member = jax.nn.one_hot(labels, ways, dtype=dtype)
  if weight is not None:
    member = member * weight.astype(dtype)[:, None]
  return member, member.sum(0) > 0


def without_absent(logits: Array, present: Array) -> Array:
  """-inf where a class has no support row."""
  return jnp.where(present[None], logits, -jnp.inf)


def product(a: Array, b: Array) -> Array:
  """In the precision of the numbers: heads are small, and solve systems."""
  return jnp.matmul(a, b, precision='highest')


def prototypes(
  support: Array,
  labels: Array,
  queries: Array,
  ways: int,
  weight: Array | None = None,
) -> Array:
  """ProtoNet: minus the squared distance to each class mean.

    l_k(q) = -|q - c_k|^2,   c_k = mean of the rows of class k

  (Snell et al. 2017, https://arxiv.org/abs/1703.05175, eqs. 1 and 2.)

  Args:
    support: embeddings [S, D].
    labels: [S] in [0, ways).
    queries: [Q, D].
    ways: number of logits, static.
    weight: [S]; 0 for padding; all ones by default.

  Raises:
    UsageError: if the shapes are no task's.
  """
  check_task(support, labels, queries, weight)
  return nearest_mean_euclid(support, labels, queries, ways, weight)


def cosine_prototypes(scale: Scalar = 10.0) -> Head:
  """Scaled cosine of the query with each class mean.

    l_k(q) = s cos(q, c_k)

  The cosine variant of Snell et al. 2017 (section 2.7), with the factor that
  a softmax over cosines needs (Gidaris & Komodakis 2018,
  https://arxiv.org/abs/1804.09458, section 3.2). Unlike
  `baselines.nearest_mean_cosine` it averages the rows as they are.

  Args:
    scale: s; 10 is where Gidaris and Komodakis start to learn it.
  """

  def head(support, labels, queries, ways, weight=None):
    check_task(support, labels, queries, weight)
    means, counts = class_means(support, labels, ways, weight)
    cosine = product(unit_length(queries), unit_length(means).T)
    return without_absent(scale * cosine, counts > 0)

  return head


def matching(scale: Scalar = 1.0) -> Head:
  """Matching networks: attention over the support rows.

    p(k | q) = sum_{i in class k} softmax_i(s cos(q, x_i)),   l = log p

  (Vinyals et al. 2016, https://arxiv.org/abs/1606.04080, eq. 1 and section
  2.1.1, without full context embeddings.) The logits are log probabilities,
  so cross entropy is their objective.

  Args:
    scale: s; 1 as in the paper.
  """

  def head(support, labels, queries, ways, weight=None):
    check_task(support, labels, queries, weight)
    cosine = scale * product(unit_length(queries), unit_length(support).T)
    member, present = members(labels, ways, weight, cosine.dtype)
    # An absent class borrows every row: the logarithm of an empty sum has no
    # derivative.
    rows = jnp.where(present[None], member, 1.0)
    scores = jax.nn.logsumexp(
      cosine[:, :, None], axis=1, b=jnp.broadcast_to(rows, (1, *rows.shape))
    )
    total = jax.nn.logsumexp(cosine, axis=1, b=member.sum(-1)[None])
    return without_absent(scores - total[:, None], present)

  return head


def ridge(strength: Scalar, scale: Scalar) -> Head:
  """R2D2: ridge regression onto the one-hot labels, solved exactly.

    W = (X'X + s I)^-1 X'Y = X' (X X' + s I)^-1 Y,   l(q) = a [q, 1] W

  with X [S, D + 1] the support rows and a one for the intercept, which is
  regularised like the rest, as in the authors' code (Bertinetto et al. 2019,
  https://arxiv.org/abs/1805.08136, eqs. 4, 6 and 7; their shift of all logits,
  which a softmax does not see, is left out). The smaller of the two systems is
  solved. A row's weight multiplies its squared error.

  Args:
    strength: s > 0.
    scale: a, as cross entropy needs more than the regression's range.

  Raises:
    UsageError: if a number that is not positive is given as strength.
  """
  if isinstance(strength, int | float):
    _check_strength(strength)

  def head(support, labels, queries, ways, weight=None):
    check_task(support, labels, queries, weight)
    root = None if weight is None else jnp.sqrt(weight)
    member, present = members(labels, ways, root, support.dtype)
    rows, asked = _with_one(support), _with_one(queries)
    if root is not None:
      rows = rows * root.astype(rows.dtype)[:, None]
    weights = _ridge_weights(rows, member, strength)
    return without_absent(scale * product(asked, weights), present)

  return head


def _check_strength(strength: float) -> None:
  if strength <= 0:
    raise UsageError(f'ridge strength {strength} is not positive; give > 0')


def _with_one(rows: Array) -> Array:
  return jnp.concatenate([rows, jnp.ones_like(rows[:, :1])], axis=1)


def _ridge_weights(x: Array, y: Array, strength: Scalar) -> Array:
  """argmin_W |x W - y|^2 + strength |W|^2, [D, C]."""
  rows, width = x.shape
  if rows < width:
    gram = product(x, x.T) + strength * jnp.eye(rows, dtype=x.dtype)
    return product(x.T, jax.scipy.linalg.solve(gram, y, assume_a='pos'))
  gram = product(x.T, x) + strength * jnp.eye(width, dtype=x.dtype)
  return jax.scipy.linalg.solve(gram, product(x.T, y), assume_a='pos')


def ridge_init(strength: float = 1.0, scale: float = 1.0) -> Params:
  """`hyper` of `learned_ridge`: the logarithm of its strength keeps it > 0.

  Args:
    strength: where the strength starts; untuned.
    scale: where the factor starts; untuned.

  Raises:
    UsageError: if the strength is not positive.
  """
  _check_strength(strength)
  return {
    'log_strength': jnp.log(jnp.asarray(strength, jnp.float32)),
    'scale': jnp.asarray(scale, jnp.float32),
  }


def learned_ridge() -> Learned:
  """R2D2 with learned strength and scale; starts at `ridge_init`."""
  return Learned(
    lambda hyper: ridge(jnp.exp(hyper['log_strength']), hyper['scale'])
  )
