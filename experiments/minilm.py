"""The texts and the model of the docparams experiments.

A frozen prefix of the model is a constant function of the text, so its output
is computed once per example (`with_prefix`) and training starts from there.
Dropout inside the frozen layers is therefore off; by default it is off
everywhere (`load_model`).
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from fmeta import data, text
from fmeta.data import Columns
from fmeta.datasets import docparams
from fmeta.models import BertClassifier, forward
from fmeta.pretrained import MINILM, MINILM_SHA256, load_bert
from fmeta.types import Forward, Params

BUCKETS = (16, 32, 64)
EVAL_ROWS = 64
HIDDEN = ('hidden', 'attention_mask')


def load_model(
  source: str, num_classes: int, seed: int, dropout: float = 0.0
) -> tuple[BertClassifier, Params, Any]:
  """The module, its parameters with a fresh head, and the tokenizer.

  Dropout is off by default: it costs 30 % of a step on CPU and triples the
  compile time, and two epochs have little to regularise (untuned).
  """
  module, params, folder = load_bert(
    source,
    num_classes,
    jax.random.key(seed),
    sha256=MINILM_SHA256 if source == MINILM else None,
    dropout=dropout,
    attention_dropout=dropout,
  )
  return module, params, text.load_tokenizer(folder)


def load_texts(sizes: dict[str, int | None], subset: bool = True):
  """docparams by split, cut to `sizes` rows (None: all of them)."""
  splits = docparams.load(subset=subset)
  return {
    name: {key: value[: sizes.get(name)] for key, value in columns.items()}
    for name, columns in splits.items()
  }


def encode(tokenizer: Any, columns: Columns, max_length: int) -> dict:
  """The columns with `input_ids` and `length` beside the strings."""
  return {
    **columns,
    **text.encode(tokenizer, list(columns['text']), max_length),
  }


def collate(batch: Columns) -> dict[str, np.ndarray]:
  """Cuts ids, mask and cached states to the smallest bucket."""
  batch = text.bucket_collate(BUCKETS)(batch)
  if 'hidden' in batch:
    width = batch['attention_mask'].shape[1]
    batch['hidden'] = batch['hidden'][:, :width]
    del batch['input_ids']
  return batch


def train_batches(columns: Columns, batch_size: int, seed: int):
  """Shuffled batches of similar lengths."""
  source = text.bucketed_batches(columns, batch_size, seed, BUCKETS)
  return dataclasses.replace(source, collate=collate)


def eval_batches(columns: Columns, batch_size: int = EVAL_ROWS) -> list:
  """All rows in their order."""
  return data.eval_batches(columns, batch_size, collate=collate)


def with_prefix(
  module: BertClassifier, params: Params, columns: Columns, first_layer: int
) -> dict[str, np.ndarray]:
  """The columns with `hidden` [N, L, H], the state that enters a layer."""
  return with_prefixes(module, params, columns, (first_layer,))[first_layer]


def with_prefixes(
  module: BertClassifier,
  params: Params,
  columns: Columns,
  layers: Sequence[int],
) -> dict[int, dict[str, np.ndarray]]:
  """`with_prefix` of several layers in one pass."""
  run = forward(module, method='hidden_states', last_layer=max(layers))

  @jax.jit
  def states_of(params, batch):
    states = run(params, {}, batch, None)[0]
    return [states[layer] for layer in layers]

  # In order of length, so that short texts meet short ones.
  order = np.argsort(columns['length'], kind='stable')
  ordered = data.take(
    {key: columns[key] for key in ('input_ids', 'length')}, order
  )
  shape = (*columns['input_ids'].shape, module.config.hidden_size)
  hidden = [np.zeros(shape, np.float32) for _ in layers]
  for index, batch in enumerate(eval_batches(ordered)):
    rows = order[index * EVAL_ROWS : (index + 1) * EVAL_ROWS]
    for held, states in zip(hidden, states_of(params, batch), strict=True):
      states = np.asarray(states)[: len(rows)]
      held[rows, : states.shape[1]] = states
  return {
    layer: {**columns, 'hidden': held}
    for layer, held in zip(layers, hidden, strict=True)
  }


def from_layer(module: BertClassifier, first_layer: int) -> Forward:
  """The rest of the model, from cached states."""
  return forward(module, HIDDEN, method='resume', first_layer=first_layer)


def embeddings(columns: Columns) -> np.ndarray:
  """Mean-pooled embeddings [N, H], raw length, from last-layer `hidden`."""
  width = columns['hidden'].shape[1]
  seen = np.arange(width)[None] < columns['length'][:, None]
  total = np.einsum('nlh,nl->nh', columns['hidden'], seen.astype(np.float32))
  return total / seen.sum(1, keepdims=True)


def by_length(columns: Columns) -> dict[str, np.ndarray]:
  """The rows from short to long: evaluation then wastes little padding."""
  return data.take(columns, np.argsort(columns['length'], kind='stable'))
