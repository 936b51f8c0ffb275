"""Gradient episodic memory: a step that no past task's loss rises by.

Both functions are `value_and_grad` wrappers (see `fmeta.gradients`): the step,
the optimiser and the penalty do not know. They take the loss's gradient g on
the batch's own rows, and reference gradients on remembered rows that lie
beside them in the batch (`fmeta.beside`):

  gem     memory_<key> [T, m, ...], memory_weight [T, m]: m rows of each of T
          tasks, with weight zero for rows that are not there, for tasks to
          come and for the current one
  a_gem   memory_<key> [m, ...], memory_weight [m]: rows of any tasks

The learner is

  rehearse(
    finetune(loss, sgd(0.1), value_and_grad=gem()),
    task_by_task(per_task(tasks, rows_per_task, spec)),
    rows_per_task,
    mix=beside,
  )

or, with `a_gem()`, any memory and how many of its rows to sample.

The loss gets a batch of the keys without `memory_`, so the memory must hold
what the loss reads. A reference gradient is taken as g is, in training mode,
with a key of its own; its model state is dropped. Value, metrics, model state
and outputs are those of the batch's own rows.

Inner products run over all trainable leaves, in float32 at least.
"""

import operator
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from fmeta.continual.beside import apart
from fmeta.continual.qp import nonnegative_qp
from fmeta.errors import UsageError, check_number
from fmeta.gradients import plain
from fmeta.memory import ranked, task_rows
from fmeta.types import Array, Memory, Params, Scalar, ValueAndGrad

# Folded into the step's key; the objective itself folds in small numbers.
REFERENCE = 2**32 - 2


def gem(
  margin: Scalar = 0.5,
  value_and_grad: ValueAndGrad = plain,
  *,
  lanes: int = 1,
) -> ValueAndGrad:
  """GEM: the nearest gradient that does not oppose any past task's.

  With the rows g_k of G, the gradients of the past tasks, the result is g
  itself if G g >= 0, else g + G'v with

    v = argmin over v >= margin of v'GG'v / 2 + (Gg)'v,

  the dual of min |z - g| subject to G z >= 0 when the margin is zero
  (Lopez-Paz & Ranzato 2017, https://arxiv.org/abs/1706.08840, eqs. 8 to 11).
  The margin is the bound of v, as in the authors' code. Added to v afterwards,
  as in their text, it could break the constraints, which hold here.

  A step costs T + 1 gradients, whatever the number of tasks so far.

  Args:
    margin: 0.5, as in the authors' `run_experiments.sh`. May be traced.
    value_and_grad: how each gradient is taken.
    lanes: tasks side by side (`vmap`); the others one after another.

  Raises:
    UsageError: for a margin below 0, or, on the first step, if the batch has
      no such memory.
  """
  check_number('gem margin', margin)

  def transform(fun):
    taken = value_and_grad(fun)

    def wrapped(trainable, frozen, model_state, batch, rng):
      own, past = _split(batch, rank=2)
      valued, grads = taken(trainable, frozen, model_state, own, rng)

      def of_task(task):
        index, rows = task
        key = _key(rng, index)
        return taken(trainable, frozen, model_state, rows, key)[1]

      weight = past['weight']
      references = jax.lax.map(
        of_task,
        (jnp.arange(weight.shape[0]), past),
        batch_size=None if lanes == 1 else lanes,
      )
      present = (weight > 0).any(1)
      return valued, project(grads, references, present, margin)

    return wrapped

  return transform


def a_gem(value_and_grad: ValueAndGrad = plain) -> ValueAndGrad:
  """A-GEM: a gradient that does not oppose the one of the whole memory.

  With the gradient r of a sample of the memory the result is g if g'r >= 0,
  else

    g - (g'r / r'r) r

  (Chaudhry et al. 2019, https://arxiv.org/abs/1812.00420, eq. 11): GEM of one
  memory without a margin. Any memory of rows will do, a reservoir for one.

  Args:
    value_and_grad: how each of the two gradients is taken.

  Raises:
    UsageError: on the first step, if the batch has no such memory.
  """

  def transform(fun):
    taken = value_and_grad(fun)

    def wrapped(trainable, frozen, model_state, batch, rng):
      own, past = _split(batch, rank=1)
      valued, grads = taken(trainable, frozen, model_state, own, rng)
      key = _key(rng, 0)
      _, reference = taken(trainable, frozen, model_state, past, key)
      # The loss of no rows at all need not have a gradient of zero.
      held = (past['weight'] > 0).any()
      reference = jax.tree.map(lambda r: jnp.where(held, r, 0), reference)
      return valued, project_on_one(grads, reference)

    return wrapped

  return transform


def task_by_task(memory: Memory) -> Memory:
  """A `per_task` memory that is sampled for `gem`, [tasks, size, ...].

  Args:
    memory: from `fmeta.memory.per_task`. A sample is of `size` rows of each
      past task, all of them if there are no more.
  """

  def sample(held, size, rng):
    rows, valid = task_rows(held)
    keys = jax.random.split(rng, len(valid))
    of_task = lambda rows, valid, key: ranked.sample_of(rows, valid, size, key)
    return jax.vmap(of_task)(rows, valid, keys)

  return memory._replace(sample=sample)


def project(
  grads: Params, references: Params, present: Array, margin: Scalar = 0.0
) -> Params:
  """The projection of `gem`.

  Where no reference gradient is opposed, the result is bitwise `grads`.
  Otherwise <result, g_k> >= -2e-6 |g| |g_k| in float32; only -1e-3 where
  references depend on or oppose one another to within a hundredth, as inner
  products show such differences to the square root of the rounding.

  Args:
    grads: g.
    references: like `grads`, each leaf [T, ...].
    present: bool [T]; the others are not read.
    margin: see `gem`.
  """
  references = jax.tree.map(
    lambda x: jnp.where(present.reshape(-1, *[1] * (x.ndim - 1)), x, 0),
    references,
  )
  gram = _sum_over_leaves(_inner, references, references)
  products = _products(references, grads)
  bound = jnp.where(present, margin, 0).astype(products.dtype)
  # v = bound + u with u >= 0.
  shifted = products + gram @ bound
  size = jnp.sqrt(_sum_over_leaves(_vdot, grads, grads))
  dual = bound + nonnegative_qp(gram, shifted, present, size)
  moved = _add(grads, references, dual)
  opposed = (products < 0).any()
  return jax.tree.map(lambda m, g: jnp.where(opposed, m, g), moved, grads)


def project_on_one(grads: Params, reference: Params) -> Params:
  """The projection of `a_gem`; a reference of zero changes nothing."""
  product = _sum_over_leaves(_vdot, grads, reference)
  square = _sum_over_leaves(_vdot, reference, reference)
  share = product / jnp.where(square > 0, square, 1)
  opposed = (product < 0) & (square > 0)

  def one(g, r):
    moved = (_wide(g) - share * _wide(r)).astype(g.dtype)
    return jnp.where(opposed, moved, g)

  return jax.tree.map(one, grads, reference)


def _split(batch: Mapping[str, Any], rank: int):
  """The batch's own keys, and those of the memory without their prefix."""
  own, past = apart(batch)
  weight = past.get('weight')
  if weight is None or jnp.ndim(weight) != rank:
    found = 'absent' if weight is None else f'of shape {jnp.shape(weight)}'
    raise UsageError(
      f"'memory_weight' is {found}; gem reads rows [T, m, ...] per task and "
      'a_gem rows [m, ...]: use rehearse(learner, memory, size, mix=beside), '
      'for gem with task_by_task(per_task(...))'
    )
  # A memory may say with bools which rows are there.
  return own, {**past, 'weight': jnp.asarray(weight, jnp.float32)}


def _key(rng, index):
  return jax.random.fold_in(jax.random.fold_in(rng, REFERENCE), index)


def _wide(x):
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _sum_over_leaves(product, first, second):
  leaves = jax.tree.leaves(jax.tree.map(product, first, second))
  return jax.tree.reduce(operator.add, leaves)


def _rows(x):
  return _wide(x).reshape(x.shape[0], -1)


def _inner(x, y):
  # Not in the reduced precision that is a default on accelerators.
  return jnp.matmul(_rows(x), _rows(y).T, precision='highest')


def _vdot(x, y):
  return jnp.vdot(_wide(x), _wide(y), precision='highest')


def _products(references, grads):
  return _sum_over_leaves(
    lambda r, g: _inner(r, g[None])[:, 0], references, grads
  )


def _add(grads, references, dual):
  def one(g, r):
    step = jnp.tensordot(dual, _wide(r), 1, precision='highest')
    return (_wide(g) + step).astype(g.dtype)

  return jax.tree.map(one, grads, references)
