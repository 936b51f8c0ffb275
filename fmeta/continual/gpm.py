"""Gradient projection memory: kernels move where past inputs are not."""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from fmeta import tree
from fmeta.errors import UsageError, check_number
from fmeta.penalty import no_penalty
from fmeta.types import Array, Params, Penalty, Scalar


def gpm(*patterns: str, energy: Scalar) -> Penalty:
  """Projects dense kernels' gradients off the inputs of past tasks.

    dW <- dW - M M' dW

  for y = x W, with orthonormal columns M that span what past inputs x of the
  layer were. At a task's end the inputs R, one column each, are reduced to
  what M lacks, R^ = R - M M'R, and of its left singular vectors the first k
  are added, the smallest k such that

    |M M'R|^2 + |R^_k|^2 >= energy |R|^2

  (Saha et al. 2021, https://arxiv.org/abs/2103.09762, eqs. 5 to 9). The bias
  of such a layer, the weight of a constant input, stops after the first task;
  the paper's networks have none. Other leaves move freely: freeze them with
  `select`, or past inputs of later layers change through them. It holds for
  updates along the gradient: plain SGD.

  The basis of a kernel [n, out] takes 4 n^2 bytes. The inputs of all batches
  given to `consolidate` are decomposed at once: give it few.

  Args:
    *patterns: full-match regular expressions of kernels of `nn.Dense`.
    energy: the part to be spanned, in [0, 1]; their main_pmnist.py has 0.95
      for the first layer and 0.99 for the others. May be traced.

  Raises:
    UsageError: for no pattern, one that matches nothing or no kernel, an
      energy outside [0, 1], for factors
      (LoRA) of a matching kernel, and at a task's end for a kernel that no
      `nn.Dense` ran with.
  """
  if not patterns:
    raise UsageError(
      "gpm without patterns; give some, such as 'body/.*/kernel'"
    )
  check_number('gpm energy', energy, most=1)

  def init(trainable, params):
    kernels = _kernels(patterns, trainable, params)
    basis = tree.map_with_name(
      lambda name, w: jnp.zeros((len(w), len(w)), _wide(w.dtype)), kernels
    )
    return {'basis': basis}

  def direct(grads, state):
    held = dict(zip(_names(state), jax.tree.leaves(state), strict=True))
    owner = {_bias_of(name): name for name in held}

    def one(name, grad):
      if name in held:
        wide = grad.astype(_wide(grad.dtype))
        return _without(held[name], wide).astype(grad.dtype)
      if name in owner:
        # The first column is there as soon as any is.
        return jnp.where(held[owner[name]][:, 0].any(), 0, grad)
      return grad

    return tree.map_with_name(one, grads)

  def consolidate(state, trainable, params, model_state, forward, batches, rng):
    del trainable, rng
    names = tuple(_names(state))
    seen = [
      _inputs(forward, names, params, model_state, batch) for batch in batches
    ]
    if not seen or not names:
      return state
    joined = jax.tree.map(lambda *x: jnp.concatenate(x), *seen)
    basis = tree.map_with_name(
      lambda name, held: _grown(held, joined[name], energy), state['basis']
    )
    return {'basis': basis}

  return no_penalty()._replace(
    init=init, direct=direct, consolidate=consolidate
  )


def _wide(dtype):
  return jnp.promote_types(dtype, jnp.float32)


def _names(state) -> list[str]:
  return tree.names(state['basis'])


def _bias_of(kernel: str) -> str:
  return '/'.join([*kernel.split('/')[:-1], 'bias'])


def _kernels(patterns, trainable, params: Params) -> Params:
  """The trainable leaves that match, as a tree."""
  tree.check_patterns(patterns, tree.names(params))
  pairs = [(pattern, None) for pattern in patterns]
  chosen = lambda name: tree.first_match(name, pairs) is not None
  known = set(tree.names(params))
  for name in tree.names(trainable):
    owner = name.rpartition('.')[0]
    if name not in known and chosen(owner):
      raise UsageError(
        f'{name!r} moves {owner!r}, but gpm projects kernels, not their '
        'factors; use full() or select(...)'
      )
  kernels = tree.partition(trainable, chosen)[0]
  for name, leaf in zip(
    tree.names(kernels), jax.tree.leaves(kernels), strict=True
  ):
    if leaf.ndim != 2 or not name.endswith('kernel'):
      raise UsageError(
        f'{name!r} {list(leaf.shape)} is no kernel of nn.Dense, [in, out]; '
        "give patterns such as 'body/.*/kernel'"
      )
  return kernels


@functools.partial(jax.jit, static_argnums=(0, 1))
def _inputs(forward, names, params, model_state, batch) -> Mapping[str, Array]:
  """Name -> [N, in]: what each layer is run on; rows of no weight are zero."""
  import flax.linen as nn

  size = jax.tree.leaves(batch)[0].shape[0]
  real = batch.get('weight', jnp.ones(size)) > 0
  seen = {name: [] for name in names}

  def watch(next_fun, args, kwargs, context):
    name = '/'.join((*context.module.path, 'kernel'))
    called = context.method_name == '__call__'
    if isinstance(context.module, nn.Dense) and called and name in seen:
      seen[name].append(_real_rows(name, args[0], real))
    return next_fun(*args, **kwargs)

  with nn.intercept_methods(watch):
    forward(params, model_state, batch, None)
  missed = [name for name in names if not seen[name]]
  if missed:
    raise UsageError(
      f'no nn.Dense ran with {missed[0]!r}, so gpm cannot tell its inputs; '
      'leave it out of the patterns'
    )
  return {name: jnp.concatenate(found) for name, found in seen.items()}


def _real_rows(name, x, real):
  if x.shape[0] != len(real):
    raise UsageError(
      f'{name!r} is run on {x.shape}, whose first axis is not the batch of '
      f'{len(real)}; leave it out of the patterns of gpm'
    )
  x = x.astype(_wide(x.dtype)).reshape(len(real), -1, x.shape[-1])
  return jnp.where(real[:, None, None], x, 0).reshape(-1, x.shape[-1])


def _without(basis: Array, columns: Array) -> Array:
  """What is orthogonal to the basis; its columns of zeros do nothing."""
  # Not in the reduced precision that is a default on accelerators.
  within = jnp.matmul(basis.T, columns, precision='highest')
  return columns - jnp.matmul(basis, within, precision='highest')


@jax.jit
def _grown(basis: Array, inputs: Array, energy: Scalar) -> Array:
  """The basis [n, n] with the directions of inputs [N, n] that it lacks."""
  columns = inputs.astype(basis.dtype).T
  total = jnp.sum(columns**2)
  # Twice: of inputs that hardly leave the basis, rounding is much of the rest.
  rest = _without(basis, _without(basis, columns))
  left, singular, _ = jnp.linalg.svd(rest, full_matrices=False)
  # What would still lack without each; summed from the smallest on.
  lacking = jnp.cumsum(singular[::-1] ** 2)[::-1]
  rounding = max(columns.shape) * jnp.finfo(basis.dtype).eps
  real = singular > rounding * jnp.sqrt(total)
  wanted = (lacking > (1 - energy) * total) & real
  return _filled(basis, left, wanted.sum())


def _filled(basis, new, number):
  """Puts the first columns of `new` behind those of the basis."""
  held = jnp.any(basis != 0, axis=0).sum()
  place = jnp.arange(basis.shape[1]) - held
  moved = new[:, jnp.clip(place, 0, new.shape[1] - 1)]
  take = (place >= 0) & (place < number)
  return basis + jnp.where(take[None], moved, 0)
