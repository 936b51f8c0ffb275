"""Elastic weights with the curvature between a layer's weights.

The diagonal Fisher of `ewc` says how much each weight matters by itself; a
Kronecker-factored one also says which directions of a layer matter.
"""

import re
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp

from fmeta import tree
from fmeta.errors import UsageError, check_number
from fmeta.fisher import exact_fisher
from fmeta.fisher.kronecker import bias_of, kronecker_fisher
from fmeta.fisher.labels import Labels, summed_over
from fmeta.penalty.leaves import moving_leaves, require_room
from fmeta.penalty.quadratic import Importance, no_penalty
from fmeta.types import Array, Params, Penalty, Scalar


def ewc_kfac(
  strength: Scalar,
  num_tasks: int,
  *,
  kernels: str = '(.*/)?kernel',
  labels: Labels = summed_over,
  importance: Importance = exact_fisher,
) -> Penalty:
  """EWC with Kronecker factors for dense layers, one term per task.

  With D_t = (W, b) - (W_t, b_t) of a layer, stacked [in + 1, out], and the
  factors A_t, G_t of `fisher.kronecker.kronecker_fisher` it adds

    strength / 2 * sum_t sum_layers vec(D_t)' (A_t (x) G_t) vec(D_t)
      = strength / 2 * sum_t sum_layers trace(D_t' A_t D_t G_t)

  and for all other leaves strength / 2 * sum_t sum_i F_t,i (p_i - p_t,i)^2, as
  `ewc` does (Ritter et al. 2018, https://arxiv.org/abs/1805.07810; Martens &
  Grosse 2015, https://arxiv.org/abs/1503.05671). A sum of Kronecker products
  is none, and adding up factors instead would mix one task's inputs with
  another's outputs. So each task keeps its own, in a state of fixed size:
  num_tasks times the moving leaves and, per layer, (in + 1)^2 + out^2.

  Args:
    strength: may be traced.
    num_tasks: how many tasks' ends there is room for.
    kernels: pattern; kernels [in, out] among the moving leaves with such a
      name get factors, together with a moving `bias` beside them.
    labels: of the factors: `fisher.labels.summed_over` or `drawn`.
    importance: of the other leaves, as in `ewc`.

  Raises:
    UsageError: at a task's end if `num_tasks` tasks are remembered already
      (under `jit`, where nothing can be raised, the penalty becomes NaN), or
      a kernel is in no dense layer; for a strength below 0, or room for no
      task.
  """
  check_number('ewc_kfac strength', strength)
  if num_tasks < 1:
    raise UsageError(f'ewc_kfac num_tasks={num_tasks}; give at least 1')

  def init(trainable, params):
    moving = moving_leaves(trainable, params)
    chosen = _chosen(moving, kernels)
    _, rest = _split(moving, chosen)

    def room(leaf):
      return jnp.zeros((num_tasks, *leaf.shape), leaf.dtype)

    def factor(axis):
      def zeros(name, leaf):
        size = leaf.shape[axis]
        size += int(axis == 0 and bias_of(name) in tree.names(moving))
        return jnp.zeros((num_tasks, size, size), leaf.dtype)

      only = tree.partition(moving, chosen.__contains__)[0]
      return tree.map_with_name(zeros, only)

    return {
      'anchor': jax.tree.map(room, moving),
      'a': factor(0),
      'g': factor(1),
      'diagonal': jax.tree.map(room, rest),
      'tasks': jnp.zeros((), jnp.int32),
    }

  def value(trainable, params, state, batch, rng):
    del batch, rng
    moving = moving_leaves(trainable, params)
    moved = jax.tree.map(lambda x, a: x[None] - a, moving, state['anchor'])
    return 0.5 * strength * _quadratic(moved, state)

  def consolidate(state, trainable, params, model_state, forward, batches, rng):
    require_room('ewc_kfac', state['tasks'], num_tasks)
    moving = moving_leaves(trainable, params)
    chosen = _chosen(moving, kernels)
    given = params, model_state, list(batches), rng
    a, g = _factors(forward, moving, chosen, labels, *given)
    new = {
      'anchor': moving,
      'a': a,
      'g': g,
      'diagonal': _diagonal(forward, moving, chosen, importance, *given),
    }
    slot = jnp.minimum(state['tasks'], num_tasks - 1)
    fits = state['tasks'] < num_tasks
    kept = jax.tree.map(
      lambda old, x: old.at[slot].set(jnp.where(fits, x, jnp.nan)),
      {key: state[key] for key in new},
      new,
    )
    return {**kept, 'tasks': state['tasks'] + 1}

  return no_penalty()._replace(init=init, value=value, consolidate=consolidate)


def _chosen(moving: Params, pattern: str) -> list[str]:
  """Names of the kernels that get factors."""
  return [
    name
    for name, leaf in zip(
      tree.names(moving), jax.tree.leaves(moving), strict=True
    )
    if leaf.ndim == 2 and re.fullmatch(pattern, name)
  ]


def _split(moving: Params, chosen: Iterable[str]) -> tuple[Params, Params]:
  """The leaves of layers with factors, and the rest."""
  names = {name for kernel in chosen for name in (kernel, bias_of(kernel))}
  return tree.partition(moving, names.__contains__)


def _factors(
  forward, moving, chosen, labels, params, model_state, batches, rng
) -> tuple[Params, Params]:
  layers, _ = _split(moving, chosen)
  found = {}
  if chosen:
    found = kronecker_fisher(
      forward,
      params,
      layers,
      model_state,
      batches,
      rng,
      kernels=chosen,
      labels=labels,
    )
  only = tree.partition(moving, found.__contains__)[0]
  a = tree.map_with_name(lambda name, _: found[name].a, only)
  return a, tree.map_with_name(lambda name, _: found[name].g, only)


def _diagonal(
  forward, moving, chosen, importance, params, model_state, batches, rng
) -> Params:
  _, rest = _split(moving, chosen)
  if not rest:
    return rest
  return importance(forward, params, rest, model_state, batches, rng)


def _quadratic(moved: Params, state: Any) -> Array:
  """Summed over tasks; `moved` has the tasks as leading axis."""
  a, g = _named(state['a']), _named(state['g'])
  steps, total = _named(moved), jnp.zeros(())
  for name in a:
    step = steps[name]
    if a[name].shape[1] > step.shape[1]:
      bias = steps[bias_of(name)]
      step = jnp.concatenate([step, bias[:, None]], axis=1)
    total += jnp.sum((a[name] @ step) * (step @ g[name]))
  for name, weight in _named(state['diagonal']).items():
    total += jnp.sum(weight * steps[name] ** 2)
  return total


def _named(arrays: Params) -> dict[str, Array]:
  return dict(zip(tree.names(arrays), jax.tree.leaves(arrays), strict=True))
