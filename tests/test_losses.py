import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from fmeta import losses
from fmeta.errors import UsageError

KEY = jax.random.key(6)


def test_cross_entropy_and_accuracy_by_hand():
  logits = jnp.log(jnp.asarray([[0.5, 0.25, 0.25], [0.1, 0.2, 0.7]]))
  loss, metrics = losses.softmax_cross_entropy(
    logits, {'label': jnp.asarray([0, 1])}
  )
  np.testing.assert_allclose(loss, [np.log(2), np.log(5)], rtol=1e-6)
  np.testing.assert_array_equal(metrics['accuracy'], [1, 0])


def test_cross_entropy_of_half_precision_is_float32():
  loss, _ = losses.softmax_cross_entropy(
    jnp.zeros((1, 3), jnp.bfloat16), {'label': jnp.zeros(1, jnp.int32)}
  )
  assert loss.dtype == jnp.float32


def random_logits():
  return jnp.asarray(np.random.default_rng(3).normal(size=(5, 4)), jnp.float32)


def test_a_distribution_as_label_weighs_the_classes():
  logits, label = random_logits(), jnp.asarray([0, 3, 1, 2, 2])
  hard, metrics = losses.softmax_cross_entropy(logits, {'label': label})
  soft, same = losses.softmax_cross_entropy(
    logits, {'label': jax.nn.one_hot(label, 4)}
  )
  np.testing.assert_allclose(soft, hard, rtol=1e-6)
  np.testing.assert_array_equal(same['accuracy'], metrics['accuracy'])
  mixed = 0.3 * jax.nn.one_hot(label, 4) + 0.7 * jax.nn.one_hot(label - 1, 4)
  both, _ = losses.softmax_cross_entropy(logits, {'label': mixed})
  other, _ = losses.softmax_cross_entropy(logits, {'label': (label - 1) % 4})
  kept = label > 0  # One-hot of -1 is nothing.
  np.testing.assert_allclose(
    both[kept], (0.3 * hard + 0.7 * other)[kept], rtol=1e-6
  )
  with pytest.raises(AssertionError):
    losses.softmax_cross_entropy(logits, {'label': jnp.ones((5, 3))})


def test_smoothing_and_focus_by_hand():
  logits = jnp.log(jnp.asarray([[0.5, 0.25, 0.25]]))
  batch = {'label': jnp.asarray([0])}
  loss, metrics = losses.smoothed_cross_entropy(0.3)(logits, batch)
  # Two thirds of 0.3 move to the other classes.
  by_hand = 0.8 * np.log(2) + 0.2 * np.log(4)
  np.testing.assert_allclose(loss, [by_hand], rtol=1e-6)
  np.testing.assert_allclose(metrics['cross_entropy'], [np.log(2)], rtol=1e-6)
  loss, metrics = losses.focal_cross_entropy(2.0)(logits, batch)
  np.testing.assert_allclose(loss, [0.25 * np.log(2)], rtol=1e-6)
  np.testing.assert_allclose(metrics['cross_entropy'], [np.log(2)], rtol=1e-6)
  plain, _ = losses.focal_cross_entropy(0.0)(logits, batch)
  np.testing.assert_allclose(plain, [np.log(2)], rtol=1e-6)
  for make in (losses.smoothed_cross_entropy, losses.focal_cross_entropy):
    with pytest.raises(UsageError, match='-0.5; give'):
      make(-0.5)


@pytest.mark.oracle
@pytest.mark.parametrize('soft', [False, True])
def test_smoothing_equals_torch_with_its_gradient(soft):
  import torch

  logits, label = random_logits(), np.asarray([0, 3, 1, 2, 2])
  if soft:
    label = np.random.default_rng(4).dirichlet(np.ones(4), 5)
    label = label.astype(np.float32)
  there = torch.tensor(np.asarray(logits), requires_grad=True)
  value = torch.nn.CrossEntropyLoss(label_smoothing=0.2)(
    there, torch.tensor(label)
  )
  value.backward()
  criterion = losses.smoothed_cross_entropy(0.2)
  loss, grads = jax.value_and_grad(
    lambda x: criterion(x, {'label': jnp.asarray(label)})[0].mean()
  )(logits)
  np.testing.assert_allclose(loss, value.item(), rtol=1e-6)
  assert there.grad is not None
  np.testing.assert_allclose(grads, there.grad.numpy(), rtol=1e-5, atol=1e-7)


def test_squared_error_is_a_mean_over_the_outputs():
  loss, metrics = losses.squared_error(
    jnp.asarray([[1.0, 3.0]]), {'target': jnp.asarray([[0.0, 0.0]])}
  )
  assert loss == 5.0 and metrics == {}


def test_wrong_shapes_are_refused():
  with pytest.raises(AssertionError):
    losses.squared_error(jnp.zeros((2, 1)), {'target': jnp.zeros(2)})
  with pytest.raises(AssertionError):
    losses.softmax_cross_entropy(
      jnp.zeros((2, 3)), {'label': jnp.zeros((2, 1), jnp.int32)}
    )


def test_padding_rows_change_neither_value_nor_gradient():
  loss_fn, params, batch, _ = toys.problem()
  real = jax.tree.map(lambda x: x[:5], batch)
  padded = {**batch, 'weight': (jnp.arange(8) < 5).astype(jnp.float32)}
  grad = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))
  (short, short_aux), short_grads = grad(params, {}, real, None)
  (long, long_aux), long_grads = grad(params, {}, padded, None)
  np.testing.assert_allclose(long, short, rtol=1e-6)
  assert long_aux.weight == short_aux.weight == 5
  np.testing.assert_allclose(
    long_aux.metrics['accuracy'], short_aux.metrics['accuracy'], rtol=1e-6
  )
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7),
    long_grads,
    short_grads,
  )


def test_a_batch_of_padding_has_zero_loss_and_gradient():
  loss_fn, params, batch, _ = toys.problem()
  batch = {**batch, 'weight': jnp.zeros(8)}
  grad = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))
  (loss, aux), grads = grad(params, {}, batch, None)
  assert loss == 0 and aux.weight == 0
  assert all(not np.any(g) for g in jax.tree.leaves(grads))


def test_cast_runs_in_bfloat16_on_float32_masters():
  seen = []

  def forward(params, model_state, batch, rng):
    seen.append((params['p'].dtype, batch['x'].dtype, batch['label'].dtype))
    return params['p'] * batch['x'], model_state

  lowered = losses.cast(forward, jnp.bfloat16)
  batch = {'x': jnp.ones(2), 'label': jnp.ones(2, jnp.int32)}

  def loss(params):
    return lowered(params, {}, batch, KEY)[0].sum()

  grads = jax.grad(loss)({'p': jnp.asarray(1.0)})
  assert seen[0] == (jnp.bfloat16, jnp.bfloat16, jnp.int32)
  assert grads['p'].dtype == jnp.float32
  assert lowered({'p': 1.0}, {}, batch, None)[0].dtype == jnp.float32
