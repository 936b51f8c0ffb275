"""Layers that only the outer loop moves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from fmeta import fewshot, losses, meta, optim, tree, tuning
from fmeta.errors import UsageError
from fmeta.learner import finetune
from fmeta.testing import assert_close, check_gradient

KEY = jax.random.key(8)
PATTERNS = ('body/layer_1/kernel', 'head/kernel')
T_NET = fewshot.warped(toys.three_layers)
LOSS = losses.supervised(T_NET, losses.softmax_cross_entropy)
PLAIN = losses.supervised(toys.three_layers, losses.softmax_cross_entropy)
INNER = finetune(LOSS, optim.sgd(0.1), tuning=tuning.select('.*/kernel'))


def params_with(away=0.0):
  params = fewshot.warp_init(toys.three_kernels(), PATTERNS)
  random = np.random.default_rng(0)

  def moved(name, leaf):
    draw = random.normal(size=leaf.shape).astype(leaf.dtype)
    return leaf + away * draw if name.endswith('.warp') else leaf

  return tree.map_with_name(moved, params)


@jax.jit
def slopes_of(params, batch):
  return jax.grad(lambda p: PLAIN(p, {}, batch, None)[0])(params)


def test_identity_warps_change_nothing():
  batch = toys.batch_of()
  found, _ = T_NET(params_with(), {}, batch, None)
  expected, _ = toys.three_layers(toys.three_kernels(), {}, batch, None)
  np.testing.assert_array_equal(found, expected)
  assert [n for n in tree.names(params_with()) if n.endswith('.warp')] == [
    'body/layer_1/kernel.warp',
    'head/kernel.warp',
  ]


def test_a_step_moves_the_product_by_the_gradient_under_the_metric(x64):
  params, batch = toys.double((params_with(0.3), toys.batch_of()))
  state = INNER.init(params, KEY)
  after, _ = jax.jit(INNER.step)(state, batch, KEY)
  after = INNER.params(after)
  # The gradient at the products W T, of the model without warps:
  products = tree.map_with_name(
    lambda name, leaf: (
      leaf @ tree.get(params, name + '.warp') if name in PATTERNS else leaf
    ),
    toys.double(toys.three_kernels()),
  )
  slopes = slopes_of(products, batch)
  for name in PATTERNS:
    warp = np.asarray(tree.get(params, name + '.warp'))
    np.testing.assert_array_equal(tree.get(after, name + '.warp'), warp)
    before = np.asarray(tree.get(products, name))
    expected = before - 0.1 * tree.get(slopes, name) @ warp.T @ warp
    found = tree.get(after, name) @ warp
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_warps_are_still_inside_and_learned_outside(x64):
  params = toys.double(params_with(0.3))
  batch = toys.double(
    jax.tree.map(
      lambda *x: jnp.stack(x),
      *[{'support': toys.batch_of(4), 'query': toys.batch_of(3, seed=1)}] * 2,
    )
  )
  state = INNER.init(params, KEY)
  assert all(name.endswith('.warp') for name in tree.names(state.frozen))
  loss = meta.episode_loss(INNER, LOSS, 2)
  grads = check_gradient(lambda p: loss(p, {}, batch, None)[0], params)
  assert all(np.any(x != 0) for x in jax.tree.leaves(grads))


def test_warp_layers_between_those_that_move_are_a_pattern(x64):
  # WarpGrad: layer_1 is the warp layer, the others adapt.
  params = toys.double(toys.three_kernels())
  batch = toys.double(toys.batch_of())
  inner = finetune(
    PLAIN, optim.sgd(0.1), tuning=tuning.select('body/layer_0/.*', 'head/.*')
  )
  state, _ = jax.jit(inner.step)(inner.init(params, KEY), batch, KEY)
  slopes = slopes_of(params, batch)
  expected = jax.tree.map(lambda p, g: p - 0.1 * g, params, slopes)
  expected['body']['layer_1'] = params['body']['layer_1']
  assert_close(expected, inner.params(state), 'WarpGrad', 1e-12)


def test_what_is_no_kernel_is_refused():
  params = {'norm': {'scale': jnp.ones(3)}}
  with pytest.raises(UsageError, match=r"'norm/scale' of shape \(3,\) is no k"):
    fewshot.warp_init(params, ('norm/.*',))
  with pytest.raises(UsageError, match="no parameter matches 'hed/.*'"):
    fewshot.warp_init(toys.three_kernels(), ('hed/.*',))
