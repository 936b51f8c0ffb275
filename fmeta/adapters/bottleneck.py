"""Bottleneck adapters: a small residual MLP behind a layer.

Its leaves stand beside the kernel of the layer that it follows:
`kernel.adapter_down`, `kernel.adapter_up` and their biases.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from fmeta import tree
from fmeta.adapters import entry, siblings
from fmeta.errors import UsageError
from fmeta.types import Array, Params, Tuning

SUFFIXES = DOWN, DOWN_BIAS, UP, UP_BIAS = (
  '.adapter_down',
  '.adapter_down_bias',
  '.adapter_up',
  '.adapter_up_bias',
)
# Standard deviation of `down`, truncated at two of them (Houlsby et al. 2019,
# section 3.6).
STD = 1e-2


def bottleneck_init(
  params: Params, rng: Array, patterns: tuple[str, ...], width: int
) -> dict:
  """The parameters with an adapter beside every matching leaf.

  `down` is a truncated normal and `up` is zero, so the model starts
  unchanged.

  Args:
    params: full parameters; an adapter's size is the leaf's last axis.
    rng: key; each adapter's own key depends on its name only.
    patterns: full-match regular expressions, one leaf of each layer.
    width: of the bottleneck, at least 1.

  Raises:
    UsageError: if a pattern matches nothing, two leaves of one layer match,
      or the width is below 1.
  """
  if width < 1:
    raise UsageError(f'bottleneck width {width}; give at least 1')
  names = siblings.owners(params, patterns)
  _check_one_per_module(names)
  leaves = {}
  for name in names:
    leaf = tree.get(params, name)
    key, size = siblings.key_for(rng, name), leaf.shape[-1]
    down = jax.random.truncated_normal(key, -2, 2, (size, width), leaf.dtype)
    leaves[name + DOWN] = STD * down
    leaves[name + DOWN_BIAS] = jnp.zeros(width, leaf.dtype)
    leaves[name + UP] = jnp.zeros((width, size), leaf.dtype)
    leaves[name + UP_BIAS] = jnp.zeros(size, leaf.dtype)
  return siblings.grow(params, leaves)


def _check_one_per_module(names):
  paths = [siblings.module_path(name) for name in names]
  for name, path in zip(names, paths, strict=True):
    if paths.count(path) > 1:
      raise UsageError(
        f'{name!r} and another leaf of {path!r} would both get an adapter; '
        'let the pattern match one leaf of each layer, such as its kernel'
      )


def _residual(x: Array, down: Array, bias: Array, up: Array, last: Array):
  inner = jax.nn.gelu(x @ down + _row(bias, x), approximate=False)
  # A layer that computes in bf16 stays bf16.
  return x + (inner @ up + _row(last, x)).astype(x.dtype)


def _row(bias, x):
  return bias.reshape((1,) * (x.ndim - 1) + bias.shape)


def enter(leaves: entry.Leaves, shapes: Mapping) -> entry.Interceptor:
  """Puts each adapter behind the layer that owns it; see `entering`."""
  by_path = {siblings.module_path(name): name for name in leaves[DOWN]}

  def interceptor(next_fun, args, kwargs, context):
    outputs = next_fun(*args, **kwargs)
    name = by_path.get('/'.join(context.module.path))
    if name is None or context.method_name != '__call__':
      return outputs
    siblings.check_unrolled(context.module, name, shapes[name])
    mine = (entry.note(name + s, leaves[s][name]) for s in SUFFIXES)
    return _residual(outputs, *mine)

  return interceptor


def bottleneck(
  *patterns: str, width: int = 64, also: tuple[str, ...] = ()
) -> Tuning:
  """Bottleneck adapters behind layers of a frozen model.

    y <- y + gelu(y D + d) U + u

  for the output y of every layer one of whose leaves matches (Houlsby et al.
  2019, https://arxiv.org/abs/1902.00751, section 2.1; gelu as in their code).
  In our BERT, behind both sublayers of every block and before the residual,
  with the norms and the head trained as in the paper:

    bottleneck('body/layer_.*/(attention/output|mlp/down)/kernel',
               also=('.*/norm/.*', 'head/.*'))

  With `mlp/down` alone there is one adapter in a block, behind its MLP, where
  Pfeiffer et al. 2021 (https://arxiv.org/abs/2005.00247) found one to do.
  The adapter comes before the layer's dropout, there after it. A convolution
  gets a 1x1 adapter over its channels.

  This is no function of the kernels: `merge` gives the parameters with the
  adapters' leaves, which `models.forward` and `adapters.entering` run.

  Args:
    *patterns: full-match regular expressions, one leaf of each layer.
    width: of the bottleneck; 64 is their one size for all of GLUE (section
      3.2).
    also: patterns of ordinary parameters that move too.

  Raises:
    UsageError: if a pattern matches nothing, two leaves of one layer match,
      or, in the first step, if the model did not run the adapters.
  """

  def born(params, rng):
    return bottleneck_init(params, rng, patterns, width)

  return entry.entering_tuning(born, SUFFIXES, also)
