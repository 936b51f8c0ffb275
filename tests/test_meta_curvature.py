"""Learned matrices along the axes of a gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toys

from fmeta import fewshot, losses, meta, optim, tree, tuning
from fmeta.errors import UsageError
from fmeta.learner import finetune
from fmeta.testing import assert_close, check_gradient

KEY = jax.random.key(7)
LOSS = losses.supervised(toys.three_layers, losses.softmax_cross_entropy)
HEAD = tuning.select('head/.*')


def turned(hyper):
  return optax.chain(fewshot.meta_curvature(hyper), optim.sgd(0.1))


def episodes(tasks=2):
  parts = [
    {
      'support': toys.batch_of(4, seed=k),
      'query': toys.batch_of(3, seed=10 + k),
    }
    for k in range(tasks)
  ]
  return jax.tree.map(lambda *x: jnp.stack(x), *parts)


def away(matrices):
  """Near the identity, but no identity."""
  random = np.random.default_rng(0)
  return jax.tree.map(
    lambda x: x + 0.3 * random.normal(size=x.shape).astype(x.dtype), matrices
  )


def test_each_axis_of_a_convolution_is_multiplied_by_its_matrix(x64):
  random = np.random.default_rng(1)
  grads = {
    'conv': {
      'kernel': random.normal(size=(3, 2, 4, 5)),
      'bias': random.normal(size=5),
    },
    'rate': np.array(2.0),
  }
  grads = jax.tree.map(jnp.asarray, grads)
  matrices = away(fewshot.curvature_init(grads))
  assert {
    name: x.shape
    for name, x in zip(
      tree.names(matrices), jax.tree.leaves(matrices), strict=True
    )
  } == {
    'conv/kernel/space': (6, 6),
    'conv/kernel/in': (4, 4),
    'conv/kernel/out': (5, 5),
    'conv/bias/out': (5, 5),
  }
  transformation = fewshot.meta_curvature(matrices)
  found, _ = transformation.update(grads, transformation.init(grads))
  of = matrices['conv']['kernel']
  expected = np.einsum(
    'st,ij,op,tjp->sio',
    of['space'],
    of['in'],
    of['out'],
    np.reshape(grads['conv']['kernel'], (6, 4, 5)),
  ).reshape(3, 2, 4, 5)
  kernel, bias = found['conv']['kernel'], found['conv']['bias']
  np.testing.assert_allclose(kernel, expected, rtol=1e-12, atol=1e-14)
  of_bias = matrices['conv']['bias']['out'] @ grads['conv']['bias']
  np.testing.assert_allclose(bias, of_bias, rtol=1e-12)
  assert found['rate'] == 2.0


def test_identities_are_maml_bitwise():
  params, batch = toys.three_kernels(), episodes()
  matrices = fewshot.curvature_init(HEAD.init(params, KEY)[0])

  def adapted(optimizer):
    learner = finetune(LOSS, optimizer, tuning=HEAD)
    predict = meta.predict_episodes(learner, toys.three_layers, 3)
    return jax.jit(predict)(params, batch, None)

  expected = adapted(optim.sgd(0.1))
  assert_close(expected, adapted(turned(matrices)), 'identity', 0.0)
  assert np.any(adapted(turned(away(matrices))) != expected)


def test_meta_gradients_of_the_matrices_agree_with_differences(x64):
  params = toys.double(toys.three_kernels())
  matrices = away(fewshot.curvature_init(HEAD.init(params, KEY)[0]))

  def inner(hyper):
    return finetune(LOSS, turned(hyper), tuning=HEAD)

  loss, batch = meta.episode_loss(inner, LOSS, 2), toys.double(episodes())
  grads = check_gradient(
    lambda p: loss(p, {}, batch, None)[0],
    {'model': params, 'hyper': matrices},
  )
  assert all(np.any(x != 0) for x in jax.tree.leaves(grads['hyper']))


def test_a_leaf_without_matrices_is_refused():
  params = toys.three_kernels()
  transformation = fewshot.meta_curvature(
    fewshot.curvature_init(HEAD.init(params, KEY)[0])
  )
  with pytest.raises(UsageError, match="no matrices for 'body/layer_0/kernel'"):
    transformation.update(params, transformation.init(params))
