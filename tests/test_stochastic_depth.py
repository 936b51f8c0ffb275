"""Stochastic depth of BERT: its rates, its mean, and what it leaves alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmeta import models
from fmeta.errors import UsageError
from fmeta.models import bert_layers
from fmeta.models.dropout import kept_fraction, linear_decay, path_scales

KEY = jax.random.key(11)
SIZES = models.BertConfig(
  vocab_size=20,
  hidden_size=8,
  num_layers=2,
  num_heads=2,
  intermediate_size=8,
  max_positions=6,
)
QUIET = models.with_dropout(SIZES, 0.0)
DEEP = models.with_dropout(SIZES, 0.0, stochastic_depth=0.6)
BATCH = {
  'input_ids': np.arange(1, 13, dtype=np.int32).reshape(3, 4),
  'attention_mask': np.ones((3, 4), np.int32),
}


def run(config):
  module = models.BertClassifier(config, 3)
  return jax.jit(models.forward(module))


@pytest.fixture(scope='module')
def params():
  shapes = jax.eval_shape(models.BertClassifier(SIZES, 3).init, KEY, **BATCH)[
    'params'
  ]
  random = np.random.default_rng(0)
  return jax.tree.map(
    lambda x: random.normal(0, 0.5, x.shape).astype(np.float32), shapes
  )


def test_rates_rise_linearly_to_the_last_block():
  np.testing.assert_allclose(linear_decay(0.5, 4), [0.125, 0.25, 0.375, 0.5])


def test_factors_have_mean_one_and_the_rate_of_their_block():
  rates = [0.1, 0.5]
  scales = np.asarray(path_scales(KEY, rates, (2, 4000)))
  assert scales.shape == (2, 2, 4000)
  for scale, rate in zip(scales, rates, strict=True):
    kept = kept_fraction(rate)
    np.testing.assert_allclose(np.unique(scale), [0, 1 / kept], rtol=1e-6)
    error = (rate / kept / 8000) ** 0.5
    assert abs(scale.mean() - 1) < 4 * error
    # The two branches are dropped independently.
    assert abs(np.corrcoef(scale)[0, 1]) < 4 / 4000**0.5


def test_evaluation_is_the_very_program_of_the_model_without_it(params):
  plain, deep = (
    run(config).lower(params, {}, BATCH, None).as_text()
    for config in (QUIET, DEEP)
  )
  assert deep == plain
  train = run(DEEP).lower(params, {}, BATCH, KEY).as_text()
  assert train != plain


@pytest.mark.parametrize('config, draws', [(QUIET, 0), (DEEP, 1)])
def test_only_a_rate_above_zero_draws(config, draws):
  module = models.BertClassifier(config, 3)
  shapes = jax.eval_shape(module.init, KEY, **BATCH)['params']
  program = jax.make_jaxpr(models.forward(module))(shapes, {}, BATCH, KEY)
  assert str(program).count('random_bits[') == draws


def test_a_block_is_dropped_for_a_row_as_written_by_hand(params):
  layer = params['body']['layer_0']
  hidden = jax.random.normal(KEY, (3, 4, 8))
  paths = jnp.asarray([[0.0, 2.0, 0.0], [0.0, 0.0, 2.0]])
  bias = jnp.zeros((1, 1, 1, 4))
  module = bert_layers.Layer(QUIET)

  def of(paths):
    masks = bert_layers.Masks(None, None, paths)
    return module.apply({'params': layer}, hidden, bias, masks)

  def norm(x, scales):
    x = (x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True)
    return x * scales['scale'] + scales['bias']

  out = jax.jit(of)(paths)
  first, second = layer['attention']['norm'], layer['mlp']['norm']
  # Row 0 loses both branches: what is left are the two norms.
  expected = norm(norm(np.float64(hidden[0]), first), second)
  np.testing.assert_allclose(out[0], expected, rtol=1e-4, atol=1e-5)
  # Branches of factor 1 are the layer without stochastic depth.
  np.testing.assert_allclose(
    jax.jit(of)(jnp.ones((2, 3))), jax.jit(of)(None), rtol=1e-5, atol=1e-6
  )
  # Row 2 keeps the MLP alone, doubled.
  up = np.float64(layer['mlp']['up']['kernel'])
  inner = norm(np.float64(hidden[2]), first)
  wide = inner @ up + layer['mlp']['up']['bias']
  narrow = np.asarray(bert_layers.gelu(jnp.asarray(wide, jnp.float32)))
  narrow = narrow @ np.float64(layer['mlp']['down']['kernel'])
  narrow = narrow + layer['mlp']['down']['bias']
  expected = norm(inner + 2 * narrow, second)
  np.testing.assert_allclose(out[2], expected, rtol=1e-5, atol=1e-6)


def test_a_resumed_half_has_the_rates_of_its_own_layers(params):
  # Rates 0.3 and 0.6: of the last layer alone 0.6 is dropped.
  module = models.BertClassifier(DEEP, None)
  resume = models.forward(
    module, ('hidden', 'attention_mask'), method='resume', first_layer=1
  )
  rows = 2000
  batch = {
    'hidden': jnp.broadcast_to(jax.random.normal(KEY, (1, 1, 8)), (rows, 1, 8)),
    'attention_mask': jnp.ones((rows, 1), jnp.int32),
  }
  out, _ = jax.jit(resume)({'body': params['body']}, {}, batch, KEY)
  # All rows are equal: what differs is which branches were dropped.
  _, counts = np.unique(np.round(out, 3), axis=0, return_counts=True)
  shares = np.sort(counts) / rows
  expected = np.sort([0.36, 0.24, 0.24, 0.16])
  np.testing.assert_allclose(shares, expected, atol=0.05)


def test_rates_out_of_range_are_refused():
  for rate in (-0.1, 1.0):
    with pytest.raises(UsageError, match=r'give one in \[0, 1\)'):
      models.with_dropout(SIZES, rate)
  with pytest.raises(UsageError, match='stochastic_depth=1.0'):
    models.with_dropout(SIZES, 0.1, stochastic_depth=1.0)
