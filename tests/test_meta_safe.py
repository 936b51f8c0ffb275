"""Optimisers are differentiated only if they can be."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toys

from fmeta import gradients, meta, meta_safe, optim, penalty
from fmeta.errors import UsageError
from fmeta.learner import adapt, finetune
from fmeta.types import Aux

KEY = jax.random.key(3)
REFUSED = 'wrong derivative where one gradient is exactly zero.*eps_root=1e-8'
UNSAFE = {
  'adam': lambda: optim.adam(0.01),
  'clipped by optax': lambda: optax.chain(
    optax.clip_by_global_norm(1.0), optax.sgd(0.1)
  ),
}
EPISODE = {
  'support': {'c': jnp.ones((1, 3))},
  'query': {'c': jnp.zeros((1, 3))},
}
PARAMS = {'body': {'kernel': jnp.asarray([1.0, -2.0, 0.5])}}


def _loss(params, model_state, batch, rng):
  error = params['body']['kernel'] - batch['c']
  return 0.5 * jnp.sum(error**2), Aux(model_state, {}, jnp.ones(()))


def _maml(optimizer, **options):
  return meta.episode_loss(finetune(_loss, optimizer, **options), _loss, 2)


def _gradient(loss_fn, params=PARAMS):
  return jax.grad(lambda p: loss_fn(p, {}, EPISODE, KEY)[0])(params)


@pytest.mark.parametrize('name', UNSAFE)
def test_an_unsafe_optimiser_is_refused_with_the_reason(name):
  with pytest.raises(UsageError, match='wrong derivative .* eps_root=1e-8'):
    meta.check_meta_safe(UNSAFE[name]())


def test_a_meta_gradient_through_adam_is_refused_in_one_line():
  loss_fn = _maml(optim.adam(0.1))
  assert np.isfinite(loss_fn(PARAMS, {}, EPISODE, KEY)[0])  # evaluation
  with pytest.raises(UsageError, match=REFUSED) as caught:
    jax.jit(lambda: _gradient(loss_fn))()
  assert '\n' not in str(caught.value)


def test_a_forward_mode_meta_gradient_is_refused_as_well():
  loss_fn = _maml(optim.adam(0.1))
  with pytest.raises(UsageError, match=REFUSED):
    jax.jvp(lambda p: loss_fn(p, {}, EPISODE, KEY)[0], (PARAMS,), (PARAMS,))


def test_first_order_and_reptile_take_any_inner_optimiser():
  adam = optim.adam(0.1)
  first = _maml(adam, value_and_grad=gradients.first_order())
  reptile = meta.reptile_loss(finetune(_loss, adam), 2)
  # Two steps of Adam towards 1, each of length 0.1.
  moved = np.asarray([-0.2, 0.2, 0.2])
  start = np.asarray(PARAMS['body']['kernel'])
  moved[0] = 0.0  # it starts at its optimum
  found = _gradient(reptile)['body']['kernel']
  np.testing.assert_allclose(found, -moved, rtol=0.01, atol=1e-6)
  found = _gradient(first)['body']['kernel']
  np.testing.assert_allclose(found, start + moved, rtol=0.01)


def test_a_penalty_lets_the_gradient_flow_again():
  loss_fn = _maml(
    optim.adam(0.1),
    value_and_grad=gradients.first_order(),
    penalty=penalty.l2_sp(0.1),
  )
  with pytest.raises(UsageError, match=REFUSED):
    _gradient(loss_fn)


@pytest.mark.parametrize('eps_root', [0.0, 1e-8])
def test_a_learned_rate_is_measured_with_a_stand_in(eps_root):
  def inner(hyper):
    # No pattern for names that the model does not have.
    rates = (('body/kernel', hyper['rates']),)
    return finetune(
      _loss,
      optim.adamw(
        hyper['rate'],
        decay=(('body/.*', 1.0),),
        multipliers=rates,
        eps_root=eps_root,
      ),
    )

  loss_fn = meta.episode_loss(inner, _loss, 2)
  hyper = {'rate': jnp.asarray(0.1), 'rates': jnp.ones(3)}
  params = {'model': PARAMS, 'hyper': hyper}
  if eps_root:
    grads = jax.jit(jax.vmap(lambda r: _gradient(loss_fn, _with(params, r))))
    assert np.all(np.isfinite(grads(jnp.ones(2))['hyper']['rates']))
  else:
    with pytest.raises(UsageError, match=REFUSED):
      _gradient(loss_fn, params)


def _with(params, rate):
  return {**params, 'hyper': {**params['hyper'], 'rate': rate}}


def test_one_optimiser_is_measured_once(monkeypatch):
  calls = []
  slope = meta_safe._slope
  monkeypatch.setattr(
    meta_safe, '_slope', lambda *args: calls.append(args) or slope(*args)
  )
  for _ in range(2):
    _gradient(_maml(optim.sgd(0.0625)))
  assert len(calls) == 4  # points


def test_the_probe_has_one_small_leaf_of_each_kind():
  shapes = {
    'a/kernel': (30, 4),
    'b/kernel': (20, 4),
    'b/bias': (4,),
    'c/kernel': (2, 3, 3, 4),
    'word/embedding': (30000, 384),
  }
  like = {n: jax.ShapeDtypeStruct(s, 'float32') for n, s in shapes.items()}
  chosen = meta_safe._smallest(like)
  assert chosen == {n: s for n, s in shapes.items() if n != 'a/kernel'}
  cut = meta_safe._cut(chosen)
  assert cut['b/kernel'] == (8, 4) and cut['word/embedding'] == (8, 8)


def test_a_rate_per_parameter_is_measured_on_the_whole_leaf():
  like = {'kernel': jnp.zeros((9, 2))}
  rates = jnp.linspace(0.5, 1.5, 18).reshape(9, 2)
  optimizer = optim.sgd(0.1, multipliers=(('kernel', rates),))
  assert not any(s.wrong for s in meta_safe.meta_slopes(optimizer, like=like))


def test_an_optimiser_gets_the_loss_and_its_value(x64):
  def update(updates, state, params=None, *, value, obj_fn, **extra):
    again, slope = jax.value_and_grad(obj_fn)(params)
    still = jax.tree.map(jnp.zeros_like, updates)
    return still, {'value': value, 'again': again, 'slope': slope}

  watching = optax.GradientTransformationExtraArgs(
    lambda params: optax.EmptyState(), update
  )
  loss_fn, params, batch, _ = toys.problem(dropout=0.3, sizes=(4,))
  learner = finetune(loss_fn, watching, penalty=penalty.l2_sp(0.5))
  state = learner.init(toys.double(params), KEY)
  shifted = jax.tree.map(lambda p: p + 0.1, state.trainable)
  after, aux = jax.jit(learner.step)(
    state.replace(trainable=shifted), toys.double(batch), KEY
  )
  total = aux.metrics['loss'] + aux.metrics['penalty']
  assert aux.metrics['penalty'] > 0
  np.testing.assert_allclose(after.opt_state['value'], total, rtol=1e-12)
  # The same dropout, hence the same number.
  np.testing.assert_allclose(after.opt_state['again'], total, rtol=1e-12)
  norm = optax.tree.norm(after.opt_state['slope'])
  np.testing.assert_allclose(norm, aux.metrics['grad_norm'], rtol=1e-12)


def test_a_start_kept_by_the_optimiser_is_a_copy():
  learner = finetune(_loss, optax.contrib.dog())
  state = learner.init(PARAMS, KEY)
  step = jax.jit(
    lambda s: adapt(learner, s, lambda _: {'c': jnp.ones(3)}, KEY, num_steps=1),
    donate_argnums=0,
  )
  state = state.replace(trainable=jax.tree.map(jnp.copy, state.trainable))
  after, _ = step(state)
  kept = optax.tree.get(after.opt_state, 'init_params')
  np.testing.assert_array_equal(
    kept['body']['kernel'], PARAMS['body']['kernel']
  )
