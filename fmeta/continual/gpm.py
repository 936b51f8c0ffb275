"""Gradient projection memory: kernels move where past inputs are not."""

import jax
import jax.numpy as jnp

from fmeta import tree
from fmeta.continual.inputs import (
  check_dense,
  dense_inputs,
  empty_basis,
  grown,
  wide,
  without,
)
from fmeta.errors import UsageError, check_number
from fmeta.penalty import no_penalty
from fmeta.types import Params, Penalty, Scalar


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
    return {'basis': jax.tree.map(empty_basis, kernels)}

  def direct(grads, state):
    held = dict(zip(_names(state), jax.tree.leaves(state), strict=True))
    owner = {_bias_of(name): name for name in held}

    def one(name, grad):
      if name in held:
        free = without(held[name], grad.astype(wide(grad.dtype)))
        return free.astype(grad.dtype)
      if name in owner:
        # The first column is there as soon as any is.
        return jnp.where(held[owner[name]][:, 0].any(), 0, grad)
      return grad

    return tree.map_with_name(one, grads)

  def consolidate(state, trainable, params, model_state, forward, batches, rng):
    del trainable, rng
    names, batches = _names(state), list(batches)
    if not batches or not names:
      return state
    seen = dense_inputs(forward, names, params, model_state, batches)
    basis = tree.map_with_name(
      lambda name, held: grown(held, seen[name], energy), state['basis']
    )
    return {'basis': basis}

  return no_penalty()._replace(
    init=init, direct=direct, consolidate=consolidate
  )


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
    check_dense(name, leaf)
  return kernels
