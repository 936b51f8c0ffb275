"""Ways through the inner loops of few-shot methods: one derivative."""

import functools

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import test_methods_fewshot as methods
import test_varied_episodes as varied
import toys

from fmeta import fewshot, losses, models, optim, through, tuning
from fmeta.learner import finetune
from fmeta.meta import episode_loss
from fmeta.testing import assert_close

KEY = jax.random.key(5)
SGD = optim.sgd(0.3)
CRITERION = losses.softmax_cross_entropy
KERNELS = toys.three_kernels()
THREE = losses.supervised(toys.three_layers, CRITERION)


def episodes(draw):
  parts = [{'support': draw(4, k), 'query': draw(3, 10 + k)} for k in range(2)]
  for part in parts:
    part['support']['label'] = jnp.asarray([0, 1, 2, 0])
  return jax.tree.map(lambda *x: jnp.stack(x), *parts)


def points(rows, seed):
  return toys.batch_of(rows, seed=seed)


def images(rows, seed):
  random = np.random.default_rng(seed)
  label = jnp.asarray(random.integers(0, 3, rows))
  return {'image': jnp.asarray(random.random((rows, 8, 8, 1))), 'label': label}


def away(values):
  random = np.random.default_rng(0)
  return jax.tree.map(
    lambda x: x + 0.2 * random.normal(size=x.shape).astype(x.dtype), values
  )


def proto_maml(way):
  of_head = methods.OF_PROTOTYPES
  adapted = episode_loss(finetune(of_head, SGD), of_head, 2, through=way)
  start = fewshot.prototype_start(methods.embed, 3)
  return fewshot.starting_from(start, adapted)


def cavia(way):
  loss = losses.supervised(fewshot.with_context(toys.three_layers), CRITERION)
  inner = finetune(loss, SGD, tuning=tuning.select('context/.*'))
  adapted = episode_loss(inner, loss, 2, through=way)
  return fewshot.starting_from(fewshot.context_start(2), adapted)


def narrow(rows, seed):
  return toys.batch_of(rows, 4, seed=seed)  # two of the six are context


def curved(way):
  def inner(hyper):
    return finetune(THREE, optax.chain(fewshot.meta_curvature(hyper), SGD))

  return episode_loss(inner, THREE, 2, through=way)


def warped(way):
  loss = losses.supervised(fewshot.warped(toys.three_layers), CRITERION)
  inner = finetune(loss, SGD, tuning=tuning.select('.*/kernel'))
  return episode_loss(inner, loss, 2, through=way)


NORM, CONV4 = varied.NormNet(3), models.Conv4(3, 2)


def transductive(way, module=NORM, inputs=('x',)):
  forward = models.forward(module, inputs)
  loss = losses.supervised(forward, CRITERION)
  return episode_loss(finetune(loss, SGD), loss, 2, through=way)


# (loss of a way, outer parameters, batches)
ROWS = {
  'proto-maml': (proto_maml, lambda: {'body': KERNELS['body']}, points),
  'cavia': (cavia, lambda: KERNELS, narrow),
  'meta-curvature': (
    curved,
    lambda: {
      'model': KERNELS,
      'hyper': away(fewshot.curvature_init(KERNELS)),
    },
    points,
  ),
  't-net': (
    warped,
    lambda: away(fewshot.warp_init(KERNELS, ('.*/kernel',))),
    points,
  ),
  'transductive norm': (
    transductive,
    lambda: models.init(NORM, KEY, points(2, 0), ('x',))[0],
    points,
  ),
  'transductive conv4': (
    functools.partial(transductive, module=CONV4, inputs=models.IMAGE),
    lambda: models.init(CONV4, KEY, images(2, 0), models.IMAGE)[0],
    images,
  ),
}


def marked(name):
  # Conv4's second derivatives compile for 10 s.
  rare = [pytest.mark.oracle] * name.endswith('conv4')
  return pytest.param(name, marks=rare)


@pytest.mark.parametrize('name', [marked(name) for name in ROWS])
def test_remat_and_mixed_are_plain(name, x64):
  loss_of, start, draw = ROWS[name]
  params, batch = toys.double((start(), episodes(draw)))

  def run(way):
    loss = loss_of(way)
    value, grads = jax.jit(
      jax.value_and_grad(lambda p: loss(p, {}, batch, None)[0])
    )(params)
    # As one vector: a norm takes a bias away, whose slope is rounding errors.
    return value, jax.flatten_util.ravel_pytree(grads)[0]

  expected = run(through.plain)
  for way in (through.remat, through.mixed):
    assert_close(expected, run(way), f'{name}, {way.__name__}', 1e-12)
  first = run(through.first_order)
  np.testing.assert_allclose(first[0], expected[0], rtol=1e-12)
  assert np.abs(first[1] - expected[1]).max() > 1e-4
