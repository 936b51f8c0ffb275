"""A batch of packed texts is the padded batch with less padding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fmeta
from fmeta import data, models, optim, text, train
from fmeta.adapters import prefix, prompt
from fmeta.errors import UsageError
from fmeta.packing import first_fit, pack_collate

SIZES = {'vocab_size': 50, 'hidden_size': 16, 'num_layers': 2, 'num_heads': 2}
CONFIG = models.BertConfig(
  **SIZES, intermediate_size=32, max_positions=16, layer_norm_eps=1e-6
)
WIDTH = 12


@pytest.fixture(scope='module')
def columns():
  random = np.random.default_rng(0)
  length = random.integers(1, WIDTH + 1, 40).astype(np.int32)
  ids = random.integers(1, 50, (40, WIDTH)).astype(np.int32)
  ids[np.arange(WIDTH)[None] >= length[:, None]] = 0
  label = random.integers(0, 3, 40).astype(np.int32)
  return {'input_ids': ids, 'length': length, 'label': label}


def both(columns, size=8):
  """The first batch, padded and packed."""
  batch = data.take(columns, slice(size))
  padded = text.bucket_collate((WIDTH,))(batch)
  return padded, pack_collate(WIDTH)(batch)


def pair(columns, pooling='mean', config=CONFIG):
  """A model's padded and packed forward and its parameters."""
  module = models.BertClassifier(config, 3, pooling)
  params, _ = models.init(module, jax.random.key(0), both(columns)[0])
  packed = models.forward(module, models.PACKED_TEXT, method='packed')
  return models.forward(module), packed, params


def test_every_token_is_packed_once_in_the_order_of_its_text(columns):
  batch = data.take(columns, slice(8))
  packed = pack_collate(WIDTH)(batch)
  assert packed['input_ids'].shape[0] < 8
  for index, length in enumerate(batch['length']):
    own = packed['text_ids'] == index
    assert len(set(np.nonzero(own)[0])) == 1
    ids = packed['input_ids'][own]
    np.testing.assert_array_equal(ids, batch['input_ids'][index, :length])
    np.testing.assert_array_equal(
      packed['position_ids'][own], np.arange(length)
    )
  np.testing.assert_array_equal(packed['label'], batch['label'])
  free = packed['text_ids'] == -1
  assert (packed['input_ids'][free] == 0).all()
  assert (~free).sum() == batch['length'].sum()


def test_first_fit_puts_the_longest_first():
  assert first_fit([3, 7, 5, 4, 1], 8) == [[1, 4], [2, 0], [3]]
  assert first_fit([2, 2, 2], 2) == [[0], [1], [2]]


def test_rows_come_in_multiples(columns):
  batch = data.take(columns, slice(8))
  plain, threes = pack_collate(WIDTH)(batch), pack_collate(WIDTH, 3)(batch)
  rows = len(plain['input_ids'])
  assert len(threes['input_ids']) == -(-rows // 3) * 3 != rows
  assert (threes['text_ids'][rows:] == -1).all()


@pytest.mark.parametrize(('pooling', 'multiple'), [('mean', 1), ('cls', 3)])
def test_logits_and_gradients_are_those_of_padded_rows(
  columns, pooling, multiple
):
  padded, _ = both(columns)
  packed = pack_collate(WIDTH, multiple)(data.take(columns, slice(8)))
  one, other, params = pair(columns, pooling)
  with jax.enable_x64(True):
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)

    def loss(run, batch):
      def of(params):
        logits, _ = run(params, {}, batch, None)
        return fmeta.softmax_cross_entropy(logits, batch)[0].mean(), logits

      return jax.jit(jax.value_and_grad(of, has_aux=True))(params)

    (_, expected), gradient = loss(one, padded)
    (_, logits), packed_gradient = loss(other, packed)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-12)
    assert jnp.abs(logits - logits[:1]).max() > 1e-3
    for ours, theirs in zip(
      jax.tree.leaves(packed_gradient), jax.tree.leaves(gradient), strict=True
    ):
      np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-12)


def test_texts_of_one_row_do_not_see_each_other(columns):
  _, packed = both(columns)
  _, run, params = pair(columns)
  counts = np.bincount(np.nonzero(packed['text_ids'] >= 0)[0])
  row = int(np.argmax(counts))
  here = np.unique(packed['text_ids'][row])
  changed = int(here[here >= 0][0])
  others = np.arange(8) != changed
  ids = packed['input_ids'].copy()
  ids[packed['text_ids'] == changed] += 1
  before, _ = run(params, {}, packed, None)
  after, _ = run(params, {}, {**packed, 'input_ids': ids % 50}, None)
  np.testing.assert_allclose(after[others], before[others], rtol=0, atol=1e-6)
  assert jnp.abs(after[changed] - before[changed]).max() > 1e-3


def test_a_prefix_packs_and_a_prompt_does_not(columns):
  padded, packed = both(columns)
  one, other, params = pair(columns)
  key = jax.random.key(1)

  def logits(tuning, run, batch):
    merged = tuning.merge(*tuning.init(params, key))
    return run(merged, {}, batch, None)[0]

  kernels = prefix('body/layer_.*/attention/(key|value)/kernel', length=3)
  expected = logits(kernels, one, padded)
  got = logits(kernels, other, packed)
  np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5)
  with pytest.raises(UsageError, match='prompts on padded batches'):
    logits(prompt(length=2), other, packed)


def test_stochastic_depth_is_refused_in_training_only(columns):
  config = models.with_dropout(CONFIG, 0.0, stochastic_depth=0.5)
  one, other, params = pair(columns, config=config)
  padded, packed = both(columns)
  expected, _ = one(params, {}, padded, None)
  got, _ = other(params, {}, packed, None)
  np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5)
  with pytest.raises(UsageError, match='stochastic_depth=0'):
    other(params, {}, packed, jax.random.key(0))


def test_fit_counts_texts_and_compiles_once_per_number_of_rows(columns):
  _, run, params = pair(columns)
  learner = fmeta.finetune(
    fmeta.supervised(run, fmeta.softmax_cross_entropy), optim.sgd(0.1)
  )
  batches = data.batches(columns, 8, 0, collate=pack_collate(WIDTH, 2))
  shapes = {len(batches(i)['input_ids']) for i in range(10)}
  stages = [train.Stage('train', batches, 10)]
  fitted = train.fit(
    learner,
    learner.init(params, jax.random.key(0)),
    stages,
    jax.random.key(1),
  )
  assert fitted.steps == 10
  assert fitted.traces == len(shapes)


def test_what_cannot_be_packed_is_one_line(columns):
  batch = data.take(columns, slice(8))
  longest = int(batch['length'].max())
  with pytest.raises(UsageError, match=f'{longest} tokens and a row'):
    pack_collate(longest - 1)(batch)
  with pytest.raises(UsageError, match='multiple 0'):
    pack_collate(4, 0)
  empty = {**batch, 'length': np.zeros(8, np.int32)}
  with pytest.raises(UsageError, match='without tokens'):
    pack_collate(WIDTH)(empty)
