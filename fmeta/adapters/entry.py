"""Adapters that the model itself has to run.

A bottleneck, a prefix or a prompt cannot be folded into a kernel, so the
merged parameters of such a tuning still hold its leaves: the function is
(forward, parameters), and the forward pass has to know what the leaves mean.
Every `models.forward` does; one written by hand learns it from
`adapters.entering`. A frozen adapter is then just a frozen parameter, and
evaluation, a Fisher or a distillation that calls
`forward(learner.params(state), ...)` sees the adapted model.
`check_exportable` refuses such leaves where a format has no place for them.
"""

from collections.abc import Callable, Mapping
from contextlib import contextmanager
from typing import Any

from fmeta import tree
from fmeta.adapters import siblings
from fmeta.adapters.norms import running_statistics
from fmeta.errors import UsageError
from fmeta.tuning import keep_under
from fmeta.types import Array, Params, Tuning

# {suffix: {owner: leaf}}
Leaves = Mapping[str, Mapping[str, Array]]
# (next_fun, args, kwargs, context) -> outputs, as flax.linen calls it.
Interceptor = Callable[..., Any]

# Every (leaf, shape) that has entered a model. A memo and not a state: under
# `jit` or `checkpoint` a model is traced once and its Python never runs again.
_ENTERED: set[tuple[str, tuple[int, ...]]] = set()


def note(name: str, leaf: Array) -> Array:
  """The leaf, remembered as one that has entered a model."""
  _ENTERED.add((name, tuple(leaf.shape)))
  return leaf


def check_entered(params: Params, suffixes: tuple[str, ...]) -> None:
  """Refuses leaves that no model has run with.

  Args:
    params: only leaves of these suffixes are looked at.
    suffixes: of their names.

  Raises:
    UsageError: naming the first.
  """
  missed = [
    name
    for name, shape in siblings.tree_shapes(params).items()
    if name.endswith(suffixes) and (name, shape) not in _ENTERED
  ]
  if missed:
    raise UsageError(
      f'{missed[0]!r} (and {len(missed) - 1} more) never entered the model: '
      'use models.forward, or wrap your own Forward in adapters.entering, '
      'and see that the model has such a place'
    )


def entering_tuning(
  born: siblings.Born, suffixes: tuple[str, ...], also: tuple[str, ...]
) -> Tuning:
  """The `Tuning` of leaves that a forward pass enters by itself.

  `merge` returns the parameters with the leaves. Running a model that leaves
  them out is an error, not another function.

  Args:
    born: `(params, rng) -> params` with the leaves.
    suffixes: of their names.
    also: patterns of ordinary parameters that move too.
  """

  @contextmanager
  def intercept(trainable, frozen):
    with running_statistics(trainable, frozen):
      yield tree.combine(frozen, trainable)
    check_entered(trainable, suffixes)

  return Tuning(
    init=siblings.splitter(born, suffixes, also),
    merge=lambda trainable, frozen: tree.combine(frozen, trainable),
    keep=keep_under,
    intercept=intercept,
  )


def check_exportable(params: Params, what: str) -> None:
  """Refuses parameters with an adapter's leaves.

  Args:
    params: what is about to be written.
    what: names the format in the error.

  Raises:
    UsageError: naming the leaf.
  """
  extra = [name for name in tree.names(params) if siblings.is_sibling(name)]
  if extra:
    raise UsageError(
      f'{what} has no place for {extra[0]!r} (and {len(extra) - 1} more '
      'leaves of an adapter), and the model without them is another function; '
      'keep the parameters whole, or use a tuning that merges (lora, ia3)'
    )
