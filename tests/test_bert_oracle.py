"""BERT against transformers on torch."""

import copy

import jax
import numpy as np
import pytest

from fmeta import models, pretrained, tree
from fmeta.models import BertClassifier, BertConfig
from fmeta.pretrained import load_bert, save_bert
from fmeta.pretrained.bert import their_name

pytestmark = pytest.mark.oracle

TINY = BertConfig(
  vocab_size=60,
  hidden_size=24,
  num_layers=2,
  num_heads=4,
  intermediate_size=40,
  max_positions=16,
  dropout=0.0,
  attention_dropout=0.0,
)


def text_batch(vocab, lengths, seed=0):
  rng = np.random.default_rng(seed)
  shape = (len(lengths), max(lengths))
  mask = (np.arange(shape[1]) < np.array(lengths)[:, None]).astype(np.int32)
  ids = rng.integers(1, vocab, shape).astype(np.int32) * mask
  return {'input_ids': ids, 'attention_mask': mask}


def peer(folder):
  import torch
  import transformers

  torch.set_num_threads(2)
  transformers.utils.logging.disable_progress_bar()
  return transformers.BertModel.from_pretrained(
    folder, attn_implementation='eager', add_pooling_layer=False
  ).eval()


def to_torch(batch):
  import torch

  return {key: torch.tensor(value).long() for key, value in batch.items()}


@pytest.fixture(scope='module')
def minilm():
  module, params, folder = load_bert(pretrained.MINILM, 2, jax.random.key(0))
  return module, params, peer(folder)


@pytest.mark.usefixtures('optimised')
def test_minilm_hidden_states_equal_transformers(minilm):
  import torch

  module, params, theirs = minilm
  batch = text_batch(30522, [32, 1, 7, 20])
  run = jax.jit(models.forward(module, method='hidden_states'))
  states, _ = run(params, {}, batch, None)
  with torch.no_grad():
    expected = theirs(**to_torch(batch), output_hidden_states=True)
  assert len(states) == len(expected.hidden_states) == 7
  seen = batch['attention_mask'] == 1
  for ours, reference in zip(states, expected.hidden_states, strict=True):
    np.testing.assert_allclose(
      np.asarray(ours)[seen], reference.numpy()[seen], rtol=0, atol=1e-5
    )


def test_minilm_hidden_states_equal_transformers_in_float64(minilm, x64):
  import torch

  module, params, theirs = minilm
  batch = text_batch(30522, [12, 1, 7])
  params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
  states, _ = models.forward(module, method='hidden_states')(
    params, {}, batch, None
  )
  with torch.no_grad():
    expected = copy.deepcopy(theirs).double()(
      **to_torch(batch), output_hidden_states=True
    )
  seen = batch['attention_mask'] == 1
  for ours, reference in zip(states, expected.hidden_states, strict=True):
    np.testing.assert_allclose(
      np.asarray(ours)[seen], reference.numpy()[seen], rtol=0, atol=1e-10
    )


def test_minilm_embeddings_equal_transformers(minilm):
  import torch

  module, params, theirs = minilm
  batch = text_batch(30522, [9, 24, 2], seed=1)
  run = jax.jit(models.forward(module, method='embed'))
  ours, _ = run(params, {}, batch, None)
  with torch.no_grad():
    hidden = theirs(**to_torch(batch)).last_hidden_state.numpy()
  mask = batch['attention_mask'][:, :, None]
  expected = (hidden * mask).sum(1) / mask.sum(1)
  np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5)


def test_gradients_equal_torch_through_a_saved_model(tmp_path):
  batch = text_batch(60, [12, 3, 7])
  module = BertClassifier(TINY)
  params, _ = models.init(module, jax.random.key(1), batch)
  save_bert(tmp_path, params, TINY)
  theirs = peer(tmp_path)

  def loss(params):
    out, _ = models.forward(module)(params, {}, batch, None)
    return (out**3).sum()

  value, grads = jax.jit(jax.value_and_grad(loss))(params)
  inputs = to_torch(batch)
  hidden = theirs(**inputs).last_hidden_state
  mask = inputs['attention_mask'][:, :, None]
  reference = (((hidden * mask).sum(1) / mask.sum(1)) ** 3).sum()
  reference.backward()
  np.testing.assert_allclose(value, reference.item(), rtol=1e-5)
  expected = {name: p.grad for name, p in theirs.named_parameters()}
  assert len(expected) == len(tree.names(params))
  for name, ours in zip(
    tree.names(params), jax.tree.leaves(grads), strict=True
  ):
    ours = np.asarray(ours.T if name.endswith('/kernel') else ours)
    # torch sets no gradient at its padding row 0; that row is never seen here.
    np.testing.assert_allclose(
      ours, expected[their_name(name)].numpy(), rtol=1e-4, atol=1e-5
    )
