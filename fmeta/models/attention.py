"""Dot-product attention (Vaswani et al. 2017) and what it may look at.

https://arxiv.org/abs/1706.03762, eq. 1. A mask is a bias that is added to the
scores: 0 where a token may look, -1e9 where it may not.
"""

import jax
import jax.numpy as jnp

from fmeta.types import Array


def additive_mask(attention_mask: Array) -> Array:
  """[B, L] of 0 and 1 -> [B, 1, 1, L] of 0 where seen and -1e9 where not."""
  hidden = attention_mask[:, None, None, :] == 0
  return jnp.where(hidden, -1e9, 0.0).astype(jnp.float32)


def packed_mask(text_ids: Array) -> Array:
  """[R, L] -> [R, 1, L, L]: 0 within a text, -1e9 from one to another."""
  apart = text_ids[:, None, :, None] != text_ids[:, None, None, :]
  return jnp.where(apart, -1e9, 0.0).astype(jnp.float32)


def attend(query: Array, key: Array, bias: Array) -> Array:
  """Probabilities softmax(q k' / sqrt(d) + bias), in float32 or wider.

  Args:
    query: [B, L, heads, d].
    key: [B, M, heads, d].
    bias: additive, broadcastable to [B, heads, L, M].
  """
  scores = jnp.einsum('blhd,bmhd->bhlm', query, key)
  dtype = jnp.promote_types(scores.dtype, jnp.float32)
  scores = scores.astype(dtype) * query.shape[-1] ** -0.5
  return jax.nn.softmax(scores + bias.astype(dtype)).astype(query.dtype)
