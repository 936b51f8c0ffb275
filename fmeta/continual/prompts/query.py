"""The query of an example: a feature by which its prompts are chosen.

It is the frozen model's own feature of the example, without any prompt. A
query is a `Forward` of [B, D]; there are two:

  models.forward(module, method='embed')   computed, a second forward pass
  given_query                              read from `batch['query']`

A frozen feature never changes, so computing it once and giving it as a column
`query` changes nothing and saves a third of a step's FLOPs (CODA-Prompt in
five layers at MiniLM's width, 16 x 32 tokens; 2026-11-26).
"""

import jax
import jax.numpy as jnp

from fmeta.errors import UsageError
from fmeta.types import Array, Batch, Forward, ModelState, Params

KEY = 'query'


def given_query(
  params: Params, model_state: ModelState, batch: Batch, rng: Array | None
) -> tuple[Array, ModelState]:
  """The query [B, D] that the caller has put into the batch, a `Forward`.

  Raises:
    UsageError: if the batch has none.
  """
  del params, rng
  if KEY not in batch:
    raise UsageError(
      f'the batch has no {KEY!r}; it has {sorted(batch)}: add the column, or '
      "give a query that is computed, models.forward(module, method='embed')"
    )
  return batch[KEY], model_state


def query_of(
  query: Forward, params: Params, model_state: ModelState, batch: Batch
) -> Array:
  """What the query gives in evaluation mode, without a gradient, [B, D].

  Args:
    query: a `Forward`.
    params: without prompts.
    model_state: of the model.
    batch: of B rows.

  Raises:
    UsageError: if it gives no [B, D].
  """
  found, _ = query(params, model_state, batch, None)
  if jnp.ndim(found) != 2:
    raise UsageError(
      f'the query has shape {jnp.shape(found)}; give one vector per row, [B, D]'
    )
  return jax.lax.stop_gradient(jnp.asarray(found))


def unit(vectors: Array) -> Array:
  """Vectors [..., D] of length one, in float32 or wider; zero stays zero."""
  wide = vectors.astype(jnp.promote_types(vectors.dtype, jnp.float32))
  return wide * inverse_length(jnp.sum(wide**2, axis=-1, keepdims=True))


def inverse_length(square: Array) -> Array:
  """1 / sqrt(square), finite at zero with a zero derivative."""
  return jax.lax.rsqrt(jnp.maximum(square, 1e-24))


def cosines(query: Array, keys: Array) -> Array:
  """Cosine of each query [B, D] and each key [M, D], [B, M].

  Raises:
    UsageError: if their sizes differ.
  """
  check_size(query, keys.shape[-1])
  # Not in the reduced precision that is a default on accelerators: it decides.
  return jnp.matmul(unit(query), unit(keys).T, precision='highest')


def check_size(query: Array, size: int) -> None:
  """Raises `UsageError` if a query is not of the keys' size."""
  if query.shape[-1] != size:
    raise UsageError(
      f'a query of {query.shape[-1]} numbers and keys of {size}; give the '
      'tuning query_size='
      f'{query.shape[-1]}'
    )
