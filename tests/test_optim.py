import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fmeta import optim, tree
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


def test_the_ratio_of_lora_plus_is_a_multiplier():
  rates = (('.*lora_b', 16.0), ('.*', 1.0))
  params = {'up': {'kernel.lora_a': jnp.ones(2), 'kernel.lora_b': jnp.ones(2)}}
  ones = jax.tree.map(jnp.ones_like, params)
  optimizer = optim.sgd(0.5, multipliers=rates)
  moved, _ = optimizer.update(ones, optimizer.init(params), params)
  assert moved['up']['kernel.lora_a'][0] == -0.5
  assert moved['up']['kernel.lora_b'][0] == -8.0


def test_a_direction_moves_by_the_written_formula():
  # p - rate m (direction(clip(g)) + weight_decay d p), direction = 3 g.
  optimizer = optim.with_rates(
    optax.scale(3.0),
    0.1,
    weight_decay=0.5,
    multipliers=(('head/.*', 2.0), ('.*', 1.0)),
    clip_norm=1.0,
  )
  norm = float(optax.tree.norm(GRADS))
  assert norm > 1
  decays = {
    'body': {'kernel': 1, 'bias': 0},
    'head': {'kernel.lora_a': 1, 'scale': 0},
  }
  rates = {
    'body': {'kernel': 0.1, 'bias': 0.1},
    'head': {'kernel.lora_a': 0.2, 'scale': 0.2},
  }
  expected = jax.tree.map(
    lambda p, g, m, d: p - m * (3 * g / norm + 0.5 * d * p),
    PARAMS,
    GRADS,
    rates,
    decays,
  )
  _close(_updates(optimizer), expected)


def _once(clip, grads, params=PARAMS):
  return jax.jit(lambda g: clip.update(g, clip.init(params), params)[0])(grads)


@pytest.mark.parametrize('bound', [0.1, 100.0])
@pytest.mark.parametrize('what', ['norm', 'unit'])
def test_clips_are_those_of_optax_where_there_is_a_gradient(what, bound):
  ours, peer = {
    'norm': (optim.clip_by_norm, optax.clip_by_global_norm),
    'unit': (optim.clip_by_unit, optax.adaptive_grad_clip),
  }[what]
  params = {'kernel': jnp.arange(12.0).reshape(3, 4), 'bias': jnp.ones(4)}
  grads = jax.tree.map(jnp.cos, params)
  ours = _once(ours(bound), grads, params)
  peer = _once(peer(bound), grads, params)
  if what == 'norm':
    jax.tree.map(np.testing.assert_array_equal, ours, peer)
  _close(ours, peer, rtol=1e-6)


@pytest.mark.parametrize('make', [optim.clip_by_norm, optim.clip_by_unit])
def test_a_clip_has_a_derivative_at_zero_and_keeps_a_nan(make):
  clip = make(0.5)
  zero = jax.tree.map(jnp.zeros_like, GRADS)

  def total(grads):
    clipped = clip.update(grads, clip.init(PARAMS), PARAMS)[0]
    return sum(jnp.sum(g) for g in jax.tree.leaves(clipped))

  # Nothing is clipped near zero: the identity.
  _close(jax.jit(jax.grad(total))(zero), jax.tree.map(jnp.ones_like, zero))
  broken = {**GRADS, 'body': jax.tree.map(lambda g: g * jnp.nan, GRADS['body'])}
  assert np.isnan(jax.jit(total)(broken))


def test_blocks_run_from_input_to_output():
  names = [
    *(f'body/layer_{k}/mlp/kernel' for k in (10, 2, 0)),
    'body/pooler/kernel',
    'body/embeddings/word/embedding',
    'head/kernel',
  ]
  params = {}
  for name in names:
    params = tree.combine(params, _nested(name.split('/')))
  blocks = optim.blocks_of(params)
  assert blocks == [
    'body/embeddings/.*',
    'body/layer_0/.*',
    'body/layer_2/.*',
    'body/layer_10/.*',
    'body/pooler/.*',
    'head/.*',
  ]
  rates = tree.match(params, optim.layerwise_decay(blocks, 1 / 2.6))
  np.testing.assert_allclose(
    tree.get(rates, 'body/layer_10/mlp/kernel'), 2.6**-2
  )
  stages = {'body': {'stage_1': {}, 'stem': {}, 'stage_0': {}}, 'head': {}}
  leaves = jax.tree.map(lambda _: {'block_0': {'kernel': 0}}, stages, is_leaf=(
    lambda x: x == {}
  ))  # fmt: skip
  assert optim.blocks_of(leaves) == [
    'body/stem/.*',
    'body/stage_0/.*',
    'body/stage_1/.*',
    'head/.*',
  ]
  with pytest.raises(
    UsageError, match=r'no parameter is named body/.*\[layers\]'
  ):
    optim.blocks_of({'layers': {'kernel': 0}})


def _nested(parts):
  return {parts[0]: _nested(parts[1:]) if len(parts) > 1 else 0}
