import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from fmeta import blocks, models, surgical, tree
from fmeta.errors import UsageError
from fmeta.models import ResNet
from fmeta.types import Aux

LOSS, PARAMS, BATCH, FORWARD = toys.problem()
PATTERNS = {
  'body/layer_0': 'body/layer_0/.*',
  'body/layer_1': 'body/layer_1/.*',
  'head': 'head/.*',
}


def shapes_of(module, batch, inputs):
  arrays = [batch[name] for name in inputs]
  return jax.eval_shape(module.init, jax.random.key(0), *arrays)


def found_in(module, batch, inputs, depth=2):
  variables = dict(shapes_of(module, batch, inputs))
  params, run = variables.pop('params'), models.forward(module, inputs)
  state = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), variables)
  return blocks.find(
    lambda p, b: run(p, state, b, None)[0], params, batch, depth=depth
  )


def test_blocks_of_bert_run_from_embeddings_to_head():
  config = models.BertConfig(50, 8, 3, 2, 16, 12)
  ids = jax.ShapeDtypeStruct((2, 4), jnp.int32)
  batch = {'input_ids': ids, 'attention_mask': ids}
  found = found_in(models.BertClassifier(config, 3), batch, models.TEXT)
  layers = [f'body/layer_{k}' for k in range(3)]
  assert list(found) == ['body/embeddings', *layers, 'head']


def test_blocks_of_a_resnet_run_from_stem_to_head():
  batch = {'image': jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)}
  found = found_in(ResNet(14, 5, 4), batch, models.IMAGE)
  stages = ['body/stage_1', 'body/stage_2', 'body/stage_3']
  assert list(found) == ['body/stem', *stages, 'head']
  deeper = list(found_in(ResNet(14, 5, 4), batch, models.IMAGE, depth=3))
  assert deeper[:3] == [
    'body/stem/conv',
    'body/stem/norm',
    'body/stage_1/block_0',
  ]
  assert deeper[-1] == 'head'


def test_order_is_that_of_use_and_not_of_names():
  def run(params, batch):
    x = jnp.tanh(batch['x'] @ jax.jit(lambda w: 2 * w.T)(params['z']))
    return jax.checkpoint(lambda x, w: x @ w)(x, params['a']).sum()

  params = {'a': jnp.ones((2, 3)), 'z': jnp.ones((2, 4)), 'b': jnp.ones(())}
  batch = {'x': jnp.ones((5, 4))}
  assert blocks.input_order(run, params, batch) == ['z', 'a', 'b']
  assert blocks.find(run, params, batch) == {'z': 'z', 'a': 'a', 'b': 'b'}


def test_a_block_depth_below_one_is_refused():
  with pytest.raises(UsageError, match='depth=0'):
    blocks.find(lambda p, b: b['x'], PARAMS, BATCH, depth=0)


def norm(leaves):
  return np.sqrt(sum(float((x**2).sum()) for x in jax.tree.leaves(leaves)))


def test_relative_gradient_is_gradient_norm_over_weight_norm():
  halves = [
    jax.tree.map(lambda x, s=s: x[s], BATCH) for s in (np.s_[:4], np.s_[4:])
  ]
  ratios = surgical.relative_gradients(LOSS, PARAMS, halves, PATTERNS)
  gradient = jax.jit(jax.grad(lambda p, b: LOSS(p, {}, b, None)[0]))
  grads = [gradient(PARAMS, half) for half in halves]
  for name in PATTERNS:
    norms = [norm(tree.get(g, name)) for g in grads]
    expected = np.mean(norms) / norm(tree.get(PARAMS, name))
    np.testing.assert_allclose(ratios[name], expected, rtol=1e-5)


def linear(params, model_state, batch, rng):
  """Loss of an example: a . w, so its gradient is a."""
  assert rng is None
  losses = batch['x'] @ params['early']['w'] + batch['y'] @ params['late']['w']
  weight = batch.get('weight', jnp.ones(len(losses)))
  total = jnp.sum(losses * weight) / weight.sum()
  return total, Aux(model_state, {}, weight.sum(), losses)


def agreement(a):
  return np.mean(a.mean(0) ** 2 / a.var(0))


def test_signal_to_noise_is_mean_squared_over_variance():
  random = np.random.default_rng(0)
  x = random.normal(0.1, 1, (40, 3)).astype(np.float32)
  y = random.normal(1.0, 1, (40, 2)).astype(np.float32)
  params = {'early': {'w': jnp.ones(3)}, 'late': {'w': jnp.ones(2)}}
  padded = {
    'x': np.concatenate([x[20:], 9 + x[:5]]),
    'y': np.concatenate([y[20:], y[:5]]),
    'weight': np.repeat(np.float32([1, 0]), [20, 5]),
  }
  found = surgical.gradient_snr(
    linear,
    params,
    [{'x': x[:20], 'y': y[:20]}, padded],
    {'early': 'early/w', 'late': 'late/w'},
  )
  np.testing.assert_allclose(found['early'], agreement(x), rtol=1e-4)
  np.testing.assert_allclose(found['late'], agreement(y), rtol=1e-4)
  assert found['late'] > found['early']


def distant(params, model_state, batch, rng):
  """sum_b c_b |w_b - 1|^2 / 2, with gradient c_b (w_b - 1)."""
  del rng
  value = sum(
    c * jnp.sum((params[name]['w'] - batch['x'].mean()) ** 2) / 2
    for name, c in (('a', 1.0), ('b', 5.0), ('c', 2.0))
  )
  return value, Aux(model_state, {}, jnp.ones(()), None)


TOY = {name: {'w': jnp.full(4, 2.0)} for name in 'abc'}
ONES = [{'x': jnp.ones(3)}]


def test_auto_surgical_moves_the_block_with_the_largest_ratio():
  tuning = surgical.auto_surgical(distant, TOY, ONES)
  trainable, frozen = tuning.init(TOY, jax.random.key(0))
  assert tree.names(trainable) == ['b/w']
  assert tree.names(frozen) == ['a/w', 'c/w']
  two = surgical.auto_surgical(distant, TOY, ONES, count=2)
  assert tree.names(two.init(TOY, jax.random.key(0))[0]) == ['b/w', 'c/w']


def test_what_moves_in_any_case_is_no_candidate():
  tuning = surgical.auto_surgical(distant, TOY, ONES, also=('b/.*',))
  trainable, _ = tuning.init(TOY, jax.random.key(0))
  assert tree.names(trainable) == ['b/w', 'c/w']


def test_auto_rates_are_ratios_over_the_largest():
  rates = dict(surgical.auto_rates(distant, TOY, ONES))
  # c |w - 1| / |w| with w = 2 everywhere: 0.5, 2.5 and 1.
  expected = {'a/.*': 0.2, 'b/.*': 1.0, 'c/.*': 0.4}
  assert list(rates) == list(expected)
  np.testing.assert_allclose(list(rates.values()), list(expected.values()))
  with_head = surgical.auto_rates(distant, TOY, ONES, also=('b/.*',))
  assert with_head[0] == ('b/.*', 1.0)
  assert dict(with_head)['c/.*'] == 1.0


def test_a_zero_block_comes_first():
  zero = {**TOY, 'a': {'w': jnp.zeros(4)}}
  found = blocks.find(lambda p, b: distant(p, {}, b, None)[0], zero, ONES[0])
  scores = surgical.relative_gradients(distant, zero, ONES, found)
  assert scores['a'] == float('inf')
  assert surgical.best_blocks(scores, 2) == ['a', 'b']
  rates = dict(surgical.auto_rates(distant, zero, ONES))
  assert rates['a/.*'] == rates['b/.*'] == 1.0
  np.testing.assert_allclose(rates['c/.*'], 0.4)


def test_auto_surgical_says_what_is_wrong():
  with pytest.raises(UsageError, match='no batches'):
    surgical.auto_surgical(distant, TOY, [])
  with pytest.raises(UsageError, match='count=4 blocks of 3'):
    surgical.auto_surgical(distant, TOY, ONES, count=4)
  with pytest.raises(UsageError, match="no parameter matches 'hed/.*'"):
    surgical.auto_surgical(distant, TOY, ONES, also=('hed/.*',))
  with pytest.raises(UsageError, match="no parameter matches 'd/.*'"):
    surgical.auto_surgical(distant, TOY, ONES, blocks={'d': 'd/.*'})
  there = {name: {'w': jnp.ones(4)} for name in 'abc'}
  with pytest.raises(UsageError, match='zero gradient'):
    surgical.auto_rates(distant, there, ONES)
