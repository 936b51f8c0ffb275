"""Bottleneck adapters, and what it means that they cannot be merged."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import toys

from fmeta import (
  adapters,
  data,
  losses,
  models,
  optim,
  penalty,
  pretrained,
  train,
  tree,
  tuning,
)
from fmeta.errors import UsageError
from fmeta.learner import finetune

KEY = jax.random.key(5)
_, PARAMS, BATCH, PLAIN = toys.problem()
PARAMS = jax.tree.map(lambda x: x if x.ndim > 1 else x + 0.3, PARAMS)
FORWARD = adapters.entering(PLAIN)
KERNELS = r'body/layer_\d/kernel'
BOTTLENECK = adapters.bottleneck(KERNELS, width=3, also=('head/.*',))


def supervised(forward):
  return losses.supervised(forward, losses.softmax_cross_entropy)


LEARNER = finetune(supervised(FORWARD), optim.adam(0.1), tuning=BOTTLENECK)


@pytest.fixture(scope='module')
def trained():
  """A state some steps from its start."""
  state, step = LEARNER.init(PARAMS, KEY), jax.jit(LEARNER.step)
  for _ in range(3):
    state, _ = step(state, BATCH, KEY)
  return state


def by_hand(params, x):
  """The toy net with adapters behind its hidden layers, numpy, float64."""

  def dense(layer, x):
    return x @ layer['kernel'] + layer['bias']

  params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
  x = np.asarray(x, np.float64)
  for k in range(2):
    layer = params['body'][f'layer_{k}']
    x = dense(layer, x)
    inner = x @ layer['kernel.adapter_down'] + layer['kernel.adapter_down_bias']
    inner = inner * scipy.special.ndtr(inner)
    x = x + inner @ layer['kernel.adapter_up'] + layer['kernel.adapter_up_bias']
    x = np.tanh(x)
  return dense(params['head'], x)


def test_the_model_starts_unchanged():
  state = LEARNER.init(PARAMS, KEY)
  down = state.trainable['body']['layer_0']['kernel.adapter_down']
  assert down.shape == (5, 3) and 0 < np.abs(down).max() <= 0.02
  np.testing.assert_array_equal(
    FORWARD(LEARNER.params(state), {}, BATCH, None)[0],
    PLAIN(PARAMS, {}, BATCH, None)[0],
  )


def test_outputs_equal_the_formula(trained):
  params = LEARNER.params(trained)
  outputs, _ = FORWARD(params, {}, BATCH, None)
  np.testing.assert_allclose(
    outputs, by_hand(params, BATCH['x']), rtol=1e-5, atol=1e-6
  )
  apart = outputs - PLAIN(PARAMS, {}, BATCH, None)[0]
  assert np.abs(apart).max() > 0.01


def test_merged_parameters_and_the_interceptor_are_one_function(trained):
  with LEARNER.using(trained) as params:
    inside, _ = FORWARD(params, {}, BATCH, None)
  outside, _ = FORWARD(LEARNER.params(trained), {}, BATCH, None)
  np.testing.assert_array_equal(inside, outside)


def test_adapters_and_head_move_and_nothing_else(trained):
  start = LEARNER.init(PARAMS, KEY)
  jax.tree.map(np.testing.assert_array_equal, trained.frozen, start.frozen)
  assert tree.size(trained.trainable) == (
    tree.size(PARAMS['head']) + (5 * 3 + 3 + 3 * 5 + 5) + (4 * 3 + 3 + 12 + 4)
  )
  for name in tree.names(start.trainable):
    before, after = (tree.get(s.trainable, name) for s in (start, trained))
    assert np.any(before != after), name


def test_a_penalty_sees_the_adapters_own_leaves(trained):
  moving = penalty.moving_leaves(trained.trainable, LEARNER.params(trained))
  jax.tree.map(np.testing.assert_array_equal, moving, trained.trainable)


def test_by_default_no_bias_or_scale_of_an_adapter_decays():
  params = adapters.ia3_init(PARAMS, ('head/kernel',), ('head/kernel',))
  params = adapters.bottleneck_init(params, KEY, ('head/kernel',), 2)
  params = adapters.subspace_init(params, 2, 1)
  decays = tree.match(params, optim.DECAY)
  assert [name for name in tree.names(params) if tree.get(decays, name)] == [
    'body/layer_0/kernel',
    'body/layer_1/kernel',
    'head/kernel',
    'head/kernel.adapter_down',
    'head/kernel.adapter_up',
    'subspace.direction',
  ]


def test_a_frozen_adapter_still_runs(trained):
  params = LEARNER.params(trained)
  probe = finetune(
    supervised(FORWARD), optim.sgd(0.1), tuning=tuning.select('head/.*')
  )
  state, aux = jax.jit(probe.step)(probe.init(params, KEY), BATCH, KEY)
  np.testing.assert_allclose(
    aux.outputs, by_hand(params, BATCH['x']), rtol=1e-5, atol=1e-6
  )
  assert set(state.trainable) == {'head'}


def test_fit_evaluates_and_returns_the_adapted_model():
  batches = data.batches(dict(BATCH), batch_size=8, seed=0)
  seen = []

  def watch(params, model_state):
    seen.append(FORWARD(params, model_state, BATCH, None)[0])
    return {'mean': float(seen[-1].mean())}

  fitted = train.fit(
    LEARNER,
    LEARNER.init(PARAMS, KEY),
    [train.Stage('plain', batches, 2)],
    KEY,
    evaluate=watch,
    forward=FORWARD,
  )
  np.testing.assert_allclose(
    seen[-1], by_hand(fitted.params, BATCH['x']), rtol=1e-5, atol=1e-6
  )
  assert np.any(fitted.params['body']['layer_0']['kernel.adapter_up'])


def test_a_forward_that_would_drop_the_adapters_is_refused():
  # A name of its own: what has entered once counts as able to.
  params = {'part': PARAMS['body'], 'head': PARAMS['head']}

  def forward(params, model_state, batch, rng):
    renamed = {'body': params['part'], 'head': params['head']}
    return PLAIN(renamed, model_state, batch, rng)

  made = adapters.bottleneck('part/layer_0/kernel')
  learner = finetune(supervised(forward), optim.sgd(0.1), tuning=made)
  with pytest.raises(UsageError, match='adapter_down.*adapters.entering'):
    jax.eval_shape(learner.step, learner.init(params, KEY), BATCH, KEY)


def test_a_forward_traced_once_keeps_its_adapters(trained):
  calls = []

  def counted(*args):
    calls.append(1)
    return FORWARD(*args)

  jitted = jax.jit(counted)
  learner = finetune(supervised(jitted), optim.adam(0.1), tuning=BOTTLENECK)
  for _ in range(2):
    jax.eval_shape(lambda *args: learner.step(*args), trained, BATCH, KEY)
  assert len(calls) == 1


def test_an_export_without_a_place_for_adapters_is_refused(tmp_path):
  config = models.BertConfig(
    vocab_size=9, hidden_size=4, num_layers=1, num_heads=1, intermediate_size=4
  )
  kernel = {'kernel.prefix': np.zeros((2, 4), np.float32)}
  params = {'body': {'layer_0': {'attention': {'key': kernel}}}}
  with pytest.raises(UsageError, match='no place for .*kernel.prefix'):
    pretrained.save_bert(tmp_path / 'model', params, config)
  assert not (tmp_path / 'model').exists()


def test_bad_requests_are_refused():
  with pytest.raises(UsageError, match='width 0'):
    adapters.bottleneck(KERNELS, width=0).init(PARAMS, KEY)
  with pytest.raises(UsageError, match='one leaf of each layer'):
    adapters.bottleneck('head/.*').init(PARAMS, KEY)
  with pytest.raises(UsageError, match='no parameter matches'):
    adapters.bottleneck('hed/kernel').init(PARAMS, KEY)


def test_adapters_of_an_outer_loop_are_used_and_must_fit():
  grown = adapters.bottleneck_init(PARAMS, jax.random.key(9), (KERNELS,), 3)
  trainable, _ = BOTTLENECK.init(grown, KEY)
  np.testing.assert_array_equal(
    trainable['body']['layer_1']['kernel.adapter_down'],
    grown['body']['layer_1']['kernel.adapter_down'],
  )
  with pytest.raises(UsageError, match=r'\(5, 3\).*\(5, 2\)'):
    adapters.bottleneck(KERNELS, width=2).init(grown, KEY)
  # Its own draw depends on its name only.
  alone = adapters.bottleneck_init(
    PARAMS, jax.random.key(9), ('body/layer_1/kernel',), 3
  )
  np.testing.assert_array_equal(
    alone['body']['layer_1']['kernel.adapter_down'],
    grown['body']['layer_1']['kernel.adapter_down'],
  )


def test_a_layer_in_bfloat16_stays_in_bfloat16():
  import flax.linen as nn

  module = nn.Dense(3, dtype=jnp.bfloat16)
  params = adapters.bottleneck_init(
    toys.init_of(module)[0], KEY, ('kernel',), 2
  )
  forward = adapters.entering(
    lambda params, *_: (module.apply({'params': params}, jnp.ones((2, 6))), {})
  )
  outputs, _ = jax.eval_shape(lambda p: forward(p, {}, {}, None), params)
  assert outputs.dtype == jnp.bfloat16
