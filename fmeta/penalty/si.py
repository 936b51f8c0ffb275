"""Synaptic intelligence: importance read off the path of training."""

import jax
import jax.numpy as jnp

from fmeta.errors import check_number
from fmeta.penalty.leaves import half_square, own, zeros_like
from fmeta.penalty.quadratic import no_penalty
from fmeta.types import Penalty, Scalar


def si(strength: Scalar, xi: Scalar = 0.1) -> Penalty:
  """Synaptic intelligence.

  Each step adds to a path integral, and each task's end to the importance,

    omega_i <- omega_i - g_i u_i
    Omega_i <- max(0, Omega_i + omega_i / ((p_i - p*_i)^2 + xi))

  and then p* = p, omega = 0. The penalty is

    strength * sum_i Omega_i (p_i - p*_i)^2

  (Zenke et al. 2017, https://arxiv.org/abs/1703.04200, eqs. 4 and 5; the
  maximum is not in the paper but in the authors' code, and keeps a parameter
  that moved uphill from being pushed away.) g is the gradient of the data's
  loss alone, without any penalty's and before clipping; u is the update that
  the optimiser hands to the parameters, with rate, clipping, momentum and
  decay in it. So sum_i omega_i is the drop of the data's loss, to first order
  in the updates.

  A step has gradients of the trainable leaves only, so SI lives on those. They
  are the parameters themselves with `full` and `select`; factors of an
  adapter are remembered one by one, and then (A, B) and (2A, B/2), the same
  weights, are penalised differently.

  Args:
    strength: the paper's c, without a half. May be traced.
    xi: damping. 0.1 is the authors' for permuted MNIST (0.001 for split
      CIFAR). May be traced.

  Raises:
    UsageError: for a strength below 0, or a damping that is not above it.
  """
  check_number('si strength', strength)
  check_number('si xi', xi, above=True)

  def init(trainable, params):
    del params
    return {
      'anchor': own(trainable),
      'importance': zeros_like(trainable),
      'path': zeros_like(trainable),
    }

  def value(trainable, params, state, batch, rng):
    del params, batch, rng
    distance = half_square(trainable, state['anchor'], state['importance'])
    return 2 * strength * distance

  def observe(state, trainable, grads, updates):
    del trainable
    path = jax.tree.map(
      lambda w, g, u: w - g * u, state['path'], grads, updates
    )
    return {**state, 'path': path}

  def consolidate(state, trainable, *args):
    del args

    def add(importance, path, now, anchor):
      return jnp.maximum(importance + path / ((now - anchor) ** 2 + xi), 0)

    importance = jax.tree.map(
      add, state['importance'], state['path'], trainable, state['anchor']
    )
    return {
      'anchor': own(trainable),
      'importance': importance,
      'path': zeros_like(trainable),
    }

  return no_penalty()._replace(
    init=init, value=value, observe=observe, consolidate=consolidate
  )
