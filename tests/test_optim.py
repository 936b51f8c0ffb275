import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fmeta import optim
from fmeta.errors import UsageError

PARAMS = {
  'body': {'kernel': jnp.array([[1.0, -2.0]]), 'bias': jnp.array([3.0])},
  'head': {'kernel.lora_a': jnp.array([[4.0]]), 'scale': jnp.array([5.0])},
}
GRADS = jax.tree.map(lambda x: 0.1 * x + 0.3, PARAMS)


def _updates(optimizer, num_steps=1, params=PARAMS, grads=GRADS):
  state = optimizer.init(params)
  for _ in range(num_steps):
    updates, state = optimizer.update(grads, state, params)
    params = optax.apply_updates(params, updates)
  return params


def _close(found, expected, rtol=1e-5):
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol), found, expected
  )


def test_adamw_equals_optax_with_a_mask_and_clipping():
  mask = {
    'body': {'kernel': True, 'bias': False},
    'head': {'kernel.lora_a': True, 'scale': False},
  }
  peer = optax.chain(
    optax.clip_by_global_norm(0.5),
    optax.adamw(0.1, weight_decay=0.3, mask=mask),
  )
  ours = optim.adamw(0.1, weight_decay=0.3, clip_norm=0.5)
  _close(_updates(ours, 4), _updates(peer, 4))


def test_sgd_equals_optax_with_momentum():
  ours, peer = optim.sgd(0.1, momentum=0.9), optax.sgd(0.1, momentum=0.9)
  _close(_updates(ours, 4), _updates(peer, 4))


def test_clipping_at_zero_is_clipping_and_may_be_traced():
  for make in (optim.sgd, optim.adamw):
    options = {} if make is optim.sgd else {'weight_decay': 0.0}
    still = _updates(make(0.1, clip_norm=0.0, **options))
    _close(still, PARAMS, rtol=0)
  traced = jax.jit(lambda c: _updates(optim.sgd(0.1, clip_norm=c)))(0.5)
  _close(traced, _updates(optim.sgd(0.1, clip_norm=0.5)))


def test_each_leaf_moves_by_its_first_matching_multiplier():
  multipliers = (('head/.*', 2.0), ('.*/bias', 0.0), ('.*', 0.5))
  found = _updates(optim.sgd(0.1, multipliers=multipliers))
  scale = {
    'body': {'kernel': 0.5, 'bias': 0.0},
    'head': {'kernel.lora_a': 2.0, 'scale': 2.0},
  }
  expected = jax.tree.map(lambda p, g, m: p - 0.1 * m * g, PARAMS, GRADS, scale)
  _close(found, expected)


def test_a_layer_wise_rate_scales_adam_and_its_decay():
  multipliers = (('head/.*', 0.5), ('.*', 1.0))
  slow = _updates(optim.adamw(0.1, multipliers=multipliers))['head']
  half = _updates(optim.adamw(0.05))['head']
  _close(slow, half, rtol=1e-6)


def test_multipliers_and_rates_may_be_traced():
  def move(rate, head):
    multipliers = (('head/.*', head), ('.*', 1.0))
    return _updates(optim.adamw(rate, multipliers=multipliers))

  multipliers = (('head/.*', 3.0), ('.*', 1.0))
  expected = _updates(optim.adamw(0.2, multipliers=multipliers))
  _close(jax.jit(move)(0.2, 3.0), expected)


@pytest.mark.parametrize('make', [optim.scale_by_patterns, lambda p: (
  optim.decay_by_patterns(0.1, p)
)], ids=['rate', 'decay'])  # fmt: skip
def test_an_uncovered_leaf_is_refused_at_init_by_its_name(make):
  with pytest.raises(UsageError, match="no pattern gives 'body/bias' a"):
    make((('head/.*', 1.0),)).init(PARAMS)


def test_layerwise_decay_shrinks_away_from_the_output():
  pairs = optim.layerwise_decay(['a', 'b', 'c'], 0.5)
  assert pairs == (('a', 0.25), ('b', 0.5), ('c', 1.0))


def test_warmup_linear_by_hand():
  rate = optim.warmup_linear(8.0, 10, warmup=0.3)
  expected = [2, 4, 6, 8, 8 * 6 / 7, 8 * 5 / 7, 8 * 4 / 7, 8 * 3 / 7]
  expected += [8 * 2 / 7, 8 / 7, 0, 0]
  found = [rate(jnp.asarray(i)) for i in range(12)]
  np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize('num_steps', [1, 2, 7])
@pytest.mark.parametrize('warmup', [0.0, 0.1, 1.0])
def test_every_step_of_a_schedule_moves_and_one_reaches_the_peak(
  num_steps, warmup
):
  rate = optim.warmup_linear(2.0, num_steps, warmup)
  rates = [float(rate(i)) for i in range(num_steps)]
  assert min(rates) > 0
  assert rates.count(2.0) == (1 if warmup < 1 else 0)
  assert float(rate(num_steps)) in (0.0, 2.0)
  if warmup == 0:
    expected = [2 * (num_steps - i) / num_steps for i in range(num_steps)]
    np.testing.assert_allclose(rates, expected, rtol=1e-6)


def test_a_peak_may_be_traced_and_a_schedule_drives_an_optimizer():
  def move(peak):
    return _updates(optim.sgd(optim.warmup_linear(peak, 4, 0.5)), 2)

  # Rates 1/3 and 2/3 of the peak with constant gradients.
  expected = jax.tree.map(lambda p, g: p - 0.3 * g, PARAMS, GRADS)
  _close(jax.jit(move)(0.3), expected)
