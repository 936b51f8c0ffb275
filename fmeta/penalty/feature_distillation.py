"""Feature distillation: stay where the old features were."""

import jax.numpy as jnp

from fmeta.errors import UsageError, check_number
from fmeta.penalty.quadratic import no_penalty
from fmeta.penalty.teacher import (
  first_teacher,
  mean_over_rows,
  next_teacher,
  student_and_teacher,
)
from fmeta.types import Forward, ModelState, Penalty, Scalar


def feature_distillation(
  features: Forward, strength: Scalar, model_state: ModelState = None
) -> Penalty:
  """Squared distance between the features of now and of the last boundary.

    strength / 2 * mean over rows of ||f(x) - f*(x)||^2

  (the term of less-forgetting learning, Jung et al. 2016,
  https://arxiv.org/abs/1607.00122, which also freezes the last layer: a
  `Tuning`.) f* is f at the last task's end, on the rows of the new task; the
  square is summed over features. Before the first end the penalty and its
  gradient are zero. Both run in evaluation mode with the model state of the
  last boundary, see `fmeta.penalty.teacher`.

  Args:
    features: gives [B, ...].
    strength: may be traced.
    model_state: as `learner.init` gets it; only its structure matters.

  Raises:
    UsageError: for features without a feature axis, a model state that was
      not announced, or a strength below 0.
  """
  check_number('feature_distillation strength', strength)

  def init(trainable, params):
    active = jnp.zeros((), bool)
    return {**first_teacher(trainable, params, model_state), 'active': active}

  def value(trainable, params, state, batch, rng):
    del trainable, rng
    now, then = student_and_teacher(features, params, state, batch)
    if now.ndim < 2:
      raise UsageError(f'features of shape {now.shape}; give [B, ...]')
    rows = 0.5 * jnp.sum((now - then) ** 2, axis=tuple(range(1, now.ndim)))
    distance = mean_over_rows(rows, batch)
    return strength * jnp.where(state['active'], distance, 0)

  def consolidate(state, trainable, params, model_state, *args):
    del args
    state = next_teacher(state, trainable, params, model_state)
    return {**state, 'active': jnp.ones_like(state['active'])}

  return no_penalty()._replace(init=init, value=value, consolidate=consolidate)
