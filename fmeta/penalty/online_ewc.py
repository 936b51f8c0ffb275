"""Online EWC: one running quadratic, anchored at the latest optimum."""

import jax

from fmeta.errors import check_number
from fmeta.fisher import exact_fisher
from fmeta.penalty.leaves import half_square, moving_leaves, own
from fmeta.penalty.quadratic import Importance, ewc
from fmeta.types import Penalty, Scalar


def online_ewc(
  strength: Scalar,
  importance: Importance = exact_fisher,
  gamma: Scalar = 1.0,
) -> Penalty:
  """Elastic weight consolidation with one running importance.

    strength / 2 * sum_i gamma F_i (p_i - p*_i)^2

  with p* the latest task's optimum, and F <- gamma F + F_t at each task's end
  (Schwarz et al. 2018, https://arxiv.org/abs/1805.06370, section 3.2; with
  gamma = 1 the recursion of Huszar 2018, https://arxiv.org/abs/1712.03847).

  It differs from `ewc` in the anchor: there it is the F-weighted mean of all
  optima, here the latest, which the terms before have already held near the
  others. Where the tasks' losses are quadratics with diagonal F_t, gamma = 1
  is training on all tasks at once; `ewc` is not.

  Args:
    strength: may be traced.
    importance: from `fmeta.fisher`, as for `ewc`.
    gamma: in [0, 1]; 1 forgets no task. May be traced.

  Raises:
    UsageError: for a number out of range, or, at a task's end, no batches.
  """
  check_number('online_ewc strength', strength)
  check_number('online_ewc gamma', gamma, most=1)
  both = ewc(strength, importance)

  def value(trainable, params, state, batch, rng):
    del batch, rng
    values = moving_leaves(trainable, params)
    distance = half_square(values, state['anchor'], state['importance'])
    return strength * gamma * distance

  def consolidate(state, trainable, params, model_state, forward, batches, rng):
    moving = moving_leaves(trainable, params)
    new = importance(forward, params, moving, model_state, batches, rng)
    total = jax.tree.map(
      lambda old, new: gamma * old + new, state['importance'], new
    )
    return {'anchor': own(moving), 'importance': total}

  return both._replace(value=value, consolidate=consolidate)
