"""Streams of rows of two classes, for tests of learning along them."""

import jax
import jax.numpy as jnp
import numpy as np
import toys

from fmeta import losses

KEY = jax.random.key(4)
CLASSES, ROWS, RATE = 6, 4, 0.3
NET = toys.Net(sizes=(4,), classes=CLASSES)
FORWARD = toys.forward_of(NET)
LOSS = losses.supervised(FORWARD, losses.softmax_cross_entropy)
PARAMS = toys.init_of(NET)[0]


def streams(num=2, rows=ROWS, seed=0):
  """Episodes of two classes in order, and of those and others as queries."""
  random = np.random.default_rng(seed)

  def part(label):
    x = random.normal(size=(*label.shape, 6)).astype(np.float32)
    return {'x': x, 'label': label.astype(np.int32)}

  first = random.permuted(np.tile(np.arange(CLASSES), (num, 1)), axis=1)
  support = np.repeat(first[:, :2], rows // 2, axis=1)
  episodes = {'support': part(support), 'query': part(first)}
  return toys.double(jax.tree.map(jnp.asarray, episodes))


def value_and_grad(loss, params, batch, rng=KEY):
  objective = lambda params: loss(params, {}, batch, rng)[0]
  return jax.jit(jax.value_and_grad(objective))(params)
