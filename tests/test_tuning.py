import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from fmeta import losses, optim, tree, tuning
from fmeta.errors import UsageError
from fmeta.learner import finetune
from fmeta.testing import assert_close

KEY = jax.random.key(0)


def test_full_moves_everything():
  _, params, _, _ = toys.problem()
  trainable, frozen = tuning.full().init(params, KEY)
  assert trainable is params and frozen == {}


def test_select_splits_by_whole_names_and_merges_back():
  _, params, _, _ = toys.problem()
  select = tuning.select('head/.*', '.*/bias')
  trainable, frozen = select.init(params, KEY)
  assert tree.names(trainable) == [
    'body/layer_0/bias',
    'body/layer_1/bias',
    'head/bias',
    'head/kernel',
  ]
  assert tree.names(frozen) == ['body/layer_0/kernel', 'body/layer_1/kernel']
  merged = select.merge(trainable, frozen)
  assert jax.tree.structure(merged) == jax.tree.structure(params)
  jax.tree.map(np.testing.assert_array_equal, merged, params)


def test_select_refuses_a_pattern_that_names_nothing():
  _, params, _, _ = toys.problem()
  with pytest.raises(UsageError, match="no parameter matches 'heads/.*'"):
    tuning.select('head/.*', 'heads/.*').init(params, KEY)


OLD = {'batch_stats': {'body': {'norm': {'mean': 0}, 'free': {'mean': 0}}}}
NEW = {'batch_stats': {'body': {'norm': {'mean': 1}, 'free': {'mean': 1}}}}


@pytest.mark.parametrize(
  ('moving', 'norm', 'free'),
  [
    # `free` has no parameters and follows the body around it.
    ({'head': {'kernel': 0}}, 0, 0),
    ({'body': {'norm': {'scale': 0}}}, 1, 1),
    ({'body': {'layer': {'kernel': 0}}}, 0, 1),
  ],
)
def test_statistics_move_only_under_a_trainable_module(moving, norm, free):
  full = {
    'body': {'norm': {'scale': 0, 'bias': 0}, 'layer': {'kernel': 0}},
    'head': {'kernel': 0},
  }
  if 'norm' in moving.get('body', {}):
    moving['body']['norm']['bias'] = 0
  frozen = tree.partition(full, lambda name: name not in tree.names(moving))[0]
  kept = tuning.keep_under(OLD, NEW, moving, frozen)
  assert kept['batch_stats']['body']['norm']['mean'] == norm
  assert kept['batch_stats']['body']['free']['mean'] == free
  assert tuning.keep_under(OLD, NEW, full, {}) is NEW


def _norm_problem(spelling, affine):
  module = toys.NormNet(spelling, affine)
  forward = toys.forward_of(module)
  params, model_state = toys.init_of(module)
  # Statistics that no batch has, so that the two normalisations differ.
  model_state = jax.tree.map(lambda x: x + 2.0, model_state)
  loss_fn = losses.supervised(forward, losses.softmax_cross_entropy)
  return loss_fn, params, model_state, forward


@pytest.mark.parametrize('affine', [True, False], ids=['affine', 'plain'])
@pytest.mark.parametrize('spelling', ['keyword', 'positional', 'attribute'])
def test_a_frozen_batch_norm_neither_moves_nor_reads_the_batch(
  spelling, affine
):
  loss_fn, params, model_state, forward = _norm_problem(spelling, affine)
  batch = toys.batch_of()
  learner = finetune(loss_fn, optim.sgd(0.1), tuning=tuning.select('head/.*'))
  state = learner.init(params, KEY, model_state)
  after, aux = jax.jit(learner.step)(state, batch, KEY)
  jax.tree.map(np.testing.assert_array_equal, after.model_state, model_state)
  evaluated, _ = forward(params, model_state, batch, None)
  np.testing.assert_allclose(aux.outputs, evaluated, rtol=1e-6)


@pytest.mark.parametrize('spelling', ['keyword', 'positional', 'attribute'])
def test_a_trainable_batch_norm_moves_and_reads_the_batch(spelling):
  loss_fn, params, model_state, forward = _norm_problem(spelling, True)
  batch = toys.batch_of()
  select = tuning.select('body/norm/.*', 'head/.*')
  learner = finetune(loss_fn, optim.sgd(0.1), tuning=select)
  state = learner.init(params, KEY, model_state)
  after, aux = jax.jit(learner.step)(state, batch, KEY)
  before = state.model_state['batch_stats']['body']['norm']['mean']
  moved = after.model_state['batch_stats']['body']['norm']['mean']
  hidden = batch['x'] @ params['body']['layer_0']['kernel']
  hidden = hidden + params['body']['layer_0']['bias'][None]
  np.testing.assert_allclose(
    moved, 0.5 * before + 0.5 * hidden.mean(0), rtol=1e-5, atol=1e-6
  )
  trained, _ = forward(params, model_state, batch, KEY)
  # Relative to the largest entry: one that cancels differs in its last bits
  # between a jitted step and operations one by one.
  assert_close(trained, aux.outputs, 'outputs', 1e-6)


def test_an_nnx_model_runs_through_split_and_merge():
  from flax import nnx

  model = nnx.Linear(6, 3, rngs=nnx.Rngs(0))
  graph, state = nnx.split(model)
  params = nnx.to_pure_dict(state)

  def forward(params, model_state, batch, rng):
    values = nnx.merge(graph, nnx.State(params))
    return values(batch['x']), model_state

  loss_fn = losses.supervised(forward, losses.softmax_cross_entropy)
  batch = toys.batch_of()
  learner = finetune(loss_fn, optim.sgd(0.1), tuning=tuning.select('bias'))
  state = learner.init(params, KEY)
  after, aux = jax.jit(learner.step)(state, batch, KEY)
  probabilities = jax.nn.softmax(aux.outputs)
  wrong = probabilities - jax.nn.one_hot(batch['label'], 3)
  np.testing.assert_allclose(
    after.trainable['bias'],
    params['bias'] - 0.1 * jnp.mean(wrong, 0),
    rtol=1e-5,
    atol=1e-7,
  )
  np.testing.assert_array_equal(after.frozen['kernel'], params['kernel'])
