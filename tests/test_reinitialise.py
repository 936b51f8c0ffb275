"""Tunings of small leaves, and fresh top layers, by the models' names."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmeta import adapters, models, tree
from fmeta.errors import UsageError

KEY = jax.random.key(4)
BERT = models.BertConfig(
  vocab_size=40,
  hidden_size=32,
  num_layers=2,
  num_heads=2,
  intermediate_size=64,
  max_positions=8,
)
IDS = jax.ShapeDtypeStruct((1, 4), 'int32')
IMAGE = jax.ShapeDtypeStruct((1, 8, 8, 1), 'float32')
MODULES = {
  'bert': (models.BertClassifier(BERT, 3), (IDS, IDS)),
  'conv': (models.Conv4(3, filters=4), (IMAGE,)),
}


def params_of(name):
  module, inputs = MODULES[name]
  shapes = jax.eval_shape(module.init, KEY, *inputs)['params']
  return jax.tree.map(lambda x: jnp.full(x.shape, 7.0, x.dtype), shapes)


PARAMS = params_of('bert')


@pytest.mark.parametrize(('name', 'count'), [('bert', 18), ('conv', 9)])
def test_bitfit_trains_every_bias_and_nothing_else(name, count):
  trainable, frozen = adapters.bitfit().init(params_of(name), KEY)
  assert len(tree.names(trainable)) == count
  assert {n.split('/')[-1] for n in tree.names(trainable)} == {'bias'}
  assert 'bias' not in {n.split('/')[-1] for n in tree.names(frozen)}


@pytest.mark.parametrize(('name', 'count'), [('bert', 5), ('conv', 4)])
def test_norm_tuning_trains_every_norm_and_nothing_else(name, count):
  tuning = adapters.norm_tuning(also=('head/.*',))
  trainable, frozen = tuning.init(params_of(name), KEY)
  norms = [n for n in tree.names(trainable) if not n.startswith('head/')]
  assert len(norms) == 2 * count
  assert {n.split('/')[-2] for n in norms} == {'norm'}
  assert sorted(trainable['head']) == ['bias', 'kernel']
  assert not [n for n in tree.names(frozen) if n.endswith('scale')]


def test_the_top_layer_is_fresh_and_the_rest_untouched():
  patterns = ('body/layer_1/.*', 'head/.*')
  fresh = adapters.reinitialise(PARAMS, patterns, KEY)
  drawn = []
  for name in tree.names(PARAMS):
    leaf, kind = np.asarray(tree.get(fresh, name)), name.split('/')[-1]
    if not name.startswith(('body/layer_1/', 'head/')):
      np.testing.assert_array_equal(leaf, 7.0)
    elif kind == 'kernel':
      drawn.append(leaf.ravel())
    else:
      np.testing.assert_array_equal(leaf, {'bias': 0.0, 'scale': 1.0}[kind])
  values = np.concatenate(drawn) / 0.02
  assert 1.9 < np.abs(values).max() <= 2.0
  # A normal cut at two deviations has deviation .8796.
  assert abs(values.std() - 0.8796) < 4 * 0.88 / np.sqrt(2 * values.size)
  assert abs(values.mean()) < 4 * 0.88 / np.sqrt(values.size)


def test_a_fresh_leaf_depends_on_key_and_name_only():
  name = 'body/layer_1/mlp/up/kernel'
  both = adapters.reinitialise(PARAMS, ('body/layer_1/.*',), KEY)
  alone = adapters.reinitialise(PARAMS, (name,), KEY)
  np.testing.assert_array_equal(tree.get(both, name), tree.get(alone, name))
  other = adapters.reinitialise(PARAMS, (name,), jax.random.key(5))
  assert np.any(tree.get(alone, name) != tree.get(other, name))
  query, key = (
    tree.get(both, f'body/layer_1/attention/{part}/kernel')
    for part in ('query', 'key')
  )
  assert np.all(query != key)


def test_a_leaf_without_a_fresh_value_is_refused():
  with pytest.raises(UsageError, match="no fresh value for 'cls'"):
    adapters.reinitialise({'cls': jnp.ones(3)}, ('cls',), KEY)
  with pytest.raises(UsageError, match='no parameter matches'):
    adapters.reinitialise(PARAMS, ('body/layer_2/.*',), KEY)
