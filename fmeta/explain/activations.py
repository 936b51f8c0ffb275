"""What fine-tuning did to the activations of each block."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from fmeta.errors import UsageError
from fmeta.types import Array, Batch, Forward, ModelState, Params


def linear_cka(x: np.ndarray, y: np.ndarray) -> float:
  """Similarity of two representations of the same examples, in [0, 1].

  CKA = |Y'X|_F^2 / (|X'X|_F |Y'Y|_F) with centred columns (Kornblith et al.
  2019, https://arxiv.org/abs/1905.00414, section 3), computed from the [n, n]
  Gram matrices: |Y'X|_F^2 = <XX', YY'>. It does not change with rotations and
  isotropic scaling of either.

  Args:
    x: [n, p].
    y: [n, q].

  Raises:
    UsageError: if they are not of the same examples, or one is constant.
  """
  x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
  if x.ndim != 2 or y.ndim != 2 or len(x) != len(y) or len(x) < 2:
    raise UsageError(
      f'CKA of {x.shape} and {y.shape}; give [n, p] and [n, q], n >= 2'
    )
  first, second = (_gram(values) for values in (x, y))
  scale = np.linalg.norm(first) * np.linalg.norm(second)
  if not scale:
    raise UsageError('all examples have the same representation; CKA is 0/0')
  return float(np.sum(first * second) / scale)


def _gram(values):
  centred = values - values.mean(0, keepdims=True)
  return centred @ centred.T


def capture(
  forward: Forward,
  params: Params,
  model_state: ModelState,
  batch: Batch,
  modules: Sequence[str],
) -> tuple[Any, dict[str, Array]]:
  """The model's outputs, and those of the named linen modules, in one pass.

  A name that no called module has is absent from the result. Evaluation mode.
  """
  found = {}

  def interceptor(next_fun, args, kwargs, context):
    out = next_fun(*args, **kwargs)
    name = '/'.join(context.module.path)
    if name in modules and context.method_name == '__call__':
      found[name] = out
    return out

  with nn.intercept_methods(interceptor):
    outputs, _ = forward(params, model_state, batch, None)
  return outputs, found


def rows_of(output: Array, batch: Batch) -> Array:
  """One vector per example, [B, p].

  Token states are averaged over the tokens of `attention_mask`, everything
  else is flattened (feature maps as in Kornblith et al. 2019, section 2).
  """
  mask = batch.get('attention_mask')
  if mask is not None and output.ndim == 3:
    weights = jnp.asarray(mask, output.dtype)[:, :, None]
    return (output * weights).sum(1) / jnp.maximum(weights.sum(1), 1)
  return output.reshape(len(output), -1)


@functools.partial(jax.jit, static_argnums=(0, 4))
def _logits_and_rows(forward, params, model_state, batch, modules):
  outputs, found = capture(forward, params, model_state, batch, modules)
  return outputs, {name: rows_of(x, batch) for name, x in found.items()}


def run_through(
  forward: Forward,
  params: Params,
  model_state: ModelState,
  batches: Sequence[Batch],
  modules: Sequence[str],
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
  """Logits [N, C] and each named module's rows [N, p], padding rows dropped."""
  logits, rows = [], []
  for batch in batches:
    out, found = _logits_and_rows(
      forward, params, model_state, batch, tuple(modules)
    )
    size = len(jax.tree.leaves(batch)[0])
    kept = np.asarray(batch.get('weight', np.ones(size))) > 0
    logits.append(np.asarray(out)[kept])
    rows.append({name: np.asarray(x)[kept] for name, x in found.items()})
  stacked = {
    name: np.concatenate([part[name] for part in rows]) for name in rows[0]
  }
  return np.concatenate(logits), stacked
