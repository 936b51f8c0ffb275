"""Frozen normalisation layers in linen models."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager

from fmeta import tree
from fmeta.tuning import is_moving
from fmeta.types import Params


@contextmanager
def running_statistics(trainable: Params, frozen: Params) -> Iterator[None]:
  """Makes each linen BatchNorm without a trainable leaf use running averages.

  It applies to `flax.linen.BatchNorm` and to any module with an attribute
  `use_running_average`, whether that is set on the module or given to the
  call. Which modules are frozen is `tuning.is_moving`'s to say, so the
  statistics that `keep_under` holds still are the ones used.
  """
  import flax.linen as nn

  moving = tree.names(trainable)
  still = tree.names(frozen)

  def interceptor(next_fun, args, kwargs, context):
    module = context.module
    if (
      context.method_name != '__call__'
      or not hasattr(module, 'use_running_average')
      or is_moving(module.path, moving, still)
    ):
      return next_fun(*args, **kwargs)
    # The flag may come by attribute, position or keyword, and linen refuses
    # two of them, so the attribute alone speaks for the length of the call.
    call = inspect.signature(next_fun).bind(*args, **kwargs)
    call.arguments.pop('use_running_average', None)
    given = module.use_running_average
    object.__setattr__(module, 'use_running_average', True)
    try:
      return next_fun(*call.args, **call.kwargs)
    finally:
      object.__setattr__(module, 'use_running_average', given)

  with nn.intercept_methods(interceptor):
    yield
