"""Operations of a traced program, loops counted as often as they run.

XLA's cost analysis counts a loop's body once, whatever its length, which hides
most of a step with inner steps.
"""

import math
from collections.abc import Iterator
from typing import Any

from jax.extend import core


def _inner(eqn: Any) -> Iterator[Any]:
  for value in eqn.params.values():
    for item in value if isinstance(value, tuple | list) else (value,):
      if isinstance(item, core.ClosedJaxpr):
        yield item.jaxpr
      elif isinstance(item, core.Jaxpr):
        yield item


def _dot(eqn: Any) -> int:
  (contracted, _), _ = eqn.params['dimension_numbers']
  shape = eqn.invars[0].aval.shape
  terms = math.prod(shape[axis] for axis in contracted)
  return 2 * terms * math.prod(eqn.outvars[0].aval.shape)


def _convolution(eqn: Any) -> int:
  numbers = eqn.params['dimension_numbers']
  kernel = eqn.invars[1].aval.shape
  terms = math.prod(kernel) // kernel[numbers.rhs_spec[0]]
  return 2 * terms * math.prod(eqn.outvars[0].aval.shape)


_COUNTED = {'dot_general': _dot, 'conv_general_dilated': _convolution}


def product_flops(jaxpr: Any, *, repeat: bool) -> int:
  """Multiplications and additions in matrix products and convolutions.

  2 m n k for a product of [m, k] and [k, n]. Of a conditional the dearest
  branch counts; a `while` whose length is not known counts once.

  Args:
    jaxpr: of `jax.jit(fun).trace(*args).jaxpr`.
    repeat: whether a scan's body counts as often as it runs, or once.
  """
  if isinstance(jaxpr, core.ClosedJaxpr):
    jaxpr = jaxpr.jaxpr
  total = 0
  for eqn in jaxpr.eqns:
    name = eqn.primitive.name
    if name in _COUNTED:
      total += _COUNTED[name](eqn)
      continue
    inside = [product_flops(inner, repeat=repeat) for inner in _inner(eqn)]
    if name == 'cond':
      total += max(inside, default=0)
    else:
      times = eqn.params['length'] if repeat and name == 'scan' else 1
      total += times * sum(inside)
  return total
