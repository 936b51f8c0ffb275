"""Texts as vectors of a pre-trained model, to judge labels by."""

import jax
import numpy as np

from fmeta import models, text
from fmeta.data.batching import eval_batches
from fmeta.data.columns import Texts, take
from fmeta.pretrained import load_bert

_MAX_LENGTH, _BATCH = 128, 64


def embed(model: str, texts: Texts) -> np.ndarray:
  """Mean-pooled embeddings float32 [N, H] of texts cut to 128 tokens.

  Args:
    model: what `fmeta.pretrained.find` takes.
    texts: N strings.

  Raises:
    UsageError: if there is no such model.
  """
  module, params, folder = load_bert(model, None, jax.random.key(0))
  columns = text.encode(text.load_tokenizer(folder), list(texts), _MAX_LENGTH)
  # Short texts meet short ones; the rows go back to the order given.
  order = np.argsort(columns['length'], kind='stable')
  run = jax.jit(models.forward(module))
  batches = eval_batches(
    take(columns, order), _BATCH, collate=text.bucket_collate()
  )
  found = [np.asarray(run(params, {}, batch, None)[0]) for batch in batches]
  out = np.empty((len(texts), found[0].shape[1]), np.float32)
  out[order] = np.concatenate(found)[: len(texts)]
  return out
