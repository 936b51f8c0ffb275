"""A tiny BERT, its rows one at a time, and numpy's cosines."""

import jax
import jax.numpy as jnp
import numpy as np

from fmeta import models, tree
from fmeta.adapters import siblings

CONFIG = models.BertConfig(
  vocab_size=11,
  hidden_size=8,
  num_layers=2,
  num_heads=2,
  intermediate_size=12,
  max_positions=12,
  dropout=0.0,
  attention_dropout=0.0,
)
MODULE = models.BertClassifier(CONFIG, num_classes=3)
FORWARD = models.forward(MODULE)
QUERY = models.forward(MODULE, method='embed')
ASKING = FORWARD, QUERY
RUN = jax.jit(FORWARD)
KEY = jax.random.key(7)
BATCH = {
  'input_ids': np.array(
    [[1, 5, 3, 7], [2, 4, 0, 0], [9, 10, 8, 0], [6, 0, 0, 0]], np.int32
  ),
  'attention_mask': np.array(
    [[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 0, 0]], np.int32
  ),
  'label': np.array([0, 2, 1, 2], np.int32),
}
ROWS = len(BATCH['label'])
FIRST = 'body/layer_0/attention/(key|value)/kernel'
SECOND = 'body/layer_1/attention/(key|value)/kernel'
BOTH = 'body/layer_[01]/attention/(key|value)/kernel'


def random_params():
  ids = jax.ShapeDtypeStruct((1, 2), 'int32')
  shapes = jax.eval_shape(MODULE.init, KEY, ids, ids)['params']
  random = np.random.default_rng(1)

  def one(name, x):
    # Scales and biases that no fresh model has; words that are unlike.
    size = 0.1 if name.endswith('bias') else 2.0 if 'word' in name else 0.6
    return jnp.asarray(random.normal(0, size, x.shape), jnp.float32)

  return tree.map_with_name(one, shapes)


PARAMS = random_params()
ASKED = np.asarray(jax.jit(QUERY)(PARAMS, {}, BATCH, None)[0], np.float64)


def grown(what):
  """The parameters with what a tuning adds, and only that."""
  trainable, _ = what.init(PARAMS, KEY)
  return what.merge(*what.init(PARAMS, KEY)), trainable


def near_queries(rows):
  """Keys [M, D] that are nearest to those rows' queries, of all lengths."""
  lengths = 0.5 + np.arange(len(rows))[::-1, None]
  random = np.random.default_rng(3)
  keys = lengths * (ASKED[rows] + 0.1 * random.normal(size=(len(rows), 8)))
  return jnp.asarray(keys, jnp.float32)


def alone(leaves, run=RUN):
  """The model on each row by itself, with leaves of its own [B, P, H]."""
  out = []
  for k in range(ROWS):
    mine = {name: jnp.asarray(leaf[k]) for name, leaf in leaves.items()}
    params = siblings.grow(PARAMS, mine)
    row = {key: x[k : k + 1] for key, x in BATCH.items()}
    out.append(np.asarray(run(params, {}, row, None)[0][0]))
  return np.stack(out)


def cosine(query, keys):
  """[B, D] and [M, D] -> [B, M] in float64."""
  keys = np.asarray(keys, np.float64)
  lengths = np.linalg.norm(query, axis=1)[:, None] * np.linalg.norm(
    keys, axis=1
  )
  return query @ keys.T / lengths


def slope_of_cosine(query, key):
  """d cos(q, k) / dk = (q / |q| - cos k / |k|) / |k|."""
  q, k = query / np.linalg.norm(query), key / np.linalg.norm(key)
  return (q - (q @ k) * k) / np.linalg.norm(key)


def cross_entropy(logits, label):
  logits = np.asarray(logits, np.float64)
  total = np.log(np.exp(logits).sum(-1))
  return total - logits[np.arange(len(label)), label]


def shuffled(batch, order):
  return {key: np.asarray(x)[order] for key, x in batch.items()}
