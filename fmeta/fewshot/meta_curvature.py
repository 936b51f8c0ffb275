"""Meta-curvature: learned matrices that turn the inner gradient."""

import math

import jax
import jax.numpy as jnp
import optax

from fmeta import tree
from fmeta.errors import UsageError, suggest
from fmeta.types import Array, Params

AXES = ('space', 'in', 'out')


def _as_three(leaf: Array) -> tuple[int, int, int]:
  """(positions, inputs, outputs) of a leaf; vectors have outputs only."""
  *space, inputs, outputs = (1, 1, *leaf.shape)
  return math.prod(space), inputs, outputs


def curvature_init(trainable: Params) -> Params:
  """Identities per leaf: `{'space', 'in', 'out'}`, each [size, size].

  An axis of size one gets none: its matrix would be another learning rate.

  Args:
    trainable: what the inner loop moves, `tuning.init(params, key)[0]`.
  """

  def identities(leaf):
    sizes = zip(AXES, _as_three(leaf), strict=True)
    return {
      axis: jnp.eye(size, dtype=leaf.dtype) for axis, size in sizes if size > 1
    }

  return jax.tree.map(identities, trainable)


def meta_curvature(matrices: Params) -> optax.GradientTransformation:
  """Multiplies a gradient by a learned matrix along each of its axes.

    MC(G)[s, i, o] = sum_{s', i', o'} S[s, s'] M[i, i'] O[o, o'] G[s', i', o']

  with s the positions of a convolution's kernel, i inputs, o outputs (Park &
  Oliva 2019, https://arxiv.org/abs/1902.03356, section 3.1). It comes first in
  a chain:

    hyper -> finetune(loss, optax.chain(meta_curvature(hyper), sgd(rate)))

  Args:
    matrices: from `curvature_init`; may be traced.

  Raises:
    UsageError: in the trace, if a trainable leaf has no matrices.
  """
  known = {name.rpartition('/')[0] for name in tree.names(matrices)}

  def turned(name, grad):
    sizes = _as_three(grad)
    if name not in known:
      if max(sizes) == 1:
        return grad
      raise UsageError(
        f'no matrices for {name!r}; make them with curvature_init on the '
        f'same tuning{suggest(name, known)}'
      )
    given, out = tree.get(matrices, name), grad.reshape(sizes)
    for axis, (key, size) in enumerate(zip(AXES, sizes, strict=True)):
      if size > 1:
        moved = jnp.tensordot(given[key], out, (1, axis), precision='highest')
        out = jnp.moveaxis(moved, 0, axis)
    return out.reshape(grad.shape)

  return optax.stateless(
    lambda updates, params: tree.map_with_name(turned, updates)
  )
