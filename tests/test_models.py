"""Models: names, invariances, and closed forms."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmeta import models, tree
from fmeta.errors import UsageError
from fmeta.models import BertClassifier, BertConfig, Mlp
from fmeta.models.bert_layers import gelu
from fmeta.models.dropout import drop, keep, kept_fraction

TINY = BertConfig(
  vocab_size=50,
  hidden_size=16,
  num_layers=2,
  num_heads=4,
  intermediate_size=32,
  max_positions=12,
)


@functools.cache
def compiled(module, inputs=models.TEXT, **options):
  """Compiling once is cheaper than dispatching a model op by op."""
  return jax.jit(models.forward(module, inputs, **options))


def text_batch(rows=3, length=8):
  rng = np.random.default_rng(0)
  mask = np.ones((rows, length), np.int32)
  mask[1, 5:] = 0
  mask[2, 1:] = 0
  ids = rng.integers(1, 50, (rows, length)).astype(np.int32)
  return {'input_ids': ids * mask, 'attention_mask': mask}


def random_params(module):
  """By numpy: compiling jax's generators for every shape takes seconds."""
  shapes = jax.eval_shape(module.init, jax.random.key(0), **text_batch())
  assert set(shapes) == {'params'}
  rng = np.random.default_rng(0)
  return jax.tree.map(
    lambda leaf: jnp.array(rng.normal(0.0, 0.1, leaf.shape), leaf.dtype),
    shapes['params'],
  )


@pytest.fixture(scope='module')
def bert():
  module = BertClassifier(TINY, 5)
  return module, random_params(module)


# --- BERT -----------------------------------------------------------------


def test_bert_names_are_the_agreed_ones(bert):
  _, params = bert
  found = set(tree.names(params))
  layer = {
    f'body/layer_{k}/{part}/{leaf}'
    for k in range(2)
    for part, leaves in {
      'attention/query': ('kernel', 'bias'),
      'attention/key': ('kernel', 'bias'),
      'attention/value': ('kernel', 'bias'),
      'attention/output': ('kernel', 'bias'),
      'attention/norm': ('scale', 'bias'),
      'mlp/up': ('kernel', 'bias'),
      'mlp/down': ('kernel', 'bias'),
      'mlp/norm': ('scale', 'bias'),
    }.items()
    for leaf in leaves
  }
  top = {
    'body/embeddings/word/embedding',
    'body/embeddings/position/embedding',
    'body/embeddings/type/embedding',
    'body/embeddings/norm/scale',
    'body/embeddings/norm/bias',
    'head/kernel',
    'head/bias',
  }
  assert found == layer | top


def test_bert_kernels_are_two_dimensional_in_by_out(bert):
  _, params = bert
  assert tree.get(params, 'body/layer_0/mlp/up/kernel').shape == (16, 32)
  assert tree.get(params, 'body/layer_0/mlp/down/kernel').shape == (32, 16)
  assert tree.get(params, 'head/kernel').shape == (16, 5)


@pytest.mark.parametrize('pooling', ['mean', 'cls'])
def test_more_padding_does_not_change_outputs(bert, pooling):
  _, params = bert
  run = compiled(BertClassifier(TINY, 5, pooling))
  short = text_batch()
  pad = ((0, 0), (0, 4))
  long = {key: np.pad(value, pad) for key, value in short.items()}
  long['input_ids'][:, 8:] = 7
  a, _ = run(params, {}, short, None)
  b, _ = run(params, {}, long, None)
  np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)


def test_seen_tokens_do_change_outputs(bert):
  module, params = bert
  batch = text_batch()
  other = {**batch, 'input_ids': batch['input_ids'] + batch['attention_mask']}
  run = compiled(module)
  a, _ = run(params, {}, batch, None)
  b, _ = run(params, {}, other, None)
  assert np.abs(a - b).max() > 1e-3


def test_a_row_without_tokens_is_finite_with_finite_gradients(bert):
  module, params = bert
  batch = text_batch()
  batch['attention_mask'][0] = 0

  def total(params):
    return compiled(module)(params, {}, batch, None)[0].sum()

  value, grads = jax.value_and_grad(total)(params)
  assert np.isfinite(value)
  assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


def test_evaluation_is_deterministic_and_training_drops(bert):
  module, params = bert
  run = compiled(module)
  batch = text_batch()
  plain = [run(params, {}, batch, None)[0] for _ in range(2)]
  np.testing.assert_array_equal(*plain)
  first, again, other = (
    run(params, {}, batch, jax.random.key(k))[0] for k in (1, 1, 2)
  )
  np.testing.assert_array_equal(first, again)
  assert not np.allclose(first, other)
  assert not np.allclose(first, plain[0])


def test_without_rates_training_equals_evaluation(bert):
  _, params = bert
  still = BertConfig(
    **{**TINY.__dict__, 'dropout': 0.0, 'attention_dropout': 0.0}
  )
  run = compiled(BertClassifier(still, 5))
  batch = text_batch()
  a, _ = run(params, {}, batch, None)
  b, _ = run(params, {}, batch, jax.random.key(0))
  np.testing.assert_allclose(a, b, atol=1e-6)


@pytest.mark.parametrize('rates', [(0.5, 0.0), (0.0, 0.5)])
def test_each_dropout_rate_acts_alone(bert, rates):
  _, params = bert
  config = BertConfig(
    **{**TINY.__dict__, 'dropout': rates[0], 'attention_dropout': rates[1]}
  )
  run = compiled(BertClassifier(config, 5))
  a, _ = run(params, {}, text_batch(), None)
  b, _ = run(params, {}, text_batch(), jax.random.key(0))
  assert np.abs(a - b).max() > 1e-4


@pytest.mark.parametrize('layer', [0, 1])
def test_resuming_from_a_prefix_is_the_whole(bert, layer):
  module, params = bert
  batch = text_batch()
  whole, _ = compiled(module)(params, {}, batch, None)
  prefix = compiled(module, method='prefix', first_layer=layer)
  hidden, _ = prefix(params, {}, batch, None)
  resume = compiled(
    module, ('hidden', 'attention_mask'), method='resume', first_layer=layer
  )
  rest, _ = resume(params, {}, {**batch, 'hidden': hidden}, None)
  # Two programs, fused differently.
  np.testing.assert_allclose(whole, rest, atol=1e-6)


def test_the_frozen_prefix_needs_no_parameters_to_resume(bert):
  module, params = bert
  batch = text_batch()
  hidden, _ = compiled(module, method='prefix', first_layer=1)(
    params, {}, batch, None
  )
  _, suffix = tree.partition(
    params, lambda name: 'embeddings' in name or 'layer_0' in name
  )
  resume = compiled(
    module, ('hidden', 'attention_mask'), method='resume', first_layer=1
  )
  a, _ = resume(suffix, {}, {**batch, 'hidden': hidden}, None)
  b, _ = compiled(module)(params, {}, batch, None)
  np.testing.assert_allclose(a, b, atol=1e-6)


def test_embedding_is_the_mean_of_the_last_hidden_state(bert):
  module, params = bert
  batch = text_batch()
  states, _ = compiled(module, method='hidden_states')(params, {}, batch, None)
  assert len(states) == 3
  embedded, _ = compiled(module, method='embed')(params, {}, batch, None)
  last, mask = np.asarray(states[-1]), batch['attention_mask']
  by_hand = [row[seen == 1].mean(0) for row, seen in zip(last, mask, strict=1)]
  np.testing.assert_allclose(embedded, by_hand, atol=1e-6)
  headless = BertClassifier(TINY)
  same, _ = compiled(headless)({'body': params['body']}, {}, batch, None)
  np.testing.assert_allclose(embedded, same, atol=1e-6)


def test_token_types_default_to_the_first(bert):
  module, params = bert
  batch = text_batch()
  inputs = (*models.TEXT, 'token_type_ids')
  run = compiled(module, inputs)
  zeros = np.zeros_like(batch['input_ids'])
  a, _ = compiled(module)(params, {}, batch, None)
  b, _ = run(params, {}, {**batch, 'token_type_ids': zeros}, None)
  c, _ = run(params, {}, {**batch, 'token_type_ids': zeros + 1}, None)
  np.testing.assert_allclose(a, b, atol=1e-6)
  assert not np.allclose(a, c)


def test_gelu_is_x_times_the_normal_distribution_function():
  x = jnp.linspace(-6, 6, 101)
  expected = x * jax.scipy.stats.norm.cdf(x)
  np.testing.assert_allclose(gelu(x), expected, atol=1e-6)


def test_bert_computes_in_the_parameters_precision(bert, x64):
  module, params = bert
  wide = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), params)
  narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
  run = compiled(module)
  reference, _ = run(wide, {}, text_batch(), None)
  single, _ = run(params, {}, text_batch(), None)
  half, _ = run(narrow, {}, text_batch(), None)
  assert (reference.dtype, half.dtype) == (jnp.float64, jnp.bfloat16)
  np.testing.assert_allclose(single, reference, atol=1e-6)
  # bfloat16 keeps 8 bits.
  np.testing.assert_allclose(np.float32(half), reference, atol=0.05)


def test_bert_directional_derivative_in_float64(bert, x64):
  module, params = bert
  params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), params)
  rng = np.random.default_rng(3)
  step = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape), params)

  @jax.jit
  def loss(size):
    moved = jax.tree.map(lambda a, b: a + size * b, params, step)
    out, _ = compiled(module)(moved, {}, text_batch(), None)
    return jnp.square(out).sum()

  h = 1e-6
  central = (loss(h) - loss(-h)) / (2 * h)
  np.testing.assert_allclose(jax.grad(loss)(0.0), central, rtol=1e-6)


def test_too_long_rows_and_bad_settings_are_refused(bert):
  module, params = bert
  with pytest.raises(UsageError, match='13 tokens .* positions for 12'):
    compiled(module)(params, {}, text_batch(length=13), None)
  with pytest.raises(UsageError, match="pooling='max'"):
    BertClassifier(TINY, 5, 'max')
  with pytest.raises(UsageError, match='num_heads=5'):
    BertConfig(hidden_size=16, num_heads=5)
  with pytest.raises(UsageError, match='layer 3 .* choose 0 to 2'):
    compiled(module, method='prefix', first_layer=3)(
      params, {}, text_batch(), None
    )


def test_a_batch_without_an_input_is_named(bert):
  module, params = bert
  with pytest.raises(UsageError, match="no 'input_ids'; it has \\['image'\\]"):
    compiled(module)(params, {}, {'image': 0}, None)


# --- dropout --------------------------------------------------------------


@pytest.mark.parametrize('shape', [(4, 500), (3, 4, 333)])
def test_a_mask_keeps_the_asked_fraction_and_the_mean(shape):
  mask = keep(jax.random.key(0), 0.3, shape)
  assert mask.shape == shape
  # Three standard errors of a proportion.
  tolerance = 3 * (0.3 * 0.7 / mask.size) ** 0.5
  assert abs(mask.mean() - 0.7) < tolerance
  out = drop(jnp.ones(shape), mask, 0.3)
  np.testing.assert_allclose(out[mask], 1 / kept_fraction(0.3), rtol=1e-6)
  assert (out[~mask] == 0).all()


def test_the_two_halves_of_a_word_are_independent():
  mask = np.float64(keep(jax.random.key(1), 0.5, (20000, 2)))
  correlation = np.corrcoef(mask.T)[0, 1]
  assert abs(correlation) < 3 / 20000**0.5


@pytest.mark.parametrize('rate', [0.0, 0.1, 0.5, 1.0])
def test_the_kept_fraction_is_the_rate_to_sixteen_bits(rate):
  assert abs(kept_fraction(rate) - (1 - rate)) <= 2**-17


# --- MLP ------------------------------------------------------------------


def test_mlp_is_its_formula():
  module = Mlp((7, 5), 3)
  x = np.random.default_rng(0).normal(size=(4, 2, 3)).astype(np.float32)
  params, state = models.init(module, jax.random.key(0), {'x': x}, ('x',))
  assert type(params) is dict and type(params['body']) is dict
  assert state == {}
  run = compiled(module, ('x',))
  out, _ = run(params, {}, {'x': x}, None)
  params = jax.tree.map(np.asarray, params)
  hidden = x.reshape(4, 6)
  for k in range(2):
    layer = params['body'][f'layer_{k}']
    hidden = np.maximum(hidden @ layer['kernel'] + layer['bias'], 0)
  expected = hidden @ params['head']['kernel'] + params['head']['bias']
  np.testing.assert_allclose(out, expected, atol=1e-6)


def test_mlp_drops_only_in_training():
  module = Mlp((64,), 3, dropout=0.5)
  batch = {'x': np.ones((2, 4), np.float32)}
  params, _ = models.init(module, jax.random.key(0), batch, ('x',))
  run = compiled(module, ('x',))
  a, b = (run(params, {}, batch, None)[0] for _ in range(2))
  c = run(params, {}, batch, jax.random.key(0))[0]
  np.testing.assert_array_equal(a, b)
  assert not np.allclose(a, c)
