"""Whose labels a Fisher squares the gradients of.

Each is `(log_probs [B, classes], batch, keys [B]) -> (rounds, cotangents)`:
how many backward passes it takes, and `k -> [B, classes]`, the cotangent of
the log-probabilities in pass k, scaled so that squared gradients add up to
what is wanted.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from fmeta.errors import UsageError
from fmeta.types import Array, Batch

Rounds = tuple[int, Callable[[Array], Array]]
Labels = Callable[[Array, Batch, Array], Rounds]


def summed_over(log_probs: Array, batch: Batch, keys: Array) -> Rounds:
  """Every label y by its probability: a cotangent sqrt(p(y | x)) e_y each."""
  del batch, keys
  roots = jnp.exp(0.5 * log_probs)

  def of_class(label):
    return jnp.zeros_like(roots).at[:, label].set(roots[:, label])

  return log_probs.shape[1], of_class


def drawn(log_probs: Array, batch: Batch, keys: Array) -> Rounds:
  """One label per example, drawn from the model."""
  del batch
  label = jax.vmap(jax.random.categorical)(keys, log_probs)
  return 1, lambda _: _one_hot(label, log_probs)


def of_the_data(log_probs: Array, batch: Batch, keys: Array) -> Rounds:
  """The label that the data have.

  Raises:
    UsageError: if the batch has no column `label` of classes.
  """
  del keys
  if 'label' not in batch:
    raise UsageError(
      f"the batch has no 'label'; it has {sorted(batch)}: give one, or draw "
      'labels from the model (sampled_fisher)'
    )
  label = jnp.asarray(batch['label'])
  if label.ndim != 1 or not jnp.issubdtype(label.dtype, jnp.integer):
    raise UsageError(
      f'labels {label.dtype}{list(label.shape)}; give one class per example, '
      'or draw labels from the model (sampled_fisher)'
    )
  return 1, lambda _: _one_hot(label, log_probs)


def _one_hot(label: Array, log_probs: Array) -> Array:
  return jax.nn.one_hot(label, log_probs.shape[1], dtype=log_probs.dtype)
