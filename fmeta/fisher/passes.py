"""One forward pass of a batch, kept for gradients of each example."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fmeta import tree
from fmeta.errors import UsageError
from fmeta.fisher.labels import Labels
from fmeta.fisher.rows import is_known, sum_of_squares
from fmeta.fisher.uses import Use, only_use, run
from fmeta.types import Array, Batch, Forward, ModelState, Params

ByName = Mapping[str, Array]


class Program(NamedTuple):
  """A model on one example, as a program.

  Attributes:
    closed: takes the leaves of (moving, params, model_state, row) and gives
      log-probabilities [classes].
    names: of the moving leaves, the first inputs.
    uses: name -> its only use, for those that `fisher.rows` knows.
  """

  closed: Any
  names: tuple[str, ...]
  uses: Mapping[str, Use]


class Pass(NamedTuple):
  """What a forward pass of B examples leaves behind.

  Attributes:
    program: what was run.
    log_probs: [B, classes].
    inputs: name -> [B, ...], what met a leaf in its only use.
    pullback: cotangents [B, classes] -> (name -> [B, ...], cotangents of the
      result of the leaf's use; name -> [B, *leaf], gradients of the other
      leaves).
  """

  program: Program
  log_probs: Array
  inputs: ByName
  pullback: Callable[[Array], tuple[ByName, ByName]]


def program_of(
  forward: Forward,
  params: Params,
  moving: Params,
  model_state: ModelState,
  batch: Batch,
) -> Program:
  """Traces the model on one example, in evaluation mode.

  Raises:
    UsageError: if its outputs are not [1, classes].
  """

  def log_probs(moving, params, model_state, row):
    full = tree.combine(params, moving)
    outputs, _ = forward(full, model_state, row, None)
    if jnp.ndim(outputs) != 2 or len(outputs) != 1:
      raise UsageError(
        f'outputs of one example have the shape {jnp.shape(outputs)}; a '
        'Fisher needs logits [B, classes]'
      )
    return jax.nn.log_softmax(outputs[0])

  def one(x):
    return jax.ShapeDtypeStruct((1, *jnp.shape(x)[1:]), jnp.result_type(x))

  row = jax.tree.map(one, dict(batch))
  closed = jax.make_jaxpr(log_probs)(moving, params, model_state, row)
  names = tuple(tree.names(moving))
  found = {
    name: only_use(closed.jaxpr, variable)
    for name, variable in zip(names, closed.jaxpr.invars, strict=False)
  }
  known = {name: use for name, use in found.items() if use and is_known(use)}
  return Program(closed, names, known)


def passed(
  forward: Forward,
  params: Params,
  moving: Params,
  model_state: ModelState,
  batch: Batch,
) -> Pass:
  """Runs the model on every example of a batch by itself.

  Examples are an axis of `vmap`, so nothing has to guess where a model puts
  them. A leaf whose use is not known is given to each example as its own
  copy, whose gradient is that example's.
  """
  program = program_of(forward, params, moving, model_state, batch)
  leaves = dict(zip(program.names, jax.tree.leaves(moving), strict=True))
  size = jax.tree.leaves(batch)[0].shape[0]
  rest = jax.tree.leaves((params, model_state))
  rows = [jnp.asarray(x)[:, None] for x in jax.tree.leaves(dict(batch))]

  def of_row(shifts, own, rows):
    return _of_row(program, {**leaves, **own}, rest, rows, shifts)

  def of_batch(shifts, own):
    return jax.vmap(of_row)(shifts, own, rows)

  shifts = {
    name: jnp.zeros((size, *aval.shape), aval.dtype)
    for name, use in program.uses.items()
    for aval in [use.equation.outvars[0].aval]
  }
  own = {
    name: jnp.broadcast_to(leaf, (size, *jnp.shape(leaf)))
    for name, leaf in leaves.items()
    if name not in shifts
  }
  log_probs, pullback, inputs = jax.vjp(of_batch, shifts, own, has_aux=True)
  return Pass(program, log_probs, inputs, pullback)


def _of_row(program, leaves, rest, rows, shifts):
  paths = {name: use.path for name, use in program.uses.items()}
  (log_probs,), noted = run(
    program.closed.jaxpr,
    program.closed.consts,
    [*(leaves[name] for name in program.names), *rest, *rows],
    {paths[name]: shift for name, shift in shifts.items()},
    {use.path: use.other for use in program.uses.values()},
  )
  return log_probs, {name: noted[path] for name, path in paths.items()}


def squares(one: Pass, cotangents: Array, moving: Params) -> Params:
  """sum_i g_i^2 of a pass's examples, shaped like `moving`.

  Args:
    one: the pass.
    cotangents: [B, classes].
    moving: the leaves.
  """
  slopes, gradients = one.pullback(cotangents)

  def of_leaf(name, leaf):
    if name in gradients:
      return jnp.square(gradients[name]).sum(0)
    use = one.program.uses[name]
    total = sum_of_squares(use, one.inputs[name], slopes[name])
    return use.back(total, leaf.shape).astype(leaf.dtype)

  return tree.map_with_name(of_leaf, moving)


def over_labels(
  labels: Labels,
  one: Pass,
  batch: Batch,
  keys: Array,
  real: Array,
  of_cotangents: Callable[[Array], Any],
) -> Any:
  """Sums something over the backward passes that `labels` asks for.

  Args:
    labels: from `fisher.labels`.
    one: the pass.
    batch: the examples.
    keys: [B], a key for each.
    real: bool [B]; False for padding, whose cotangents are zero.
    of_cotangents: `[B, classes] -> pytree`.
  """
  rounds, cotangents = labels(one.log_probs, batch, keys)

  def of_round(k):
    return of_cotangents(jnp.where(real[:, None], cotangents(k), 0))

  if rounds == 1:
    return of_round(jnp.zeros((), jnp.int32))

  def body(total, k):
    return jax.tree.map(jnp.add, total, of_round(k)), None

  shapes = jax.eval_shape(of_round, jnp.zeros((), jnp.int32))
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
  return jax.lax.scan(body, zeros, jnp.arange(rounds))[0]


def without_padding(batch: Batch) -> tuple[Batch, Array]:
  """The batch with a real row in place of each padding row, and which were.

  Whatever padding holds, infinities included, is then never computed with.
  """
  size = jax.tree.leaves(batch)[0].shape[0]
  real = jnp.asarray(batch.get('weight', jnp.ones(size))) > 0
  index = jnp.where(real, jnp.arange(size), jnp.argmax(real))
  return jax.tree.map(lambda x: jnp.asarray(x)[index], dict(batch)), real


def keys_of(rng: Array, count: Array, real: Array) -> Array:
  """A key per example: that of example number n is `fold_in(rng, n)`.

  Args:
    rng: root key.
    count: examples of earlier batches.
    real: bool [B]; padding is not numbered.
  """
  numbers = count + jnp.cumsum(real) - real
  return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(rng, numbers)
