"""Layers that only the outer loop moves: T-Nets and warped gradients.

An inner loop of `tuning=select(...)` leaves the rest of the model to the
outer loop. If the rest are layers between those that move (WarpGrad:
Flennerhag et al. 2020, https://arxiv.org/abs/1909.00025, section 2.3), what
they learn is the geometry of the inner loop: nothing more is needed than the
pattern. T-Nets add such a layer to every layer of a given model.
"""

import jax.numpy as jnp

from fmeta import tree
from fmeta.adapters.siblings import collect, grow, owners, without
from fmeta.errors import UsageError
from fmeta.types import Forward, Params

WARP = '.warp'


def warp_init(params: Params, patterns: tuple[str, ...]) -> Params:
  """Adds an identity `kernel.warp` [out, out] to each matching kernel.

  Outer parameters of a `warped` model. The inner tuning names what moves
  without them: `select('.*/(kernel|bias)')`.

  Args:
    params: full parameters.
    patterns: of kernels whose last axis is the layer's outputs.

  Raises:
    UsageError: if a pattern matches nothing, or a leaf has one axis only.
  """
  added = {}
  for name in owners(params, patterns):
    kernel = tree.get(params, name)
    if kernel.ndim < 2:
      raise UsageError(
        f'{name!r} of shape {kernel.shape} is no kernel; give patterns such as '
        "'.*/kernel'"
      )
    added[name + WARP] = jnp.eye(kernel.shape[-1], dtype=kernel.dtype)
  return grow(params, added)


def warped(forward: Forward) -> Forward:
  """A T-Net: every warped layer computes x W T instead of x W.

  With T held still, a step of SGD on W moves W T by -rate G T'T with G the
  gradient at W T: T'T is a learned metric (Lee & Choi 2018,
  https://arxiv.org/abs/1801.05558, section 3.2, without their masks).

  Args:
    forward: of the model without warps; it never sees them.
  """

  def run(params, model_state, batch, rng):
    warps = collect(params, WARP)
    kernels = {name: tree.get(params, name) @ warps[name] for name in warps}
    model = grow(without(params, (WARP,)), kernels)
    return forward(model, model_state, batch, rng)

  return run
