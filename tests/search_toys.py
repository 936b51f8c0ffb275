"""A quadratic whose runs are a recurrence in numpy, for tests of searches."""

import jax.numpy as jnp
import numpy as np
import optax

from fmeta import optim
from fmeta.learner import finetune
from fmeta.types import Aux

PARAMS = {'x': np.array([1.0, -2.0, 0.5], np.float32)}
CURVATURE = np.array([1.0, 0.5, 2.0], np.float32)


def loss(params, model_state, batch, rng):
  """sum_i a_i (x_i - c_i)^2 / 2."""
  del rng
  value = 0.5 * jnp.sum(CURVATURE * (params['x'] - batch['c']) ** 2)
  return value, Aux(model_state, {}, jnp.ones(()))


def learner_of(hyper):
  return finetune(loss, optim.sgd(hyper['rate'], momentum=hyper['momentum']))


def plain_of(hyper):
  return finetune(loss, optim.sgd(hyper['rate']))


def injected():
  return finetune(loss, optax.inject_hyperparams(optim.sgd)(rate=0.0))


def batches(i):
  return {'c': np.random.default_rng((7, i)).normal(0, 0.3, 3).astype('f')}


def still(i):
  del i
  return {'c': np.zeros(3, np.float32)}


class Alone:
  """One run by hand: v <- m v + a (x - c), x <- x - rate v."""

  def __init__(self):
    self.x = np.array([1.0, -2.0, 0.5])
    self.v = np.zeros(3)

  def run(self, rate, momentum, source, start, stop):
    for i in range(start, stop):
      self.v = momentum * self.v + CURVATURE * (self.x - source(i)['c'])
      self.x = self.x - rate * self.v
    return self
