"""Refuses to differentiate through an optimiser that cannot be.

An inner loop is differentiated, and so is its optimiser; plain training, a
first-order inner loop and Reptile never are. So the learner's step hands its
gradients to the optimiser through an identity whose derivative rule runs the
check: JAX calls the rule while it traces a derivative that really flows from
the gradients through the optimiser, and at no other time.
"""

from collections.abc import Callable

import jax
import optax

from fmeta.types import Params


def guard(optimizer: optax.GradientTransformation) -> Callable:
  """An identity on gradients that checks `optimizer` when differentiated.

  The check is `fmeta.meta_safe.check_meta_safe` on leaves with the gradients'
  names; it runs once per guard.

  Args:
    optimizer: may close over tracers (learned rates).

  Returns:
    `gradients -> gradients`. Its derivative raises `UsageError` if that of
    the optimiser is wrong.
  """
  checked = []

  @jax.custom_jvp
  def identity(grads: Params) -> Params:
    return grads

  @identity.defjvp
  def rule(primals, tangents):
    if not checked:
      # Loaded late: it runs the optimiser through a learner's step, the only
      # place that may update parameters.
      from fmeta.meta_safe import check_meta_safe

      check_meta_safe(optimizer, like=primals[0])
      checked.append(True)
    return primals[0], tangents[0]

  return identity
