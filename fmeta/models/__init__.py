"""Linen modules and how they become a `Forward`.

A model is any linen module whose call takes arrays and a keyword
`deterministic`. `init` gives its parameters as plain dicts, `forward` the
pure function that everything else in the package works with.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import linen as nn

from fmeta.adapters import entering
from fmeta.errors import UsageError
from fmeta.models.bert import BertClassifier
from fmeta.models.bert_layers import BertConfig, with_dropout
from fmeta.models.conv import BatchNorm, Conv4, MatmulConv
from fmeta.models.mlp import Mlp
from fmeta.models.precision import PRECISIONS, computing_in
from fmeta.models.resnet import ResNet
from fmeta.types import Array, Batch, Forward, ModelState, Params

__all__ = [
  'BatchNorm',
  'BertClassifier',
  'BertConfig',
  'Conv4',
  'MatmulConv',
  'Mlp',
  'ResNet',
  'TEXT',
  'PACKED_TEXT',
  'PRECISIONS',
  'IMAGE',
  'computing_in',
  'forward',
  'init',
  'with_dropout',
]

TEXT = ('input_ids', 'attention_mask')
PACKED_TEXT = ('input_ids', 'text_ids', 'position_ids', 'length')
IMAGE = ('image',)


def _select(batch: Batch, inputs: Sequence[str]) -> list[Any]:
  missing = [name for name in inputs if name not in batch]
  if missing:
    raise UsageError(
      f'the batch has no {missing[0]!r}; it has {sorted(batch)}: pass '
      'inputs=(...) with the columns that the model reads'
    )
  return [batch[name] for name in inputs]


def forward(
  module: nn.Module,
  inputs: Sequence[str] = TEXT,
  *,
  method: str | Callable[..., Any] | None = None,
  **static: Any,
) -> Forward:
  """A module as `(params, model_state, batch, rng) -> (outputs, model_state)`.

  With `rng=None` the module runs deterministically and its state is returned
  unchanged; with a key dropout draws from it and the collections in
  `model_state` (batch statistics) come back updated. Adapters among the
  parameters (bottlenecks, prefixes, prompts) run with the module.

  Args:
    module: takes the arrays in the order of `inputs` and `deterministic=`.
    inputs: batch keys, in the order of the module's arguments.
    method: another method than `__call__`, for example 'embed' or 'resume'.
    **static: keyword arguments for it, for example `first_layer=4`.

  Raises:
    UsageError: when called with a batch that lacks one of `inputs`.
  """

  def run(
    params: Params, model_state: ModelState, batch: Batch, rng: Array | None
  ) -> tuple[Any, ModelState]:
    variables = {'params': params, **model_state}
    arrays = _select(batch, inputs)
    if rng is None:
      outputs = module.apply(
        variables, *arrays, deterministic=True, method=method, **static
      )
      return outputs, model_state
    outputs, changed = module.apply(
      variables,
      *arrays,
      deterministic=False,
      method=method,
      rngs={'dropout': rng},
      mutable=list(model_state),
      **static,
    )
    return outputs, {**model_state, **changed}

  return entering(run)


def init(
  module: nn.Module,
  rng: Array,
  batch: Batch,
  inputs: Sequence[str] = TEXT,
) -> tuple[Params, ModelState]:
  """Fresh `(params, model_state)`, plain dicts, in one compilation.

  Args:
    module: as in `forward`.
    rng: `jax.random.key`.
    batch: an example; only shapes and dtypes matter.
    inputs: batch keys, in the order of the module's arguments.
  """

  def fresh(rng, arrays):
    return module.init(rng, *arrays, deterministic=True)

  variables = dict(jax.jit(fresh)(rng, _select(batch, inputs)))
  params = variables.pop('params')
  return params, variables
