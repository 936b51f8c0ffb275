"""CODA-Prompt: a prefix is a weighted sum of components.

Components of all tasks are there from the start, on an axis of tasks, and a
mask says which count: one compiled program serves the whole stream, and its
last task costs what its first did.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fmeta import tree
from fmeta.adapters import entry, siblings
from fmeta.adapters.prefix import PREFIX, pairs_of
from fmeta.continual.prompts.chosen import leaves_of, run_with
from fmeta.continual.prompts.query import (
  check_size,
  inverse_length,
  query_of,
  unit,
)
from fmeta.continual.prompts.tasks import task_of, with_tasks
from fmeta.errors import UsageError
from fmeta.penalty import no_penalty
from fmeta.types import Array, Forward, Params, Penalty, Scalar, Tuning

COMPONENTS = '.components'
KEYS, ATTENTION = '.component_keys', '.component_attention'
# The leaves [tasks, ...], for `of_this_task`.
CODA_PROMPT = (COMPONENTS, KEYS, ATTENTION)


class Components(NamedTuple):
  """Those of one attention layer; T tasks with m components each.

  Attributes:
    key: P of its keys, [T, m, P, H].
    value: P of its values, likewise.
    keys: K, [T, m, D].
    attention: A, likewise.
  """

  key: Array
  value: Array
  keys: Array
  attention: Array


def coda_prompt_tuning(
  *patterns: str,
  tasks: int,
  per_task: int,
  length: int,
  query_size: int | None = None,
  also: tuple[str, ...] = (),
) -> Tuning:
  """Components, their keys and attention in each matching layer.

    coda_prompt_tuning(
      'body/layer_[0-4]/attention/(key|value)/kernel',
      tasks=10, per_task=10, length=4, also=('head/.*',),
    )

  Leaves `<kernel>.components` [tasks, per_task, length, H] beside the kernels
  of keys and values, `.component_keys` and `.component_attention`
  [tasks, per_task, query_size] beside that of keys. The components of all
  tasks start orthonormal, and so do keys and attention, as far as their size
  allows. So did the paper's, says its released code, which now draws a
  task's components when the task begins, orthogonal to the trained ones.

  Args:
    *patterns: full-match regular expressions of the kernels of keys and
      values.
    tasks: of the stream.
    per_task: components of each task.
    length: of the prefix; the paper's length is twice it, half for keys and
      half for values; 0 leaves the model as it is.
    query_size: of the query; that of the kernels' inputs by default.
    also: patterns of ordinary parameters that move too, such as a new head.

  Raises:
    UsageError: if a size counts nothing, a pattern matches nothing, a leaf is
      not [in, out], or a key comes without its value.
  """
  if tasks < 1 or per_task < 1 or length < 0:
    raise UsageError(
      f'{tasks} tasks with {per_task} components of length {length}; give at '
      'least 1, 1 and 0'
    )

  def born(params, rng):
    names = siblings.owners(params, patterns)
    leaves = {}
    for path, (key, value) in pairs_of(names).items():
      kernel = _kernel(params, key)
      wide = (2, length, kernel.shape[1])
      asked = (query_size or kernel.shape[0],)
      at = jax.random.split(siblings.key_for(rng, path), 3)
      first = (tasks, per_task)
      both = _orthonormal(at[0], first, wide, kernel.dtype)
      leaves[key + COMPONENTS], leaves[value + COMPONENTS] = (
        both[:, :, k] for k in range(2)
      )
      leaves[key + KEYS] = _orthonormal(at[1], first, asked, kernel.dtype)
      leaves[key + ATTENTION] = _orthonormal(at[2], first, asked, kernel.dtype)
    return siblings.grow(params, leaves)

  return entry.entering_tuning(born, CODA_PROMPT, also)


def _kernel(params: Params, name: str) -> Array:
  kernel = tree.get(params, name)
  if kernel.ndim != 2:
    raise UsageError(
      f'components need [in, out] kernels, but {name!r} has shape '
      f'{kernel.shape}; narrow the pattern, or unroll scanned layers'
    )
  return kernel


def _orthonormal(rng, rows, columns, dtype) -> Array:
  """[*rows, *columns], orthonormal rows if there are at most as many."""
  flat = math.prod(rows), math.prod(columns)
  drawn = jnp.zeros(flat, dtype)
  if drawn.size:
    drawn = jax.nn.initializers.orthogonal()(rng, flat, dtype)
  return drawn.reshape(*rows, *columns)


def _components(params: Params) -> dict[tuple[str, str], Components]:
  """By the kernels of keys and of values of each attention layer."""
  parts = {suffix: leaves_of(params, suffix) for suffix in CODA_PROMPT}
  return {
    (key, value): Components(
      parts[COMPONENTS][key],
      parts[COMPONENTS][value],
      parts[KEYS][key],
      parts[ATTENTION][key],
    )
    for key, value in pairs_of(parts[COMPONENTS]).values()
  }


def _held(parts: Components, task: Array) -> Components:
  """The same values; only those of the task get a gradient."""

  def one(leaf):
    now = jnp.arange(len(leaf)).reshape(-1, *[1] * (leaf.ndim - 1)) == task
    return jnp.where(now, leaf, jax.lax.stop_gradient(leaf))

  return Components(*map(one, parts))


def coda_prompt_forward(forward: Forward, query: Forward) -> Forward:
  """The model with the prefix that an example's query weighs together.

    p = sum_m alpha_m P_m,   alpha_m = cos(q(x) * A_m, K_m)

  in each layer with components, and p's halves stand before its keys and
  values (Smith et al. 2023, https://arxiv.org/abs/2211.13218; beside the
  projected ones, as in `adapters.prefix`). Components of later tasks do not
  count, those of earlier ones count and get no gradient; that they do not move
  either takes `of_this_task`. In evaluation the components of all tasks that
  there have been count.

  The task comes by the batch's `task` in training and never in evaluation,
  see `counting_tasks`; of rows of several tasks the latest is at hand.

  Args:
    forward: of parameters that `coda_prompt_tuning` grew.
    query: gives [B, D] of the parameters without prompts, see `query`.

  Raises:
    UsageError: in a step, if the query's size is not that of the keys, or
      nothing says the task.
  """

  def run(params, model_state, batch, rng, told):
    bare = siblings.without(params, CODA_PROMPT)
    asked = query_of(query, bare, model_state, batch)
    mine = {}
    count = told.seen if told.rows is None else told.task + 1
    for owners, all_parts in _components(params).items():
      parts = _held(all_parts, told.task)
      alpha = _weights(asked, parts, count)
      for owner, leaf in zip(owners, parts[:2], strict=True):
        mine[owner + PREFIX] = jnp.einsum('btm,tmph->bph', alpha, leaf)
    return run_with(forward, mine, CODA_PROMPT, params, model_state, batch, rng)

  return with_tasks(run)


def _weights(query: Array, parts: Components, count: Array) -> Array:
  """alpha [B, T, m], zero from task `count` on."""
  tasks, each, size = parts.keys.shape
  check_size(query, size)
  query = unit(query)
  attention = parts.attention.reshape(-1, size).astype(query.dtype)
  keys = unit(parts.keys).reshape(-1, size)
  # cos(q A, K) = q (A K)' / sqrt(q^2 A^2'): no [B, T m, D] is formed.
  along = jnp.matmul(query, (attention * keys).T, precision='highest')
  square = jnp.matmul(query**2, (attention**2).T, precision='highest')
  alpha = (along * inverse_length(square)).reshape(-1, tasks, each)
  there = jnp.arange(tasks) < count
  return jnp.where(there[None, :, None], alpha, 0)


def coda_prompt_penalty(strength: Scalar) -> Penalty:
  """Keeps components, keys and attention orthonormal.

    strength * sum_layers |P P' - I|^2 + |K K' - I|^2 + |A A' - I|^2

  over the components of the tasks so far, squares summed over entries (Smith
  et al. 2023, https://arxiv.org/abs/2211.13218; the released code takes their
  mean). Those of earlier tasks get no gradient. It reads the batch's `task`.

  Args:
    strength: lambda; may be traced.

  Raises:
    UsageError: in a step, if the batch does not say the task.
  """

  def value(trainable, params, state, batch, rng):
    del trainable, state, rng
    task = task_of(batch).max()
    total = jnp.zeros(())
    for all_parts in _components(params).values():
      key, value, keys, attention = _held(all_parts, task)
      both = jnp.stack([key, value], axis=2)
      for leaf in (both, keys, attention):
        total += _distance_to_orthonormal(leaf, task)
    return strength * total

  return no_penalty()._replace(value=value)


def _distance_to_orthonormal(leaf: Array, task: Array) -> Array:
  """|B B' - I|^2 over the components of tasks up to this one."""
  tasks, each = leaf.shape[:2]
  rows = leaf.reshape(tasks * each, -1)
  there = jnp.repeat(jnp.arange(tasks) <= task, each)
  gram = jnp.matmul(rows, rows.T, precision='highest')
  away = gram - jnp.eye(len(rows), dtype=gram.dtype)
  return jnp.sum(jnp.where(there[:, None] & there[None], away, 0) ** 2)
