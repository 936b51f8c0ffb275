"""Mixout: its mean, its ends, and the step written out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from fmeta import adapters, mixout, optim, tree, tuning
from fmeta.errors import UsageError
from fmeta.learner import finetune
from fmeta.types import Aux

KEY = jax.random.key(8)
LOSS, PARAMS, BATCH, FORWARD = toys.problem()


def learner_of(p, tuned=None):
  return finetune(
    LOSS,
    optim.sgd(0.05, momentum=0.9),
    tuning=mixout.anchored(tuned or tuning.full()),
    value_and_grad=mixout.mixout(p),
  )


def test_the_mean_of_the_mixed_weights_is_the_weights():
  trainable = {'k': {'kernel': jnp.asarray([[1.0, -2.0], [0.5, 3.0]])}}
  frozen = {'k': {'kernel.start': jnp.asarray([[4.0, 1.0], [0.0, -1.0]])}}
  keys = jax.random.split(KEY, 20000)
  mixed = jax.jit(
    jax.vmap(lambda key: mixout.mix(trainable, frozen, 0.7, key))
  )(keys)['k']['kernel']
  t, u = trainable['k']['kernel'], frozen['k']['kernel.start']
  # Two values: the start, and t pushed away so far that the mean is t.
  pushed = (t - 0.7 * u) / 0.3
  is_start = np.isclose(mixed, u)
  assert (is_start | np.isclose(mixed, pushed, atol=1e-5)).all()
  # All that leaves an input is replaced together, inputs independently.
  assert (is_start[..., 0] == is_start[..., 1]).all()
  correlation = np.corrcoef(is_start[:, 0, 0], is_start[:, 1, 0])[0, 1]
  assert abs(correlation) < 4 / 20000**0.5
  # Four standard errors: a value's deviation is |t - u| sqrt(p / (1 - p)).
  error = np.abs(t - u) * (0.7 / 0.3 / 20000) ** 0.5
  assert (np.abs(mixed.mean(0) - t) < 4 * error).all()
  assert abs(is_start.mean() - 0.7) < 0.01


def test_a_draw_belongs_to_an_input():
  drawn = {(5,): (5,), (3, 4): (3, 1), (2, 2, 3, 4): (1, 1, 3, 1)}
  starts = {f'{k}.start': jnp.zeros(s) for k, s in enumerate(drawn)}
  ones = {str(k): jnp.ones(s) for k, s in enumerate(drawn)}
  mixed = jax.jit(lambda rng: mixout.mix(ones, starts, 0.5, rng))(KEY)
  for k, (shape, part) in enumerate(drawn.items()):
    found = np.asarray(mixed[str(k)])
    index = tuple(slice(0, n) for n in part)
    np.testing.assert_array_equal(found, np.broadcast_to(found[index], shape))
    assert set(np.unique(found)) == {0.0, 2.0}


def test_probability_zero_is_plain_training_bitwise(optimised):
  plain = finetune(LOSS, optim.sgd(0.05, momentum=0.9))
  mixed = learner_of(0.0)
  a, b = plain.init(PARAMS, KEY), mixed.init(PARAMS, KEY)
  first, second = jax.jit(plain.step), jax.jit(mixed.step)
  for _ in range(3):
    (a, aux), (b, other) = first(a, BATCH, KEY), second(b, BATCH, KEY)
  jax.tree.map(np.testing.assert_array_equal, a.trainable, b.trainable)
  assert aux.metrics['loss'] == other.metrics['loss']


def moved(state):
  """The trainable leaves somewhere else than where they started."""
  return state.replace(
    trainable=jax.tree.map(lambda x: 1.5 * x + 0.1, state.trainable)
  )


def test_a_step_is_the_gradient_through_the_mixture():
  def loss_fn(params, model_state, batch, rng):
    halves = [0.5 * jnp.sum(x**2) for x in jax.tree.leaves(params)]
    return sum(halves), Aux(model_state, {}, jnp.ones(()))

  learner = finetune(
    loss_fn,
    optim.sgd(0.5),
    tuning=mixout.anchored(tuning.full()),
    value_and_grad=mixout.mixout(0.6),
  )
  start = np.random.default_rng(0).normal(size=(6, 2)).astype(np.float32)
  params = {'kernel': jnp.asarray(start), 'bias': jnp.ones(2)}
  state = moved(learner.init(params, KEY))
  after, aux = jax.jit(learner.step)(state, {}, KEY)
  # What the step hands down: root key, step, stream; of ones and zeros a
  # mixture shows its mask, scaled by 1 / 0.4.
  key = jax.random.fold_in(jax.random.fold_in(KEY, 0), 0)
  mask = mixout.mix(
    {'kernel': jnp.ones((6, 2))},
    {'kernel.start': jnp.zeros((6, 2))},
    0.6,
    jax.random.fold_in(key, 2**32 - 2),
  )
  m = np.round(0.4 * np.asarray(mask['kernel']))
  assert set(np.unique(m)) == {0, 1}
  t, bias = (np.asarray(state.trainable[k]) for k in ('kernel', 'bias'))
  mixed = ((1 - m) * start + m * t - 0.6 * start) / 0.4
  value = 0.5 * (mixed**2).sum() + 0.5 * (bias**2).sum()
  np.testing.assert_allclose(aux.metrics['loss'], value, rtol=1e-5)
  np.testing.assert_allclose(
    after.trainable['kernel'], t - 0.5 * m / 0.4 * mixed, rtol=1e-5, atol=1e-6
  )
  # A leaf without a start moves as ever.
  np.testing.assert_allclose(after.trainable['bias'], 0.5 * bias, rtol=1e-6)


def test_models_and_exports_never_see_the_starts():
  learner = learner_of(0.5, tuned=tuning.select('body/.*'))
  state = moved(learner.init(PARAMS, KEY))
  starts = [n for n in tree.names(state.frozen) if n.endswith('.start')]
  assert starts == [
    'body/layer_0/kernel.start',
    'body/layer_1/kernel.start',
  ]
  assert tree.names(learner.params(state)) == tree.names(PARAMS)
  with learner.using(state) as params:
    assert tree.names(params) == tree.names(PARAMS)
  kernel = state.frozen['body']['layer_0']['kernel.start']
  np.testing.assert_array_equal(kernel, PARAMS['body']['layer_0']['kernel'])


def test_frozen_statistics_stay_under_an_anchored_tuning():
  params, old = toys.init_of(toys.NormNet())
  new = jax.tree.map(lambda x: x + 1, old)
  for tuned, expected in (
    (tuning.select('head/.*'), old),
    (tuning.select('body/.*'), new),
    (tuning.full(), new),
  ):
    tuned = mixout.anchored(tuned)
    found = tuned.keep(old, new, *tuned.init(params, KEY))
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_bad_input_is_refused_in_one_line():
  for p in (1.0, -0.1):
    with pytest.raises(UsageError, match='give one in'):
      mixout.mixout(p)
  bare = finetune(LOSS, optim.sgd(0.1), value_and_grad=mixout.mixout(0.5))
  with pytest.raises(UsageError, match='tuning=anchored'):
    jax.eval_shape(bare.step, bare.init(PARAMS, KEY), BATCH, KEY)
  # Factors of LoRA are no kernels.
  lora = mixout.anchored(adapters.lora('body/.*/kernel', rank=1))
  with pytest.raises(UsageError, match=r"no parameter matches '\.\*kernel'"):
    lora.init(PARAMS, KEY)
