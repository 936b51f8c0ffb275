"""How the gradient of the objective is taken.

Each function returns something with the contract of
`jax.value_and_grad(fun, has_aux=True)` for objectives of the form
`fun(trainable, frozen, model_state, batch, rng) -> (scalar, Aux)`.

All of them end in `plain`, and `taken_by` says what `plain` is while an inner
loop is traced (see `fmeta.through`).
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun

from fmeta.errors import UsageError
from fmeta.types import Aux, ValueAndGrad

# JAX's own kind of context: a function jitted under one value is traced again
# under another.
_innermost = jax.make_user_context()


def reverse(fun):
  """Reverse mode: `jax.value_and_grad` with the auxiliary output."""
  return jax.value_and_grad(fun, has_aux=True)


def plain(fun):
  """What `taken_by` says, else reverse mode."""
  return (_innermost.value or reverse)(fun)


@contextlib.contextmanager
def taken_by(value_and_grad: ValueAndGrad) -> Iterator[None]:
  """Within it, `plain` is `value_and_grad`, also inside other wrappers.

  `accumulate`, `sharpness_aware` and the like call `plain` on a scalar, so a
  method that relies on a symmetric Hessian is right inside all of them.
  """
  with _innermost(value_and_grad):
    yield


def mixed_mode(fun):
  """Reverse mode whose own derivative is forward over reverse.

  With g(t, z) = grad_t L(t, z), the cotangent v of g gives those of both

    (dg/dt)' v = d/de grad_t L(t + e v, z),
    (dg/dz)' v = d/de grad_z L(t + e v, z),  at e = 0,

  because second derivatives are symmetric: one jvp of one gradient, which
  keeps two copies of what a gradient keeps, where reverse over reverse keeps
  the backward pass as well (Kemaev et al. 2025,
  https://arxiv.org/abs/2505.00793, section 3). Between the passes nothing but
  the arguments is kept. It cannot be differentiated by forward mode.
  """

  def wrapped(*args):
    outside, call = hoisted(fun, *args)

    @jax.custom_vjp
    def valued(outside, *args):
      call_with = lambda *args: call(outside, *args)
      return jax.value_and_grad(call_with, has_aux=True)(*args)

    def forward(*primals):
      inputs = jax.tree.map(
        lambda x: x.value, primals, is_leaf=lambda x: hasattr(x, 'perturbed')
      )
      return valued(*inputs), inputs

    def backward(inputs, cotangents):
      return _pulled_back(call, inputs, *cotangents)

    valued.defvjp(forward, backward, symbolic_zeros=True)
    return valued(outside, *args)

  return wrapped


def hoisted(fun: Callable, *args: Any) -> tuple[list, Callable]:
  """`(outside, call)` with `call(outside, *args) = fun(*args)`.

  `outside` is what `fun` closes over. A rule of differentiation must get it
  as an argument: it is traced again where the closure's values are gone.
  """
  closed, out = jax.make_jaxpr(fun, return_shape=True)(*args)
  treedef = jax.tree.structure(out)

  def call(outside, *args):
    run = jaxpr_as_fun(ClosedJaxpr(closed.jaxpr, outside))
    return jax.tree.unflatten(treedef, run(*jax.tree.leaves(args)))

  return list(closed.consts), call


def _split(tree):
  """The leaves that have derivatives and the others, None in each gap."""
  is_real = lambda x: jnp.issubdtype(jnp.result_type(x), jnp.inexact)
  reals = jax.tree.map(lambda x: x if is_real(x) else None, tree)
  return reals, jax.tree.map(lambda x: None if is_real(x) else x, tree)


def _joined(reals, others):
  return jax.tree.map(
    lambda x, y: y if x is None else x,
    reals,
    others,
    is_leaf=lambda x: x is None,
  )


def _pulled_back(call, inputs, valued, along):
  """Cotangents of `inputs` from those of (value, aux) and of the gradient."""
  outside, trainable, *rest = inputs
  reals, others = _split((outside, rest))

  def outputs(trainable, reals):
    outside, rest = _joined(reals, others)
    return call(outside, trainable, *rest)

  total = None
  if not _is_zero(along):
    slopes = jax.grad(lambda *at: outputs(*at)[0], argnums=(0, 1))
    _, total = jax.jvp(
      lambda trainable: slopes(trainable, reals),
      (trainable,),
      (_filled(along),),
    )
  if not _is_zero(valued):
    # Something else reads the value, the statistics or a metric.
    _, pull = jax.vjp(lambda *at: _split(outputs(*at))[0], trainable, reals)
    more = pull(_split(_filled(valued))[0])
    total = more if total is None else jax.tree.map(jnp.add, total, more)
  if total is None:
    return jax.tree.map(lambda x: None, inputs)
  trainable, (outside, rest) = total
  return outside, trainable, *rest


def _is_symbolic(x) -> bool:
  return isinstance(x, SymbolicZero)


def _is_zero(cotangents) -> bool:
  leaves = jax.tree.leaves(cotangents, is_leaf=_is_symbolic)
  return all(_is_symbolic(x) or x.dtype == jax.dtypes.float0 for x in leaves)


def _filled(cotangents):
  return jax.tree.map(
    lambda x: jnp.zeros(x.shape, x.dtype) if _is_symbolic(x) else x,
    cotangents,
    is_leaf=_is_symbolic,
  )


def first_order(value_and_grad: ValueAndGrad = plain) -> ValueAndGrad:
  """Treats the gradient as a constant when it is differentiated itself.

  In an inner loop this makes MAML first-order MAML: the meta-gradient is the
  query gradient at the adapted weights (Finn et al. 2017,
  https://arxiv.org/abs/1703.03400, section 5.2).
  """

  def transform(fun):
    def wrapped(*args):
      (value, aux), grads = value_and_grad(fun)(*args)
      # Statistics of the support set are constants, too.
      state = jax.lax.stop_gradient(aux.model_state)
      aux = aux._replace(model_state=state)
      return (value, aux), jax.lax.stop_gradient(grads)

    return wrapped

  return transform


def accumulate(
  num_microbatches: int,
  value_and_grad: ValueAndGrad = plain,
  *,
  lanes: int = 1,
) -> ValueAndGrad:
  """Sums gradients over microbatches, exact for unequal weights.

  With microbatch means g_k over w_k units the result is
  sum_k w_k g_k / sum_k w_k, the gradient of the whole batch's mean, and not
  the mean of means. Model state is threaded through the microbatches in
  order; outputs are concatenated again.

  Of a loss of episodes it makes chunks of tasks: each chunk is differentiated
  before the next begins, so nothing of a task is kept beyond its gradient.
  (`in_chunks` maps tasks inside the loss, so that a derivative keeps every
  chunk's values.)

  Args:
    num_microbatches: divides the leading axis of every array of the batch.
    value_and_grad: how each microbatch is differentiated.
    lanes: microbatches side by side, a divisor of their number. Lane j walks
      through the j-th of as many contiguous parts of the batch, with a sum of
      its own. On a mesh give its `data` devices: each walks through its own
      rows, and they meet once, after the last.

  Raises:
    UsageError: if the batch cannot be divided, or if there is model state,
      which has an order, and more than one lane.
  """
  if lanes < 1 or num_microbatches % lanes:
    raise UsageError(
      f'{num_microbatches} microbatches do not divide into lanes={lanes}; '
      'choose a divisor'
    )

  def transform(fun):
    def one(trainable, frozen, model_state, part, rng):
      (loss, aux), grads = value_and_grad(fun)(
        trainable, frozen, model_state, part, rng
      )
      sums = jax.tree.map(
        lambda x: x * aux.weight, (loss, dict(aux.metrics), grads)
      )
      return (*sums, aux.weight), aux.model_state, aux.outputs

    def wrapped(trainable, frozen, model_state, batch, rng):
      if lanes > 1 and jax.tree.leaves(model_state):
        raise UsageError(
          f'lanes={lanes} of a model with state, which passes through the '
          'microbatches in order; choose lanes=1'
        )
      parts = jax.tree.map(lambda x: _cut(x, num_microbatches, lanes), batch)
      side_by_side = jax.vmap(one, (None, None, None, 0, 0))

      def body(carry, inputs):
        model_state, totals = carry
        index, part = inputs
        keys = jax.vmap(lambda k: jax.random.fold_in(rng, k))(index)
        at = trainable, frozen, model_state
        if lanes > 1:
          sums, _, outputs = side_by_side(*at, part, keys)
        else:
          part = jax.tree.map(lambda x: x[0], part)
          found = one(*at, part, keys[0])
          sums, outputs = jax.tree.map(lambda x: x[None], found[::2])
          model_state = found[1]
        return (model_state, jax.tree.map(jnp.add, totals, sums)), outputs

      shapes = jax.eval_shape(
        lambda: _example(fun, trainable, frozen, model_state, parts, rng)
      )
      loss, metrics, weight = shapes
      zeros = jax.tree.map(
        lambda x: jnp.zeros((lanes, *x.shape), x.dtype),
        (loss, metrics, trainable, weight),
      )
      indices = jnp.arange(num_microbatches).reshape(lanes, -1).T
      (model_state, totals), outputs = jax.lax.scan(
        body, (model_state, zeros), (indices, parts)
      )
      loss, metrics, grads, weight = jax.tree.map(lambda x: x.sum(0), totals)
      # A batch of padding only has no units and moves nothing.
      scale = 1 / jnp.where(weight > 0, weight, 1)
      loss, metrics, grads = jax.tree.map(
        lambda x: x * scale, (loss, metrics, grads)
      )
      outputs = jax.tree.map(_joined_rows, outputs)
      return (loss, Aux(model_state, metrics, weight, outputs)), grads

    return wrapped

  return transform


def _cut(x, num, lanes):
  """[B, ...] -> [num / lanes, lanes, B / num, ...], each lane contiguous."""
  if x.shape[0] % num:
    raise UsageError(
      f'{num} microbatches do not divide a batch of {x.shape[0]} rows; choose '
      'a divisor'
    )
  return x.reshape(
    lanes, num // lanes, x.shape[0] // num, *x.shape[1:]
  ).swapaxes(0, 1)


def _joined_rows(x):
  """Outputs [num / lanes, lanes, rows, ...] in the batch's order."""
  x = x.swapaxes(0, 1)
  if x.ndim > 2:
    return x.reshape(-1, *x.shape[3:])
  return x.reshape(-1)


def _example(fun, trainable, frozen, model_state, parts, rng):
  part = jax.tree.map(lambda x: x[0, 0], parts)
  loss, aux = fun(trainable, frozen, model_state, part, rng)
  return loss, dict(aux.metrics), aux.weight
