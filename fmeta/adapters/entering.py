"""The forward pass of parameters that hold adapters.

See `fmeta.adapters.entry` for why a forward pass has to know them.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from fmeta import tree
from fmeta.adapters import siblings
from fmeta.adapters.bottleneck import SUFFIXES as BOTTLENECK
from fmeta.adapters.bottleneck import enter as enter_bottleneck
from fmeta.adapters.prefix import SUFFIXES as PREFIX
from fmeta.adapters.prefix import enter as enter_prefix
from fmeta.adapters.prompt import SUFFIXES as PROMPT
from fmeta.adapters.prompt import enter as enter_prompt
from fmeta.types import Array, Batch, Forward, ModelState, Params

KINDS = (
  (BOTTLENECK, enter_bottleneck),
  (PREFIX, enter_prefix),
  (PROMPT, enter_prompt),
)
SUFFIXES = tuple(suffix for suffixes, _ in KINDS for suffix in suffixes)


@contextmanager
def entered(params: Params) -> Iterator[Params]:
  """Runs linen modules with the adapters among `params`.

  Yields the parameters without the adapters' leaves.
  """
  if not any(name.endswith(SUFFIXES) for name in tree.names(params)):
    yield params
    return
  import flax.linen as nn

  shapes = siblings.tree_shapes(params)
  with ExitStack() as stack:
    for suffixes, enter in KINDS:
      leaves = {suffix: siblings.collect(params, suffix) for suffix in suffixes}
      if any(leaves.values()):
        stack.enter_context(nn.intercept_methods(enter(leaves, shapes)))
    yield siblings.without(params, SUFFIXES)


def entering(forward: Forward) -> Forward:
  """The same model, which also runs the adapters among its parameters.

  `models.forward` does it by itself; wrap a `Forward` written by hand.

  Args:
    forward: runs a flax.linen module.
  """

  def run(
    params: Params, model_state: ModelState, batch: Batch, rng: Array | None
  ) -> tuple[Any, ModelState]:
    with entered(params) as base:
      return forward(base, model_state, batch, rng)

  return run
