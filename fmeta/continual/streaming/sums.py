"""What a streaming classifier is, and the sums that it keeps.

Every state here is a pytree of sums over examples, and nothing else. So the
order of tasks and the split into batches change it by rounding only, the
states of two shards are merged by `jax.tree.map(jnp.add, a, b)`, and it is
saved, scanned and vmapped like any other pytree.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp

from fmeta import baselines
from fmeta.errors import UsageError
from fmeta.types import Array


class Streaming(NamedTuple):
  """A classifier of features that learns by counting, never by a gradient.

  Attributes:
    init: `() -> state`, sums of nothing.
    update: `(state, features [B, D], label [B], weight=None) -> state`; rows
      of weight 0 (padding) and labels that are none of the classes count for
      nothing.
    solve: `state -> solved`, what answers need and is worth computing once
      for many of them (an inverse).
    answer: `(solved, features [B, D]) -> scores [B, C]`. A class that no
      example had scores -inf, so it is never answered.
  """

  init: Callable[[], Any]
  update: Callable[..., Any]
  solve: Callable[[Any], Any]
  answer: Callable[[Any, Array], Array]

  def scores(self, state: Any, features: Array) -> Array:
    """Scores [B, C] straight from a state; solves anew in every call."""
    return self.answer(self.solve(state), features)


def transformed(
  classifier: Streaming, transform: Callable[[Array], Array]
) -> Streaming:
  """The classifier of `transform(features)`, one function for all rows."""
  return classifier._replace(
    update=lambda state, features, label, weight=None: classifier.update(
      state, transform(features), label, weight
    ),
    answer=lambda solved, features: classifier.answer(
      solved, transform(features)
    ),
  )


def class_sums(num_classes: int, dim: int) -> tuple[Callable, Callable]:
  """`init` and `update` of counts n_c [C] and sums s_c [C, D] per class.

  Args:
    num_classes: C, of the whole stream.
    dim: D.

  Raises:
    UsageError: if either is not positive, or, in `update`, for features of
      another shape.
  """
  if num_classes < 1 or dim < 1:
    raise UsageError(
      f'{num_classes} classes of {dim} features; give at least 1 of each'
    )

  def init():
    return {
      'count': jnp.zeros(num_classes),
      'sum': jnp.zeros((num_classes, dim)),
    }

  def update(state, features, label, weight=None):
    features, weight = _rows(features, label, weight, dim)
    sums, counts = baselines.class_sums(features, label, num_classes, weight)
    return {'count': state['count'] + counts, 'sum': state['sum'] + sums}

  return init, update


def moments(num_classes: int, dim: int) -> tuple[Callable, Callable]:
  """`class_sums` and the second moment of all rows, sum_i w_i x_i x_i'.

  Arguments and errors as for `class_sums`.
  """
  init, update = class_sums(num_classes, dim)

  def init_all():
    return {**init(), 'second': jnp.zeros((dim, dim))}

  def update_all(state, features, label, weight=None):
    features, weight = _rows(features, label, weight, dim)
    known = (label >= 0) & (label < num_classes)
    rows = jnp.where(known, weight, 0)[:, None] * features
    square = jnp.matmul(rows.T, features, precision='highest')
    return {
      **update(state, features, label, weight),
      'second': state['second'] + square,
    }

  return init_all, update_all


def means(state: Any) -> Array:
  """Class means [C, D]; zero for a class without examples."""
  count = state['count'][:, None]
  return state['sum'] / jnp.where(count > 0, count, 1)


def linear_head(kernel: Array, bias: Array, seen: Array) -> dict[str, Array]:
  """A head whose unseen classes [C], of zero kernel, score -inf."""
  return {'kernel': kernel, 'bias': jnp.where(seen, bias, -jnp.inf)}


def linear_scores(head: dict[str, Array], features: Array) -> Array:
  """x K + b, [B, C]."""
  if jnp.shape(features)[1:] != head['kernel'].shape[:1]:
    raise UsageError(
      f'features of shape {jnp.shape(features)}; give [B, '
      f'{len(head["kernel"])}]'
    )
  product = jnp.matmul(features, head['kernel'], precision='highest')
  return product + head['bias'][None, :]


def _rows(features, label, weight, dim):
  """Features in the precision of the sums, zero where the weight is."""
  if jnp.ndim(features) != 2 or features.shape[1] != dim:
    raise UsageError(
      f'features of shape {jnp.shape(features)}; give [B, {dim}]'
    )
  size = len(features)
  weight = jnp.ones(size) if weight is None else jnp.asarray(weight)
  if jnp.shape(label) != (size,) or weight.shape != (size,):
    raise UsageError(
      f'labels of shape {jnp.shape(label)} and weight of shape {weight.shape} '
      f'for {size} rows of features; give [B] of each'
    )
  features = jnp.asarray(features, jnp.result_type(float))
  # Chosen, not multiplied: padding may hold NaN.
  return jnp.where(weight[:, None] > 0, features, 0), weight
