"""Linen layers run with W' = g (W + a b), without forming W'.

x W' is g (x W + (x a) b): two skinny products beside the frozen one, and no
full-size gradient of W in the backward pass. The same holds for a row of a
table and, with a as a convolution of `rank` channels, for a convolution.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fmeta.errors import UsageError
from fmeta.types import Array


class Change(NamedTuple):
  """W' = gain (W + a b).

  Attributes:
    a: [..., rank], all axes of W but its last.
    b: [rank, out].
    gain: [out], or None for ones.
  """

  a: Array
  b: Array
  gain: Array | None = None

  def apply(self, kernel: Array) -> Array:
    """W' itself."""
    kernel = kernel + self.a @ self.b
    return kernel if self.gain is None else self._gained(kernel)

  def add(self, outputs: Array, narrow: Array) -> Array:
    """gain (outputs + narrow b), of rows [N, out] and [N, rank]."""
    # A layer that computes in bf16 stays bf16.
    outputs = outputs + (narrow @ self.b).astype(outputs.dtype)
    return outputs if self.gain is None else self._gained(outputs)

  def _gained(self, x: Array) -> Array:
    assert self.gain is not None
    gain = self.gain.reshape((1,) * (x.ndim - 1) + (-1,))
    return x * gain.astype(x.dtype)


def rows(x: Array) -> Array:
  """[..., n] -> [N, n].

  A trap in XLA on CPU: the gradient of a kernel contracts over all leading
  axes, and with two of them the gradient of the outputs is first copied into
  transposed order, with the derivative of the activation inlined in the
  strided loop: 40 % of a LoRA step of MiniLM (2026-11-24). One leading axis
  needs no copy.
  """
  return x.reshape(-1, x.shape[-1])


@contextmanager
def _instead(module: Any, attribute: str, value: Any) -> Iterator[None]:
  """Sets an attribute of a bound linen module for the length of a call."""
  before = getattr(module, attribute)
  object.__setattr__(module, attribute, value)
  try:
    yield
  finally:
    object.__setattr__(module, attribute, before)


def _dense(change: Change, next_fun, module, args, kwargs):
  plain = module.dot_general or jax.lax.dot_general

  def product(x, kernel, dims, **options):
    del dims  # the last axis of x with the first of the kernel
    flat = rows(x)
    outputs = plain(flat, kernel, (((1,), (0,)), ((), ())), **options)
    outputs = change.add(outputs, flat @ rows(change.a))
    return outputs.reshape(*x.shape[:-1], -1)

  with _instead(module, 'dot_general', product):
    return next_fun(*args, **kwargs)


def _conv(change: Change, next_fun, module, args, kwargs):
  plain = module.conv_general_dilated or jax.lax.conv_general_dilated
  if module.feature_group_count != 1:
    raise UsageError(
      f'{"/".join(module.path)!r} is a convolution in groups, where a low-rank '
      'kernel is no low-rank convolution; use run_merged(...) or lora_merged'
    )

  def product(x, kernel, *where, **options):
    outputs = plain(x, kernel, *where, **options)
    narrow = plain(x, change.a.astype(x.dtype), *where, **options)
    added = change.add(rows(outputs), rows(narrow))
    return added.reshape(outputs.shape)

  with _instead(module, 'conv_general_dilated', product):
    return next_fun(*args, **kwargs)


def _lookup(change: Change, next_fun, module, args, kwargs):
  del module
  outputs = next_fun(*args, **kwargs)
  ids = args[0] if args else kwargs['inputs']
  narrow = jnp.take(change.a, ids.reshape(-1), axis=0)
  return change.add(rows(outputs), narrow).reshape(outputs.shape)


def _attend(change: Change, next_fun, module, args, kwargs):
  """Outputs tied to a table: q W'^T = (g q) W^T + ((g q) b^T) a^T."""
  del module
  query = args[0] if args else kwargs['query']
  query = query if change.gain is None else change._gained(query)
  outputs = next_fun(query)
  added = (rows(query) @ change.b.T) @ change.a.T
  return outputs + added.reshape(outputs.shape).astype(outputs.dtype)


def _way_in(module: Any, method: str) -> tuple[str, Callable] | None:
  """The leaf that a call of this layer uses, and how it is changed there."""
  import flax.linen as nn

  if isinstance(module, nn.Embed):
    ways = {'__call__': _lookup, 'attend': _attend}
    return ('embedding', ways[method]) if method in ways else None
  if method != '__call__':
    return None
  if isinstance(module, nn.Conv):
    plain = module.conv_general_dilated_cls is None and module.mask is None
    return ('kernel', _conv) if plain else None
  if isinstance(module, nn.Dense):
    return ('kernel', _dense) if module.dot_general_cls is None else None
  # A layer of your own: `dot_general` times the kernel as a matrix.
  return ('kernel', _dense) if hasattr(module, 'kernel_as_matrix') else None


@contextmanager
def enter(changes: Mapping[str, Change]) -> Iterator[None]:
  """Runs the layers whose leaves are named with those leaves changed.

  Entered are `nn.Dense`, `nn.Conv` without groups, `nn.Embed` (lookups and
  `attend`), and any module with the attributes `kernel_as_matrix` and
  `dot_general` that calls the latter as `nn.Dense` does, on
  `kernel.reshape(-1, out)`.

  Raises:
    UsageError: on leaving, if a named leaf was not used by such a layer.
  """
  import flax.linen as nn

  entered = set()

  def interceptor(next_fun, args, kwargs, context):
    way = _way_in(context.module, context.method_name)
    name = '/'.join((*context.module.path, way[0])) if way else ''
    if way is None or name not in changes:
      return next_fun(*args, **kwargs)
    entered.add(name)
    run = functools.partial(way[1], changes[name])
    return run(next_fun, context.module, args, kwargs)

  with nn.intercept_methods(interceptor):
    yield
  missed = sorted(set(changes) - entered)
  if missed:
    raise UsageError(
      f'the factors of {missed[0]!r} (and {len(missed) - 1} more) never '
      'entered an nn.Dense, nn.Conv or nn.Embed; use lora_merged, or '
      'run_merged(...) around another tuning'
    )
