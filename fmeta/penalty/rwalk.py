"""Riemannian walk: an online Fisher, and the path measured in its metric."""

from typing import Any

import jax
import jax.numpy as jnp

from fmeta.errors import UsageError, check_number
from fmeta.penalty.leaves import half_square, own, zeros_like
from fmeta.penalty.quadratic import no_penalty
from fmeta.types import Array, Params, Penalty, Scalar

# Sums over the steps of an interval: of - g u, u and g^2.
INTERVAL = 'path', 'moved', 'squares'


def rwalk(
  strength: Scalar,
  *,
  alpha: Scalar = 0.9,
  every: int | Array = 10,
  eps: Scalar = 1e-3,
) -> Penalty:
  """Riemannian walk: EWC with an online Fisher, plus path scores.

    strength * sum_i (F_i + s_i) (p_i - p*_i)^2

  with p* the latest task's optimum. Every `every` steps, with g the data
  gradients and u the updates of those steps (as for `si`),

    F_i <- alpha mean g_i^2 + (1 - alpha) F_i
    score_i <- score_i + max(0, - sum g_i u_i) / (F_i (sum u_i)^2 / 2 + eps)

  so a score is the drop of the loss per KL distance between the outputs
  before and after. At a task's end s is the mean of the old s and the task's
  score (the score itself at the first), and F and s are divided by their
  largest entries (Chaudhry et al. 2018, https://arxiv.org/abs/1801.10112).

  F is made of the gradients of whole batches at the data's labels, as in the
  authors' code: it depends on the batch size and is no Fisher. The first F is
  the first mean. The steps since the last interval count as a shorter one.

  It lives on the trainable leaves, see `si`; the state is eight times them.

  Args:
    strength: the paper's lambda, without a half. May be traced.
    alpha: weight of the new F; 0.9 in the authors' code.
    every: steps of an interval; 10 in the authors' split MNIST.
    eps: 1e-3 in the authors' code. All may be traced; none was tuned here.

  Raises:
    UsageError: for an interval of no steps, or a number out of range.
  """
  check_number('rwalk strength', strength)
  check_number('rwalk alpha', alpha, most=1)
  check_number('rwalk eps', eps, above=True)
  if isinstance(every, int | float) and (every < 1 or every % 1):
    raise UsageError(f'every={every}; give at least 1 step, a whole number')

  def init(trainable, params):
    del params
    names = 'importance', 'fisher', 'score', 'task_score', *INTERVAL
    return {
      'anchor': own(trainable),
      **{name: zeros_like(trainable) for name in names},
      'steps': jnp.zeros((), jnp.int32),
      'intervals': jnp.zeros((), jnp.int32),
      'tasks': jnp.zeros((), jnp.int32),
    }

  def value(trainable, params, state, batch, rng):
    del params, batch, rng
    distance = half_square(trainable, state['anchor'], state['importance'])
    return 2 * strength * distance

  def observe(state, trainable, grads, updates):
    del trainable
    state = {
      **state,
      'path': jax.tree.map(
        lambda w, g, u: w - g * u, state['path'], grads, updates
      ),
      'moved': jax.tree.map(jnp.add, state['moved'], updates),
      'squares': jax.tree.map(lambda s, g: s + g**2, state['squares'], grads),
      'steps': state['steps'] + 1,
    }
    return _choose(
      state['steps'] == every, _end_interval(state, alpha, eps), state
    )

  def consolidate(state, trainable, *args):
    del args
    state = _choose(state['steps'] > 0, _end_interval(state, alpha, eps), state)
    first = state['tasks'] == 0
    score = jax.tree.map(
      lambda old, new: jnp.where(first, new, (old + new) / 2),
      state['score'],
      state['task_score'],
    )
    return {
      **state,
      'anchor': own(trainable),
      'importance': jax.tree.map(
        jnp.add, _by_largest(state['fisher']), _by_largest(score)
      ),
      'score': score,
      'task_score': zeros_like(trainable),
      'tasks': state['tasks'] + 1,
    }

  return no_penalty()._replace(
    init=init, value=value, observe=observe, consolidate=consolidate
  )


def _choose(condition: Array, yes: Any, no: Any) -> Any:
  return jax.tree.map(lambda x, y: jnp.where(condition, x, y), yes, no)


def _end_interval(state: dict, alpha: Scalar, eps: Scalar) -> dict:
  """The state with the last `steps` steps in F and in the task's score."""
  first = state['intervals'] == 0
  count = jnp.maximum(state['steps'], 1)

  def mix(old, squares):
    new = squares / count
    return jnp.where(first, new, alpha * new + (1 - alpha) * old)

  def gain(score, path, fisher, moved):
    distance = 0.5 * fisher * moved**2
    return score + jnp.maximum(path, 0) / (distance + eps)

  fisher = jax.tree.map(mix, state['fisher'], state['squares'])
  score = jax.tree.map(
    gain, state['task_score'], state['path'], fisher, state['moved']
  )
  return {
    **state,
    'fisher': fisher,
    'task_score': score,
    **{name: zeros_like(state[name]) for name in INTERVAL},
    'steps': jnp.zeros_like(state['steps']),
    'intervals': state['intervals'] + 1,
  }


def _by_largest(leaves: Params) -> Params:
  largest = jnp.max(jnp.stack([x.max() for x in jax.tree.leaves(leaves)]))
  share = 1 / jnp.where(largest > 0, largest, 1)
  return jax.tree.map(lambda x: x * share, leaves)
