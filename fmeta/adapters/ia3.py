"""(IA)^3: learned scalings of activations.

A scaling is a leaf beside its kernel: `kernel.ia3_scale` of its outputs,
`kernel.ia3_input_scale` of its inputs.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import jax.numpy as jnp

from fmeta import tree
from fmeta.adapters import siblings
from fmeta.adapters.norms import running_statistics
from fmeta.errors import UsageError
from fmeta.tuning import keep_under
from fmeta.types import Array, Params, Tuning

OUT, IN = '.ia3_scale', '.ia3_input_scale'
SUFFIXES = (OUT, IN)


def ia3_init(
  params: Params, patterns: tuple[str, ...], inputs: tuple[str, ...] = ()
) -> dict:
  """The parameters with scalings, all ones, beside the matching kernels.

  Args:
    params: full parameters; matching kernels are [..., in, out].
    patterns: full-match regular expressions of kernels whose outputs are
      scaled, by `kernel.ia3_scale` [out].
    inputs: the same for inputs, by `kernel.ia3_input_scale` [in].

  Raises:
    UsageError: if a pattern matches nothing or a leaf is no kernel.
  """
  leaves = {}
  for chosen, suffix, axis in ((patterns, OUT, -1), (inputs, IN, -2)):
    for name in siblings.owners(params, chosen):
      kernel = tree.get(params, name)
      if kernel.ndim < 2 or name.split('/')[-1] != 'kernel':
        raise UsageError(
          f'ia3 needs kernels [..., in, out], but {name!r} has shape '
          f'{kernel.shape}; narrow the pattern'
        )
      leaves[name + suffix] = jnp.ones(kernel.shape[axis], kernel.dtype)
  return siblings.grow(params, leaves)


def _merge(trainable: Params, frozen: Params) -> Params:
  """W' = diag(l_in) W diag(l_out) and b' = l_out b, exactly."""
  base = tree.combine(frozen, siblings.without(trainable, SUFFIXES))
  out = siblings.collect(trainable, OUT)
  into = siblings.collect(trainable, IN)
  of_bias = {name.removesuffix('kernel') + 'bias': name for name in out}

  def scaled(name, leaf):
    if name in into:
      leaf = leaf * _along(into[name], leaf.ndim, -2)
    if name in out:
      leaf = leaf * _along(out[name], leaf.ndim, -1)
    return leaf * out[of_bias[name]] if name in of_bias else leaf

  return tree.map_with_name(scaled, base)


def _along(scale: Array, ndim: int, axis: int) -> Array:
  shape = [1] * ndim
  shape[axis] = -1
  return scale.reshape(shape)


@contextmanager
def _scaled_activations(trainable, frozen) -> Iterator[Params]:
  import flax.linen as nn

  base = tree.combine(frozen, siblings.without(trainable, SUFFIXES))
  shapes = siblings.tree_shapes(base)
  out = siblings.collect(trainable, OUT)
  into = siblings.collect(trainable, IN)
  entered = set()

  def interceptor(next_fun, args, kwargs, context):
    module = context.module
    name = '/'.join((*module.path, 'kernel'))
    if (
      context.method_name != '__call__'
      or name not in out | into
      or not isinstance(module, nn.Dense | nn.Conv)
    ):
      return next_fun(*args, **kwargs)
    siblings.check_unrolled(module, name, shapes[name])
    entered.add(name)
    inputs = args[0] if args else kwargs['inputs']
    if name in into:
      inputs = _times(inputs, into[name])
    outputs = next_fun(inputs)
    return _times(outputs, out[name]) if name in out else outputs

  with (
    nn.intercept_methods(interceptor),
    running_statistics(trainable, frozen),
  ):
    yield base
  missed = sorted((set(out) | set(into)) - entered)
  if missed:
    raise UsageError(
      f'ia3 scalings of {missed[0]!r} (and {len(missed) - 1} more) never '
      'entered an nn.Dense or nn.Conv; narrow the pattern'
    )


def _times(x: Array, scale: Array) -> Array:
  # A layer that computes in bf16 stays bf16.
  return (x * _along(scale, x.ndim, -1)).astype(x.dtype)


def ia3(
  *patterns: str, inputs: tuple[str, ...] = (), also: tuple[str, ...] = ()
) -> Tuning:
  """(IA)^3, infused adapter by inhibiting and amplifying activations.

    k = l_k * (x W_k + b_k),  v = l_v * (x W_v + b_v),
    h = (l_ff * gelu(x W_1 + b_1)) W_2 + b_2

  with frozen W, b and every l starting at 1 (Liu et al. 2022,
  https://arxiv.org/abs/2205.05638, section 3.3). For our BERT:

    ia3('body/layer_.*/attention/(key|value)/kernel',
        inputs=('body/layer_.*/mlp/down/kernel',), also=('head/.*',))

  No full-size weight gradient is formed. A scaled output of a dense layer or
  convolution is a dense layer or convolution, so `merge` is exact: columns of
  the kernel and the bias are multiplied by `ia3_scale`, the kernel's rows by
  `ia3_input_scale`.

  Args:
    *patterns: full-match regular expressions of kernels whose outputs are
      scaled.
    inputs: the same for inputs; the second kernel of an MLP.
    also: patterns of ordinary parameters that move too, such as a new head.

  Raises:
    UsageError: if a pattern matches nothing, a leaf is no kernel, or a kernel
      does not belong to an `nn.Dense` or `nn.Conv`.
  """
  if not patterns + inputs:
    raise UsageError('ia3 without a pattern; name kernels to scale')
  init = siblings.splitter(
    lambda params, rng: ia3_init(params, patterns, inputs), SUFFIXES, also
  )
  return Tuning(init, _merge, keep_under, _scaled_activations)
