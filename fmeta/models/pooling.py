"""From the states of tokens to one vector per text."""

import jax.numpy as jnp

from fmeta.errors import UsageError
from fmeta.types import Array

POOLINGS = ('mean', 'cls', 'prompt')


def pool(hidden: Array, attention_mask: Array, pooling: str) -> Array:
  """[B, L, H] -> [B, H]: mean over the tokens seen, or the first token."""
  if pooling == 'cls':
    return hidden[:, 0]
  weights = attention_mask.astype(hidden.dtype)[:, :, None]
  # A padding row has no token: its mean is 0, not 0/0.
  count = jnp.maximum(weights.sum(1), 1)
  return (hidden * weights).sum(1) / count


def pool_prompt(hidden: Array) -> Array:
  """[B, P, H], the states of a prompt -> [B, H], their mean.

  Raises:
    UsageError: if there is no prompt.
  """
  if not hidden.shape[1]:
    raise UsageError(
      "pooling='prompt' and no prompt; run the model with one, or pool by "
      "'mean' or 'cls'"
    )
  return hidden.mean(1)


def pool_packed(
  hidden: Array,
  text_ids: Array,
  position_ids: Array,
  length: Array,
  pooling: str,
) -> Array:
  """[R, L, H] of packed texts -> [B, H], as `pool` gives them."""
  if pooling == 'prompt':  # Packed rows have none; this says so.
    pool_prompt(hidden[:, :0])
  own = text_ids.reshape(1, -1) == jnp.arange(len(length))[:, None]
  if pooling == 'cls':
    first = position_ids.reshape(1, -1) == 0
    weights = (own & first).astype(hidden.dtype)
  else:
    weights = own.astype(hidden.dtype) / jnp.maximum(length, 1)[:, None]
  return weights @ hidden.reshape(-1, hidden.shape[-1])
