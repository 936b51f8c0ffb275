"""Adam whose every entry counts its own steps.

An entry that is born anew in the middle of a run starts with zero moments.
Under a shared count of thousands Adam takes them for converged, and the
entry's first step is (1 - b1) / sqrt(1 - b2) = 3.2 times the rate.
"""

from typing import Unpack

import jax
import jax.numpy as jnp
import optax

from fmeta.optim import Rate, with_rates
from fmeta.optim.rates import Options
from fmeta.types import Scalar


def scale_by_adam_per_entry(
  b1: Scalar = 0.9, b2: Scalar = 0.999, eps: Scalar = 1e-8
) -> optax.GradientTransformation:
  """`optax.scale_by_adam` with a count per entry, an int32 each.

  Where all counts are equal the updates are the same (Dohare et al. 2024,
  https://doi.org/10.1038/s41586-024-07711-7, whose released code has an Adam
  of this kind).

  Args:
    b1: decay of the first moment.
    b2: decay of the second moment.
    eps: added outside the square root.
  """

  def init(params):
    zeros = lambda: jax.tree.map(jnp.zeros_like, params)
    count = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.int32), params)
    return optax.ScaleByAdamState(count, zeros(), zeros())

  def update(updates, state, params=None):
    del params
    count = jax.tree.map(lambda c: c + 1, state.count)
    mu = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.mu, updates)
    nu = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g**2, state.nu, updates)

    def direction(m, v, c):
      steps = c.astype(m.dtype)
      return m / (1 - b1**steps) / (jnp.sqrt(v / (1 - b2**steps)) + eps)

    moved = jax.tree.map(direction, mu, nu, count)
    return moved, optax.ScaleByAdamState(count, mu, nu)

  return optax.GradientTransformation(init, update)


def adam_per_entry(
  rate: Rate,
  *,
  b1: Scalar = 0.9,
  b2: Scalar = 0.999,
  eps: Scalar = 1e-8,
  **options: Unpack[Options],
) -> optax.GradientTransformation:
  """Adam for `continual_backprop`: reset entries start like new ones.

  Args:
    rate: float, traced array or optax schedule.
    b1: decay of the first moment.
    b2: decay of the second moment.
    eps: added outside the square root.
    **options: see `optim.with_rates`.
  """
  return with_rates(scale_by_adam_per_entry(b1, b2, eps), rate, **options)
