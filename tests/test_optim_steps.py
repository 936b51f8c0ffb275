"""The optimisers' steps against a few lines of numpy, and against torch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optim_by_hand import KERNEL, RATE, REFERENCES, SLOPES

from fmeta import optim, tree
from fmeta.errors import UsageError
from fmeta.learner import finetune
from fmeta.types import Aux


def _run(optimizer, grads=SLOPES, name='body/kernel'):
  """The kernel after a step per gradient; it is all there is to train."""
  params = {name: jnp.asarray(KERNEL)}

  @jax.jit
  def move(params, grads):
    def step(carry, g):
      params, state = carry
      updates, state = optimizer.update({name: g}, state, params)
      return (optax.apply_updates(params, updates), state), None

    start = params, optimizer.init(params)
    return jax.lax.scan(step, start, grads)[0][0]

  return np.asarray(move(params, jnp.asarray(np.stack(grads)))[name])


# optax takes adafactor's t^-0.8 in float32.
RTOL = {'adafactor': 1e-6}


@pytest.mark.parametrize('name', REFERENCES)
def test_seven_steps_equal_a_few_lines_of_numpy(name, x64):
  reference, build = REFERENCES[name]
  found = _run(build(RATE))
  expected = reference(KERNEL, SLOPES)
  np.testing.assert_allclose(found, expected, rtol=RTOL.get(name, 1e-10))


def test_sophia_is_a_clipped_newton_step_on_a_diagonal(x64):
  # The signs square away: the estimate of a diagonal Hessian is exact.
  bends = jnp.asarray([0.5, 2.0, 40.0])

  def loss_fn(params, model_state, batch, rng):
    value = 0.5 * jnp.sum(bends * params['p'] ** 2)
    return value, Aux(model_state, {}, jnp.ones(()))

  optimizer = optim.sophia(RATE, jax.random.key(1), gamma=1.0, interval=2)
  learner = finetune(loss_fn, optimizer)
  p = np.asarray([3.0, -0.4, 0.001])
  state = learner.init({'p': jnp.asarray(p)}, jax.random.key(0))
  step = jax.jit(learner.step)
  m = h = 0.0
  for t in range(1, 5):
    state, _ = step(state, {}, jax.random.key(0))
    m = 0.965 * m + 0.035 * bends * p
    p = p - RATE * np.clip(m / (1 - 0.965**t) / np.maximum(h, 1e-8), -1, 1)
    h = 0.99 * h + 0.01 * bends if t % 2 else h
    np.testing.assert_allclose(state.trainable['p'], p, rtol=1e-12)


ANY = ('nesterov', 'lars', 'muon', 'prodigy')


@pytest.mark.parametrize('name', ANY)
def test_a_multiplier_scales_the_first_step(name, x64):
  build = {
    'lars': optim.lars,
    'prodigy': lambda rate, **options: optim.prodigy(**options),
  }.get(name, REFERENCES[name][1])
  rates = (('head/.*', 1.0), ('body/.*', 0.25))
  moved = _run(build(RATE), SLOPES[:1]) - KERNEL
  slowed = _run(build(RATE, multipliers=rates), SLOPES[:1]) - KERNEL
  np.testing.assert_allclose(slowed, 0.25 * moved, rtol=1e-9)


def test_muon_leaves_the_head_and_embeddings_to_adam(x64):
  plain = _run(optim.with_rates(optax.scale_by_adam(), RATE), SLOPES[:2])
  for name in ('head/kernel', 'body/word/embedding'):
    found = _run(optim.muon(RATE), SLOPES[:2], name)
    np.testing.assert_allclose(found, plain, rtol=1e-12)
  assert not np.allclose(_run(optim.muon(RATE), SLOPES[:2]), plain)


def test_muon_takes_a_convolution_as_the_matrix_of_its_inputs(x64):
  optimizer = optim.muon(RATE)
  flat = jnp.asarray(np.random.default_rng(5).normal(size=(12, 5)))
  updates = []
  for g in (flat, flat.reshape(2, 3, 2, 5)):
    params = {'body/kernel': jnp.zeros_like(g)}
    update = jax.jit(optimizer.update)
    found, _ = update({'body/kernel': g}, optimizer.init(params), params)
    updates.append(found['body/kernel'].reshape(12, 5))
  np.testing.assert_allclose(updates[0], updates[1], rtol=1e-10)


def test_trust_ratios_leave_out_biases(x64):
  found = _run(optim.lars(RATE), SLOPES[:2], 'body/norm/scale')
  velocity = 0.9 * SLOPES[0] + SLOPES[1]
  expected = KERNEL - RATE * (SLOPES[0] + velocity)
  np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_the_average_of_schedule_free_is_the_mean_of_its_steps(x64):
  def loss_fn(params, model_state, batch, rng):
    value = jnp.sum(params['p'] * batch['g'])
    return value, Aux(model_state, {}, jnp.ones(()))

  inner = optim.sgd(RATE, multipliers=(('p', 2.0),))
  learner = finetune(loss_fn, optim.schedule_free(inner, RATE))
  state = learner.init({'p': jnp.asarray(KERNEL)}, jax.random.key(0))
  step, z, seen = jax.jit(learner.step), KERNEL, []
  for g in SLOPES[:3]:
    state, _ = step(state, {'g': jnp.asarray(g)}, jax.random.key(0))
    z = z - 2 * RATE * g
    seen.append(z)
  average = optim.at_average(state).trainable['p']
  np.testing.assert_allclose(average, np.mean(seen, 0), rtol=1e-9)
  with pytest.raises(UsageError, match='one schedule_free, this has 0'):
    optim.at_average(finetune(loss_fn, inner).init({'p': z}, jax.random.key(0)))


PEERS = {
  'sgd': (optim.sgd, 'SGD', {}),
  'momentum': (
    functools.partial(optim.sgd, momentum=0.9),
    'SGD',
    {'momentum': 0.9},
  ),
  'nesterov': (optim.nesterov, 'SGD', {'momentum': 0.9, 'nesterov': True}),
  'adamw': (
    functools.partial(optim.adamw, clip_norm=None, weight_decay=0.2),
    'AdamW',
    {'weight_decay': 0.2},
  ),
  # torch adds eps after the correction, optax before it.
  'radam': (functools.partial(optim.radam, eps=0.0), 'RAdam', {'eps': 0.0}),
  'adagrad': (
    functools.partial(optim.adagrad, eps=0.0),
    'Adagrad',
    {'initial_accumulator_value': 0.1, 'eps': 0.0},
  ),
  'rmsprop': (
    functools.partial(optim.rmsprop, eps_root=0.0, momentum=0.5),
    'RMSprop',
    {'alpha': 0.9, 'eps': 0.0, 'momentum': 0.5},
  ),
  'adafactor': (
    functools.partial(optim.adafactor, min_dim=2, weight_decay=0.2),
    'Adafactor',
    {'weight_decay': 0.2},
  ),
}


def _torch_run(name, grads, options):
  import torch

  p = torch.nn.Parameter(torch.tensor(KERNEL))
  optimizer = getattr(torch.optim, name)([p], lr=RATE, **options)
  for g in grads:
    p.grad = torch.tensor(g)
    optimizer.step()
  return p.detach().numpy()


@pytest.mark.oracle
@pytest.mark.parametrize('name', PEERS)
def test_seven_steps_equal_torch(name, x64):
  build, peer, options = PEERS[name]
  expected = _torch_run(peer, SLOPES, options)
  found = _run(build(RATE))
  np.testing.assert_allclose(found, expected, rtol=RTOL.get(name, 1e-9))


@pytest.mark.oracle
def test_a_step_of_muon_is_torchs_up_to_bfloat16(x64):
  options = {'weight_decay': 0.0, 'adjust_lr_fn': 'match_rms_adamw'}
  expected = _torch_run('Muon', SLOPES[:1], options) - KERNEL
  found = _run(optim.muon(RATE), SLOPES[:1]) - KERNEL
  # torch iterates in bfloat16: 8 bits of mantissa.
  np.testing.assert_allclose(
    found, expected, atol=0.02 * np.abs(expected).max()
  )


def test_a_factor_is_a_matrix_like_its_kernel():
  for name in ('kernel', 'kernel.lora_a'):
    index = tree.first_match(f'body/layer_0/mlp/up/{name}', optim.MATRICES)
    assert index is not None and optim.MATRICES[index][1] is True
