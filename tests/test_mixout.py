"""Mixout: its mean, its ends, and the step written out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from fmeta import adapters, gradients, mixout, optim, tree, tuning
from fmeta.errors import UsageError
from fmeta.learner import finetune
from fmeta.losses import softmax_cross_entropy, supervised

KEY = jax.random.key(8)
LOSS, PARAMS, BATCH, FORWARD = toys.problem()


def learner_of(p, inner=gradients.plain, tuned=None, optimizer=None):
  return finetune(
    LOSS,
    optimizer or optim.sgd(0.5),
    tuning=mixout.anchored(tuned or tuning.full()),
    value_and_grad=mixout.mixout(p, inner),
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


@pytest.mark.parametrize(
  'shape, drawn',
  [((5,), (5,)), ((3, 4), (3, 1)), ((2, 2, 3, 4), (1, 1, 3, 1))],
)
def test_a_draw_belongs_to_an_input(shape, drawn):
  start = jnp.zeros(shape)
  mixed = mixout.mix({'w': start + 1}, {'w.start': start}, 0.5, KEY)['w']
  index = tuple(slice(0, n) for n in drawn)
  np.testing.assert_array_equal(mixed, np.broadcast_to(mixed[index], shape))
  assert set(np.unique(mixed)) <= {0.0, 2.0}


def test_probability_zero_is_plain_training_bitwise():
  plain = finetune(LOSS, optim.adamw(0.05))
  mixed = learner_of(0.0, optimizer=optim.adamw(0.05))
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
  learner = learner_of(0.6)
  state = moved(learner.init(PARAMS, KEY))
  after, aux = jax.jit(learner.step)(state, BATCH, KEY)
  # What the step hands down: root key, step, stream.
  key = jax.random.fold_in(jax.random.fold_in(KEY, 0), 0)
  drawn = jax.random.fold_in(key, 2**32 - 2)
  ones = jax.tree.map(jnp.ones_like, state.trainable)
  starts = jax.tree.map(jnp.zeros_like, state.frozen)
  # Of ones and zeros a mixture shows its mask, scaled by 1 / 0.4.
  masks = mixout.mix(ones, starts, 0.6, drawn)

  def mixed(name, t):
    if not name.endswith('kernel'):
      return t, 1.0
    m = np.round(0.4 * np.asarray(tree.get(masks, name)))
    u = tree.get(PARAMS, name)
    return ((1 - m) * u + m * t - 0.6 * u) / 0.4, m / 0.4

  pairs = tree.map_with_name(mixed, state.trainable)
  is_pair = lambda x: isinstance(x, tuple)
  weights = jax.tree.map(lambda x: x[0], pairs, is_leaf=is_pair)
  slopes = jax.tree.map(lambda x: x[1], pairs, is_leaf=is_pair)
  loss, grads = jax.jit(
    jax.value_and_grad(lambda p: LOSS(p, {}, BATCH, None)[0])
  )(weights)
  np.testing.assert_allclose(aux.metrics['loss'], loss, rtol=1e-5)
  jax.tree.map(
    lambda new, t, g, m: np.testing.assert_allclose(
      new, t - 0.5 * m * g, rtol=1e-4, atol=1e-6
    ),
    after.trainable,
    state.trainable,
    grads,
    slopes,
  )


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
  module = toys.NormNet()
  params, model_state = toys.init_of(module)
  loss = supervised(toys.forward_of(module), softmax_cross_entropy)
  for tuned, moves in ((tuning.select('head/.*'), False), (None, True)):
    learner = finetune(
      loss,
      optim.sgd(0.1),
      tuning=mixout.anchored(tuned or tuning.full()),
      value_and_grad=mixout.mixout(0.3),
    )
    state = learner.init(params, KEY, model_state)
    after, _ = jax.jit(learner.step)(state, BATCH, KEY)
    same = jax.tree.map(
      lambda x, y: bool((x == y).all()), after.model_state, model_state
    )
    assert all(jax.tree.leaves(same)) != moves


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
