"""The precision of products: what is in the program, and what comes out."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_query_leakage import method_of

import fmeta
from experiments.common import Seeds
from experiments.fewshot.omniglot import splits, task
from fmeta import optim
from fmeta.models import Conv4, Mlp, computing_in, forward, init
from fmeta.workdir import Context

IMAGES = np.random.default_rng(0).normal(size=(6, 8, 8, 1)).astype(np.float32)
BATCH = {'image': IMAGES, 'label': np.arange(6, dtype=np.int32) % 3}
KEY = jax.random.key(0)


def conv4():
  model = Conv4(3, filters=4)
  params, _ = init(model, KEY, BATCH, ('image',))
  return forward(model, ('image',)), params


def products(jaxpr):
  """All matrix products of a program, loops and calls included."""
  found = []
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == 'dot_general':
      found.append(eqn)
    for value in jax.tree.leaves(
      eqn.params, is_leaf=lambda x: hasattr(x, 'eqns') or hasattr(x, 'jaxpr')
    ):
      inner = getattr(value, 'jaxpr', value)
      if hasattr(inner, 'eqns'):
        found += products(inner)
  return found


def meta_gradient(model):
  loss = fmeta.supervised(model, fmeta.softmax_cross_entropy)
  inner = fmeta.finetune(loss, optim.sgd(0.1))
  outer = fmeta.episode_loss(inner, loss, 1)
  episode = jax.tree.map(lambda x: x[None], {'support': BATCH, 'query': BATCH})
  return jax.grad(lambda params: outer(params, {}, episode, KEY)[0])


@pytest.mark.parametrize(
  ('precision', 'named'),
  [('float32', jax.lax.Precision.HIGHEST), ('tf32', jax.lax.Precision.HIGH)],
)
def test_every_product_of_a_second_order_gradient_is_named(precision, named):
  model, params = conv4()
  run = meta_gradient(computing_in(model, precision))
  every = products(jax.make_jaxpr(run)(params).jaxpr)
  # Each convolution and the head, forward and its derivatives.
  assert len(every) > 20
  assert {eqn.params['precision'] for eqn in every} == {(named, named)}


def test_bfloat16_multiplies_nothing_else_and_gives_float32_gradients():
  model, params = conv4()
  run = meta_gradient(computing_in(model, 'bfloat16'))
  every = products(jax.make_jaxpr(run)(params).jaxpr)
  wide = [e for e in every if e.invars[0].aval.dtype != jnp.bfloat16]
  assert len(every) > 20 and not wide
  gradient = jax.jit(run)(params)
  assert {leaf.dtype for leaf in jax.tree.leaves(gradient)} == {
    jnp.dtype('float32')
  }
  exact = jax.jit(meta_gradient(model))(params)
  a, b = (
    np.concatenate([x.ravel() for x in jax.tree.leaves(g)])
    for g in (gradient, exact)
  )
  # 8 bits: a gradient through eleven layers and back agrees to some percent,
  # and is not the float32 one.
  assert 1e-4 < np.linalg.norm(a - b) / np.linalg.norm(b) < 0.1


def test_one_dense_layer_in_bfloat16_is_the_product_of_rounded_factors():
  model = Mlp((), 5)
  params, _ = init(model, KEY, {'x': np.zeros((2, 7), np.float32)}, ('x',))
  x = np.random.default_rng(1).normal(size=(4, 7)).astype(np.float32)
  run = computing_in(forward(model, ('x',)), 'bfloat16')
  found = run(params, {}, {'x': x}, None)[0]
  kernel = params['head']['kernel'].astype(jnp.bfloat16)
  expected = jnp.asarray(x, jnp.bfloat16) @ kernel
  expected += params['head']['bias'].astype(jnp.bfloat16)[None]
  assert found.dtype == jnp.float32
  np.testing.assert_array_equal(found, expected.astype(jnp.float32))


def test_float32_is_what_the_model_gives_on_cpu():
  model, params = conv4()
  plain = jax.jit(lambda p: model(p, {}, BATCH, None)[0])(params)
  for precision in ('float32', 'tf32'):
    run = computing_in(model, precision)
    found = jax.jit(lambda p, run=run: run(p, {}, BATCH, None)[0])(params)
    np.testing.assert_array_equal(found, plain)


def test_an_unknown_precision_is_refused():
  with pytest.raises(fmeta.UsageError, match="'bf16'; did you mean 'bfloat16'"):
    computing_in(conv4()[0], 'bf16')


@pytest.mark.parametrize('name', ['t_net', 'leo', 'relation', 'r2d2', 'imaml'])
def test_no_product_of_a_method_is_left_to_the_device(name, tmp_path, drawn):
  method = method_of(name, tmp_path)
  module = importlib.import_module(f'experiments.fewshot.omniglot.{name}')
  config = module.Config(**module.SMALL, seed=Seeds())
  columns = splits.load(config, Context(tmp_path))['train']
  batch = method.source(task.training_episodes(config, method, columns))(0)
  state = method.learner.init(method.params, KEY)
  program = jax.make_jaxpr(method.learner.step)(state, batch, KEY)
  every = products(program.jaxpr)
  assert len(every) > 10
  highest = jax.lax.Precision.HIGHEST
  assert {eqn.params['precision'] for eqn in every} == {(highest, highest)}
