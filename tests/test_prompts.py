"""Prefix and prompt tuning of our BERT against plain models and numpy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from fmeta import adapters, models, tree
from fmeta.adapters import siblings
from fmeta.errors import UsageError

CONFIG = models.BertConfig(
  vocab_size=11,
  hidden_size=8,
  num_layers=2,
  num_heads=2,
  intermediate_size=12,
  max_positions=9,
  dropout=0.0,
  attention_dropout=0.0,
)
MODULE = models.BertClassifier(CONFIG, num_classes=3)
FORWARD = jax.jit(models.forward(MODULE))
STATES = jax.jit(models.forward(MODULE, method='hidden_states'))
KEY = jax.random.key(7)
BATCH = {
  'input_ids': np.array([[1, 5, 3, 7], [2, 4, 0, 0]], np.int32),
  'attention_mask': np.array([[1, 1, 1, 1], [1, 1, 0, 0]], np.int32),
  'label': np.array([0, 2], np.int32),
}
LENGTH = 3
ATTENTION = r'body/layer_\d/attention/(key|value)/kernel'
PREFIX = adapters.prefix(ATTENTION, length=LENGTH, also=('head/.*',))
PROMPT = adapters.prompt(length=LENGTH, also=('head/.*',))


def random_params():
  ids = jax.ShapeDtypeStruct((1, 2), 'int32')
  shapes = jax.eval_shape(MODULE.init, KEY, ids, ids)['params']
  random = np.random.default_rng(1)
  # Scales and biases that no fresh model has.
  return jax.tree.map(
    lambda x: jnp.asarray(random.normal(0.2, 0.5, x.shape), jnp.float32), shapes
  )


PARAMS = random_params()


def grown(what):
  return what.merge(*what.init(PARAMS, KEY))


def padded(batch, length):
  """The batch with `length` ones of the mask before every row."""
  before = ((0, 0), (length, 0))
  return np.pad(batch['attention_mask'], before, constant_values=1)


def with_words_for_prompt(params):
  """A plain model whose table has the prompt as words 11, 12, 13."""
  words = params['body']['embeddings']['word']
  table = jnp.concatenate([words['embedding'], words['embedding.prompt']])
  return siblings.grow(
    siblings.without(params, ('.prompt',)),
    {'body/embeddings/word/embedding': table},
  )


def test_a_prompt_is_words_of_its_own_before_the_row():
  params = grown(PROMPT)
  prompt = params['body']['embeddings']['word']['embedding.prompt']
  assert prompt.shape == (LENGTH, 8)
  words = np.asarray(PARAMS['body']['embeddings']['word']['embedding'])
  assert all(
    np.any(np.all(row == words, axis=-1)) for row in np.asarray(prompt)
  )
  ids = np.broadcast_to(np.arange(11, 14), (2, LENGTH))
  plain = {
    'input_ids': np.concatenate([ids, BATCH['input_ids']], axis=1),
    'attention_mask': padded(BATCH, LENGTH),
  }
  module = models.BertClassifier(dataclasses.replace(CONFIG, vocab_size=14))
  forward = models.forward(module, method='hidden_states')
  expected, _ = jax.jit(forward)(with_words_for_prompt(params), {}, plain, None)
  states, _ = STATES(params, {}, BATCH, None)
  for ours, theirs in zip(states, expected, strict=True):
    assert ours.shape == (2, LENGTH + 4, 8)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('pooling', ['mean', 'cls'])
def test_a_prompt_is_not_pooled(pooling):
  params = grown(PROMPT)
  last = np.asarray(STATES(params, {}, BATCH, None)[0][-1])[:, LENGTH:]
  if pooling == 'mean':
    pooled = np.stack([last[0].mean(0), last[1, :2].mean(0)])
  else:
    pooled = last[:, 0]
  module = models.BertClassifier(CONFIG, 3, pooling)
  embed = jax.jit(models.forward(module, method='embed'))
  embedded, _ = embed(params, {}, BATCH, None)
  np.testing.assert_allclose(embedded, pooled, rtol=1e-5, atol=1e-6)


def test_a_prompt_is_of_the_first_segment():
  forward = models.forward(
    MODULE, (*models.TEXT, 'segments'), method='hidden_states', last_layer=0
  )
  params = grown(PROMPT)

  @jax.jit
  def embedded(kind):
    batch = {**BATCH, 'segments': jnp.full((2, 4), kind)}
    return forward(params, {}, batch, None)[0][0]

  first, second = embedded(0), embedded(1)
  np.testing.assert_array_equal(first[:, :LENGTH], second[:, :LENGTH])
  assert np.abs(first[:, LENGTH:] - second[:, LENGTH:]).min() > 0


@pytest.mark.parametrize('what', [PREFIX, PROMPT], ids=['prefix', 'prompt'])
def test_padding_stays_unseen(what):
  params = grown(what)
  other = {**BATCH, 'input_ids': BATCH['input_ids'] + [[0] * 4, [0, 0, 6, 8]]}
  np.testing.assert_allclose(
    FORWARD(params, {}, BATCH, None)[0],
    FORWARD(params, {}, other, None)[0],
    rtol=1e-6,
  )


@pytest.mark.parametrize('make', [adapters.prefix, adapters.prompt])
def test_length_zero_is_the_base_model(make):
  pattern = ATTENTION if make is adapters.prefix else '.*word/embedding'
  params = grown(make(pattern, length=0))
  assert len(tree.names(params)) > len(tree.names(PARAMS))
  np.testing.assert_array_equal(
    FORWARD(params, {}, BATCH, None)[0], FORWARD(PARAMS, {}, BATCH, None)[0]
  )


def numpy_bert(params, batch, length):
  """Embeddings and layers with a prefix, one row and head at a time."""
  body = jax.tree.map(lambda x: np.asarray(x, np.float64), params['body'])

  def dense(layer, x):
    return x @ layer['kernel'] + layer['bias']

  def norm(layer, x):
    x = (x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True)
    return x * layer['scale'] + layer['bias']

  def attend(layer, x, seen):
    heads = []
    key = np.concatenate(
      [layer['key']['kernel.prefix'], dense(layer['key'], x)]
    )
    value = np.concatenate(
      [layer['value']['kernel.prefix'], dense(layer['value'], x)]
    )
    for h in (slice(0, 4), slice(4, 8)):
      scores = dense(layer['query'], x)[:, h] @ key[:, h].T / 2.0
      scores[:, length:][:, seen == 0] = -np.inf
      heads.append(scipy.special.softmax(scores, axis=-1) @ value[:, h])
    return norm(
      layer['norm'], x + dense(layer['output'], np.concatenate(heads, -1))
    )

  def mlp(layer, x):
    inner = dense(layer['up'], x)
    inner = inner * scipy.special.ndtr(inner)
    return norm(layer['norm'], x + dense(layer['down'], inner))

  def run(ids, seen):
    part = body['embeddings']
    positions = part['position']['embedding'][length : length + len(ids)]
    x = (
      part['word']['embedding'][ids] + positions + part['type']['embedding'][0]
    )
    x = norm(part['norm'], x)
    for k in range(2):
      layer = body[f'layer_{k}']
      x = mlp(layer['mlp'], attend(layer['attention'], x, seen))
    return x

  pairs = zip(batch['input_ids'], batch['attention_mask'], strict=True)
  return np.stack([run(*pair) for pair in pairs])


def test_a_prefix_equals_numpy():
  params = grown(PREFIX)
  key = params['body']['layer_1']['attention']['key']
  assert key['kernel.prefix'].shape == (LENGTH, 8)
  states, _ = STATES(params, {}, BATCH, None)
  np.testing.assert_allclose(
    states[-1], numpy_bert(params, BATCH, LENGTH), rtol=1e-4, atol=1e-5
  )


def test_a_fresh_prefix_is_made_of_projected_vectors():
  params = grown(PREFIX)
  attention = params['body']['layer_0']['attention']

  def vectors(part):
    layer = attention[part]
    return np.linalg.solve(
      np.asarray(layer['kernel'], np.float64).T,
      np.asarray(layer['kernel.prefix'] - layer['bias'][None], np.float64).T,
    )

  # Keys and values come from the same vectors.
  np.testing.assert_allclose(
    # float32 leaves, solved for through their kernels
    vectors('key'),
    vectors('value'),
    rtol=1e-4,
    atol=1e-4,
  )


@pytest.mark.parametrize('what', [PREFIX, PROMPT], ids=['prefix', 'prompt'])
def test_a_cached_start_continues_to_the_same_logits(what):
  params = grown(what)
  start = jax.jit(models.forward(MODULE, method='prefix', first_layer=1))
  hidden, _ = start(params, {}, BATCH, None)
  rest = models.forward(
    MODULE, ('hidden', 'attention_mask'), method='resume', first_layer=1
  )
  np.testing.assert_allclose(
    jax.jit(rest)(params, {}, {**BATCH, 'hidden': hidden}, None)[0],
    FORWARD(params, {}, BATCH, None)[0],
    rtol=1e-5,
    atol=1e-6,
  )


@pytest.mark.parametrize('what', [PREFIX, PROMPT], ids=['prefix', 'prompt'])
def test_a_row_too_long_for_the_positions_is_refused(what):
  long = {
    'input_ids': np.ones((1, 7), np.int32),
    'attention_mask': np.ones((1, 7), np.int32),
  }
  with pytest.raises(UsageError, match='7 tokens.* after .* of 3.* for 9'):
    FORWARD(grown(what), {}, long, None)


def test_dropout_drops_attention_to_the_prefix_and_keeps_its_mean():
  from flax import linen as nn

  from fmeta.models.bert_layers import Attention, Masks

  module = Attention(models.BertConfig(hidden_size=4, num_heads=2))
  hidden, bias = jnp.zeros((1, 1, 4)), jnp.zeros((1, 1, 1, 1))
  masks = Masks(jnp.ones((1, 2, 1, 1), bool), None)
  params = jax.jit(module.init)(KEY, hidden, bias, Masks(None, None))['params']
  # Zero queries weigh all 4,000 pairs alike, and all their values are one.
  long = {part: {'kernel.prefix': jnp.ones((4000, 4))} for part in PARTS}
  seen = []

  def watch(next_fun, args, kwargs, context):
    if context.module.name == 'output':
      seen.append(args[0])
    return next_fun(*args, **kwargs)

  def run(params, *_):
    variables, rngs = {'params': params}, {'dropout': KEY}
    with nn.intercept_methods(watch):
      module.apply(variables, hidden, bias, masks, rngs=rngs)
    return seen.pop(), {}

  ones, _ = jax.jit(adapters.entering(run))(
    tree.combine(params, long), {}, {}, None
  )
  # Kept with probability .9 and divided by it: deviation .0053.
  assert 0 < np.abs(ones - 1).min() and np.abs(ones - 1).max() < 0.03


PARTS = ('key', 'value')


def test_bad_requests_are_refused():
  def start(what):
    return what.init(PARAMS, KEY)

  with pytest.raises(UsageError, match="kernels of 'key' and 'value'"):
    start(adapters.prefix('body/layer_0/attention/key/kernel'))
  with pytest.raises(UsageError, match=r'\[in, out\]'):
    start(adapters.prefix('body/layer_0/attention/(key|value)/bias'))
  with pytest.raises(UsageError, match='matches 3 leaves'):
    start(adapters.prompt('body/embeddings/.*/embedding'))
  for what in (adapters.prompt(length=-1), adapters.prefix('.*', length=-1)):
    with pytest.raises(UsageError, match='length -1'):
      start(what)
