"""Orthogonal gradient descent: steps that leave past outputs where they are."""

import functools
from collections.abc import Callable, Iterable, Sequence

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from fmeta import tree
from fmeta.errors import UsageError
from fmeta.penalty import no_penalty
from fmeta.types import Array, Batch, Params, Penalty

# (outputs of one example, its row of the batch) -> the scalar to keep.
Output = Callable[[Array, Batch], Array]


def true_logit(outputs: Array, row: Batch) -> Array:
  """The logit of the example's own class: the paper's OGD-GTL."""
  if 'label' not in row or not jnp.issubdtype(row['label'].dtype, jnp.integer):
    raise UsageError(
      f'ogd keeps the logit of an integer label; the batch has {sorted(row)}: '
      'give output=..., a function of (outputs, row)'
    )
  return outputs[row['label']]


def ogd(
  capacity: int, rows_per_task: int, output: Output = true_logit
) -> Penalty:
  """Moves only where the outputs on past examples do not, to first order.

    g <- g - B'B g

  with orthonormal rows B that span the gradients of `output` at past
  examples, each taken at the end of its task (Farajtabar et al. 2020,
  https://arxiv.org/abs/1910.07104; with `true_logit` their OGD-GTL). It holds
  for updates along the gradient: plain SGD. A gradient that depends on those
  held takes no place; when the places are taken, later ones are dropped,
  which `count == capacity` in the state shows.

  The basis takes 4 * capacity bytes per trainable parameter and belongs to
  these leaves: a phase that moves others is refused by `fmeta.retune`.

  Args:
    capacity: gradients held over the whole stream.
    rows_per_task: examples drawn at the end of each task, without
      replacement, from those that `consolidate` is given.
    output: the scalar to keep of each example.

  Raises:
    UsageError: for sizes below 1 and, at a task's end, for trainable leaves
      that are no parameters of the model (the factors of LoRA).
  """
  if min(capacity, rows_per_task) < 1:
    raise UsageError(
      f'ogd of capacity {capacity} and {rows_per_task} rows per task; give at '
      'least 1 of each'
    )

  def init(trainable, params):
    del params
    flat = _flat(trainable)
    basis = jnp.zeros((capacity, flat.size), flat.dtype)
    return {'basis': basis, 'count': jnp.zeros((), jnp.int32)}

  def direct(grads, state):
    flat = _flat(grads)
    return _unflat(_without(state['basis'], flat), grads)

  def consolidate(state, trainable, params, model_state, forward, batches, rng):
    _check_are_parameters(trainable, params)
    batches = list(batches)
    chosen = _drawn(batches, rows_per_task, rng)
    for batch, mine in zip(batches, chosen, strict=True):
      state = _extended(
        forward, output, state, trainable, params, model_state, batch, mine
      )
    return state

  return no_penalty()._replace(
    init=init, direct=direct, consolidate=consolidate
  )


def _flat(leaves: Params) -> Array:
  wide = jax.tree.map(
    lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), leaves
  )
  return ravel_pytree(wide)[0]


def _unflat(flat: Array, like: Params) -> Params:
  """The inverse of `_flat`, in each leaf's dtype."""
  leaves, structure = jax.tree.flatten(like)
  ends = [sum(x.size for x in leaves[: k + 1]) for k in range(len(leaves))]
  parts = jnp.split(flat, ends[:-1])
  shaped = [
    part.reshape(x.shape).astype(x.dtype)
    for part, x in zip(parts, leaves, strict=True)
  ]
  return jax.tree.unflatten(structure, shaped)


def _without(basis: Array, vector: Array) -> Array:
  """The part of a vector that is orthogonal to the rows; zero rows do none."""
  # Not in the reduced precision that is a default on accelerators.
  within = jnp.matmul(basis, vector, precision='highest')
  return vector - jnp.matmul(within, basis, precision='highest')


def _check_are_parameters(trainable, params):
  known = set(tree.names(params))
  strange = [name for name in tree.names(trainable) if name not in known]
  if strange:
    raise UsageError(
      f'{strange[0]!r} is no parameter of the model, so ogd cannot take the '
      'gradient of an output with respect to it; use full() or select(...)'
    )


def _drawn(batches: Iterable[Batch], rows: int, rng: Array) -> Sequence[Array]:
  """bool [B] of each batch: `rows` of all real rows, at random."""
  weights = [
    jnp.asarray(b.get('weight', jnp.ones(jax.tree.leaves(b)[0].shape[0])))
    for b in batches
  ]
  if not weights:
    return []
  real = jnp.concatenate(weights) > 0
  order = jnp.where(real, jax.random.uniform(rng, real.shape), 2.0)
  first = jnp.zeros_like(real).at[jnp.argsort(order)[:rows]].set(True) & real
  ends = [sum(map(len, weights[: k + 1])) for k in range(len(weights))]
  return jnp.split(first, ends[:-1])


# Functions are static: every task's pass is one compiled program.
@functools.partial(jax.jit, static_argnums=(0, 1))
def _extended(
  forward, output, state, trainable, params, model_state, batch, chosen
):
  """The state with the gradients of the chosen rows of a batch."""

  def value(trainable, row):
    full = tree.combine(params, trainable)
    one = jax.tree.map(lambda x: x[None], row)
    return output(forward(full, model_state, one, None)[0][0], row)

  def add(state, inputs):
    mine, row = inputs
    room = state['count'] < state['basis'].shape[0]
    grown = lambda: _with(state, _flat(jax.grad(value)(trainable, row)))
    return jax.lax.cond(mine & room, grown, lambda: state), None

  return jax.lax.scan(add, state, (chosen, dict(batch)))[0]


def _with(state, vector):
  """The state with what is new in a vector as one more orthonormal row."""
  unit = _normalised(vector)
  # Twice: of a vector that is nearly held, rounding is much of what is left.
  once = _without(state['basis'], unit)
  new = jnp.linalg.norm(once) > jnp.sqrt(jnp.finfo(unit.dtype).eps)
  again = _normalised(_without(state['basis'], _normalised(once)))
  row = jnp.where(new, again, 0)
  basis = state['basis'].at[state['count']].set(row)
  return {'basis': basis, 'count': state['count'] + new}


def _normalised(vector):
  length = jnp.linalg.norm(vector)
  return vector / jnp.where(length > 0, length, 1)
