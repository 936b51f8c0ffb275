"""Frozen parameters cost nothing: read from the compiled step."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fmeta import adapters, losses, models, optim, tree, tuning
from fmeta.learner import finetune

CONFIG = models.BertConfig(
  vocab_size=64,
  hidden_size=32,
  num_layers=3,
  num_heads=2,
  intermediate_size=64,
  max_positions=16,
  # Random bits compile slowly and every way of training draws the same.
  dropout=0.0,
  attention_dropout=0.0,
)
KEY = jax.random.key(13)
BATCH = {
  'input_ids': jnp.arange(64).reshape(4, 16) % 64,
  'attention_mask': jnp.ones((4, 16), jnp.int32),
  'label': jnp.asarray([0, 1, 2, 0]),
}
MODULE = models.BertClassifier(CONFIG, num_classes=3)
FORWARD = models.forward(MODULE)
PARAMS, _ = models.init(MODULE, KEY, BATCH)
LOSS = losses.supervised(FORWARD, losses.softmax_cross_entropy)
SELECTED = {
  'probe': ('head/.*',),
  'last layer': ('body/layer_2/.*', 'head/.*'),
}


def _flops(fun, *args):
  return jax.jit(fun).lower(*args).compile().cost_analysis()['flops']


def _chain(params):
  mask = jax.tree.map(lambda x: x.ndim > 1, params)
  return optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.adamw(1e-3, weight_decay=0.01, mask=mask),
  )


def _by_hand(patterns):
  """The leanest step: differentiate the trainable leaves alone."""
  pairs = [(pattern, None) for pattern in patterns]
  moving, still = tree.partition(
    PARAMS, lambda name: tree.first_match(name, pairs) is not None
  )
  chain = _chain(moving)

  def step(moving, still, opt_state, batch, rng):
    def loss(moving):
      return LOSS(tree.combine(still, moving), {}, batch, rng)

    (value, aux), grads = jax.value_and_grad(loss, has_aux=True)(moving)
    updates, opt_state = chain.update(grads, opt_state, moving)
    norms = optax.tree.norm(grads), optax.tree.norm(updates)
    moved = optax.apply_updates(moving, updates)
    return moved, opt_state, value, aux, norms

  return _flops(step, moving, still, chain.init(moving), BATCH, KEY)


def _masked(patterns):
  """The usual way: differentiate everything, zero the frozen updates."""
  pairs = [(pattern, None) for pattern in patterns]
  labels = tree.map_with_name(
    lambda name, _: 'still' if tree.first_match(name, pairs) is None else 'on',
    PARAMS,
  )
  chain = optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.partition(
      {'on': optax.adamw(1e-3), 'still': optax.set_to_zero()}, labels
    ),
  )

  def step(params, opt_state, batch, rng):
    (value, aux), grads = jax.value_and_grad(LOSS, has_aux=True)(
      params, {}, batch, rng
    )
    updates, opt_state = chain.update(grads, opt_state, params)
    norm = optax.tree.norm(grads)
    return optax.apply_updates(params, updates), opt_state, value, aux, norm

  return _flops(step, PARAMS, chain.init(PARAMS), BATCH, KEY)


def _learner(what):
  return finetune(LOSS, optim.adamw(1e-3, clip_norm=1.0), tuning=what)


@pytest.mark.parametrize('name', SELECTED)
def test_a_frozen_parameter_costs_no_flops_and_masking_does(name):
  patterns = SELECTED[name]
  learner = _learner(tuning.select(*patterns))
  ours = _flops(learner.step, learner.init(PARAMS, KEY), BATCH, KEY)
  assert ours <= 1.02 * _by_hand(patterns)
  assert _masked(patterns) > 1.5 * ours


def _products(learner) -> set[str]:
  """Shapes of all matrix products in the compiled step."""
  lowered = jax.jit(learner.step).lower(learner.init(PARAMS, KEY), BATCH, KEY)
  program = lowered.compile().as_text()
  return set(re.findall(r'= f32\[([\d,]*)\]\S* dot\(', program))


def test_lora_through_activations_forms_no_full_weight_gradient():
  # At four rows of 16 tokens only a kernel or its gradient has these shapes.
  full = {'32,32', '32,64'}
  make = dict(rank=2, also=('head/.*',))
  kernels = r'body/layer_\d/.*/kernel'
  assert not full & _products(_learner(adapters.lora(kernels, **make)))
  assert full <= _products(_learner(adapters.lora_merged(kernels, **make)))


# Wide enough that products are what a step costs.
WIDE = dataclasses.replace(
  CONFIG, hidden_size=128, intermediate_size=512, num_layers=2
)
RANK, KERNELS = 8, r'body/layer_\d/.*/kernel'
EIGHTH = {'rank': RANK, 'also': ('head/.*',)}


@pytest.fixture(scope='module')
def wide():
  module = models.BertClassifier(WIDE, num_classes=3)
  batch = jax.tree.map(lambda x: jnp.concatenate([x] * 4), BATCH)
  params, _ = models.init(module, KEY, batch)
  loss_fn = losses.supervised(
    models.forward(module), losses.softmax_cross_entropy
  )

  def compiled(what):
    learner = finetune(loss_fn, optim.adamw(1e-3), tuning=what)
    state = learner.init(params, KEY)
    return jax.jit(learner.step).lower(state, batch, KEY).compile()

  # Biases need the activations' gradients and no kernel's.
  biases = compiled(tuning.select(r'body/layer_\d/.*/bias', 'head/.*'))
  tokens = batch['input_ids'].size
  narrow = sum(
    6 * tokens * RANK * sum(tree.get(params, name).shape)
    for name in tree.names(params)
    if tree.first_match(name, [(KERNELS, None)]) is not None
  )
  return compiled, biases.cost_analysis()['flops'] + narrow, tokens


@pytest.mark.parametrize('make', [adapters.lora, adapters.dora])
def test_a_low_rank_step_costs_its_activations_and_the_factors(make, wide):
  compiled, bound, tokens = wide
  program = compiled(make(KERNELS, **EIGHTH))
  assert 0.9 * bound < program.cost_analysis()['flops'] <= 1.05 * bound
  # A gradient of outputs in transposed order is a strided copy that XLA makes
  # for a kernel's gradient over two leading axes; see `adapters.layers.rows`.
  assert not re.search(rf'= f32\[(512|128),{tokens}\]', program.as_text())


@pytest.mark.parametrize(
  'what',
  [
    tuning.select('body/layer_2/.*', 'head/.*'),
    adapters.lora('body/.*/query/kernel', rank=2, also=('head/.*',)),
    adapters.dora('body/.*/query/kernel', rank=2, also=('head/.*',)),
    adapters.pissa('body/.*/query/kernel', rank=2, also=('head/.*',)),
    adapters.vera('body/.*/query/kernel', rank=2, also=('head/.*',)),
  ],
  ids=['select', 'lora', 'dora', 'pissa', 'vera'],
)
def test_frozen_leaves_have_no_optimiser_bytes(what):
  learner = _learner(what)
  state = jax.eval_shape(learner.init, PARAMS, KEY)
  moments = tree.num_bytes(state.opt_state)
  # Two moments per trainable scalar and a few counters, nothing else.
  assert moments - 2 * tree.num_bytes(state.trainable) <= 16
  assert tree.num_bytes(state.frozen) > 2 * tree.num_bytes(state.trainable)


def test_frozen_leaves_are_bitwise_equal_after_steps():
  learner = _learner(tuning.select('head/.*'))
  state = start = learner.init(PARAMS, KEY)
  step = jax.jit(learner.step)
  for _ in range(3):
    state, _ = step(state, BATCH, KEY)
  jax.tree.map(np.testing.assert_array_equal, state.frozen, start.frozen)
  assert np.any(state.trainable['head']['bias'])
