"""Quadratic penalties: decay towards a start, elastic weights.

They live on the merged values of the leaves that move, see `leaves`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fmeta import tree
from fmeta.errors import UsageError, check_number
from fmeta.fisher import exact_fisher
from fmeta.penalty.leaves import half_square, moving_leaves, own, zeros_like
from fmeta.types import Array, Params, Penalty, Scalar

# (forward, params, moving, model_state, batches, rng) -> like `moving`
Importance = Callable[..., Params]


def no_penalty() -> Penalty:
  """Remembers nothing."""
  return Penalty(
    init=lambda trainable, params: {},
    value=lambda trainable, params, state, batch, rng: jnp.zeros(()),
    direct=lambda grads, state: grads,
    observe=lambda state, trainable, grads, updates: state,
    consolidate=lambda state, *args: state,
  )


def require_penalty(penalty: Any) -> Penalty:
  """The penalty itself.

  Raises:
    UsageError: for what is none, such as `ewc` without its strength.
  """
  if isinstance(penalty, Penalty):
    return penalty
  given = getattr(penalty, '__name__', type(penalty).__name__)
  raise UsageError(
    f'{given} is no penalty; give one such as ewc(1e3), several as '
    'all_of(ewc(1e3), l2_sp(0.1))'
  )


def l2_sp(
  strength: Scalar, multipliers: tree.Patterns = (('.*', 1.0),)
) -> Penalty:
  """Decay towards the starting point.

    strength / 2 * sum_i m_i (p_i - p0_i)^2

  (Li et al. 2018, https://arxiv.org/abs/1802.01483, eq. 2.)

  Args:
    strength: may be traced.
    multipliers: ordered `(pattern, m)` over the moving parameters; use
      `(('head/.*', 0.0), ('.*', 1.0))` so that a fresh head is not pulled to
      its random start.

  Raises:
    UsageError: for a strength below 0.
  """
  check_number('l2_sp strength', strength)

  def init(trainable, params):
    return {'anchor': own(moving_leaves(trainable, params))}

  def value(trainable, params, state, batch, rng):
    del batch, rng
    values = moving_leaves(trainable, params)
    weights = tree.match(
      values, multipliers, what='multiplier', known=tree.names(params)
    )
    return strength * half_square(values, state['anchor'], weights)

  return no_penalty()._replace(init=init, value=value)


def ewc(strength: Scalar, importance: Importance = exact_fisher) -> Penalty:
  """Elastic weight consolidation.

  After tasks 1..T with optima p_t and diagonal Fishers F_t it adds

    strength / 2 * sum_t sum_i F_t,i (p_i - p_t,i)^2

  (Kirkpatrick et al. 2017, https://arxiv.org/abs/1612.00796, eq. 3, one term
  per task). The sum over tasks is one quadratic, so the state has a fixed
  size: F = sum_t F_t and the F-weighted mean of the optima.

  From the third task on p_t has already been held by earlier terms, so early
  tasks count more than once (Huszar 2018, https://arxiv.org/abs/1712.03847);
  `online_ewc`, anchored at the latest optimum, counts each once.

  Gradient descent with rate r diverges once r * strength * max F > 2;
  `max_importance` gives max F.

  Args:
    strength: may be traced.
    importance: from `fmeta.fisher`: `exact_fisher` (labels summed over),
      `sampled_fisher` (labels drawn from the model) or `empirical_fisher`
      (the data's labels, which is no Fisher). All are means over examples,
      independent of the batch size.

  Raises:
    UsageError: for a strength below 0, or, at a task's end, no batches.
  """
  check_number('ewc strength', strength)

  def init(trainable, params):
    moving = moving_leaves(trainable, params)
    return {'anchor': own(moving), 'importance': zeros_like(moving)}

  def value(trainable, params, state, batch, rng):
    del batch, rng
    values = moving_leaves(trainable, params)
    return strength * half_square(values, state['anchor'], state['importance'])

  def consolidate(state, trainable, params, model_state, forward, batches, rng):
    moving = moving_leaves(trainable, params)
    new = importance(forward, params, moving, model_state, batches, rng)
    total = jax.tree.map(jnp.add, state['importance'], new)

    def mean(anchor, old, now, both):
      # In this form the first task's anchor is exactly its optimum.
      return now + old / jnp.where(both > 0, both, 1) * (anchor - now)

    anchor = jax.tree.map(
      mean, state['anchor'], state['importance'], moving, total
    )
    return {'anchor': anchor, 'importance': total}

  return no_penalty()._replace(init=init, value=value, consolidate=consolidate)


def max_importance(state: Any) -> Array:
  """Largest importance of a penalty state, 0 if it has none.

  Of `ewc_kfac` the largest eigenvalue of a layer's A (x) G instead, which is
  that of A times that of G; tasks add up to no less than that of their sum.
  """
  if isinstance(state, tuple | list):  # of several penalties
    return jnp.max(jnp.stack([jnp.zeros(()), *map(max_importance, state)]))
  if 'diagonal' in state:  # of each task, as `a` and `g` are
    sums = [leaf.sum(0).max() for leaf in jax.tree.leaves(state['diagonal'])]
    pairs = zip(*(jax.tree.leaves(state[key]) for key in 'ag'), strict=True)
    sums += [(_largest(a) * _largest(g)).sum() for a, g in pairs]
    return jnp.max(jnp.stack(sums))
  leaves = jax.tree.leaves(state.get('importance', {}))
  return jnp.max(jnp.stack([leaf.max() for leaf in leaves] or [jnp.zeros(())]))


def _largest(matrices: Array) -> Array:
  """The largest eigenvalue of each symmetric matrix, [T]."""
  return jnp.linalg.eigvalsh(matrices)[:, -1]
