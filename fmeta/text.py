"""Texts as bucketed token ids, so that nothing recompiles.

An encoded split holds `input_ids` int32 [N, max_length] and `length` int32
[N]; a collate function cuts each batch to the smallest bucket that holds its
longest row and turns `length` into `attention_mask` [B, L].
"""

import functools
import pathlib
from collections.abc import Iterable, Sequence

import numpy as np
import tokenizers

from fmeta.data import (
  Batches,
  Collate,
  Columns,
  check_batch_size,
  column,
  numeric,
)
from fmeta.draw import BATCH_ORDER, EPOCH, permutation
from fmeta.errors import UsageError
from fmeta.types import Batch

# Widths of a text batch, one compilation each. SST-2 by 32 (2026-11): padding
# .64 at random, .33 grouped by length, .21 with 24 and 48 among the widths.
BUCKETS = (16, 32, 64, 128)


def load_tokenizer(folder: str | pathlib.Path) -> tokenizers.Tokenizer:
  """Reads `tokenizer.json`, with its padding and truncation turned off.

  MiniLM's file, for one, pads every text to 128 tokens.

  Raises:
    UsageError: if the folder has no such file.
  """
  path = pathlib.Path(folder) / 'tokenizer.json'
  if not path.is_file():
    raise UsageError(
      f'no tokenizer.json in {str(folder)!r}; give the folder of a Hugging'
      ' Face checkpoint'
    )
  tokenizer = tokenizers.Tokenizer.from_file(str(path))
  tokenizer.no_padding()
  tokenizer.no_truncation()
  return tokenizer


def encode(
  tokenizer: tokenizers.Tokenizer, texts: Sequence[str], max_length: int
) -> dict[str, np.ndarray]:
  """Token ids of texts, cut to `max_length` with special tokens kept.

  Args:
    tokenizer: from `load_tokenizer`; not changed.
    texts: N strings; an empty one becomes its special tokens alone.
    max_length: tokens kept, [CLS] and [SEP] included.

  Returns:
    `input_ids` int32 [N, max_length], filled with the id of [PAD] (0 if there
    is none), and `length` int32 [N].

  Raises:
    UsageError: if max_length has no room for a token, or a text is no string.
  """
  special = tokenizer.num_special_tokens_to_add(False)
  if max_length <= special:
    raise UsageError(
      f'max_length {max_length} leaves no room beside {special} special'
      f' tokens; give at least {special + 1}'
    )
  texts = [_string(text) for text in texts]
  rows = [
    _cut(encoding, max_length)
    for encoding in tokenizer.encode_batch_fast(texts)
  ]
  ids = np.full(
    (len(rows), max_length), tokenizer.token_to_id('[PAD]') or 0, np.int32
  )
  for row, tokens in zip(ids, rows, strict=True):
    row[: len(tokens)] = tokens
  return {
    'input_ids': ids,
    'length': np.array([len(tokens) for tokens in rows], np.int32),
  }


def _string(text: str) -> str:
  if not isinstance(text, str):
    raise UsageError(
      f'{text!r} is a {type(text).__name__}; texts must be strings'
    )
  return str(text)  # numpy's own string type is not taken by tokenizers


def _cut(encoding: tokenizers.Encoding, max_length: int) -> list[int]:
  """Ids with the end of the text dropped and the closing specials kept."""
  ids = encoding.ids
  excess = len(ids) - max_length
  if excess <= 0:
    return ids
  mask = encoding.special_tokens_mask
  closing = next(i for i, flag in enumerate(reversed(mask)) if not flag)
  end = len(ids) - closing
  return ids[: end - excess] + ids[end:]


def bucket_collate(
  lengths: Sequence[int] = BUCKETS, pad_id: int = 0
) -> Collate:
  """Cuts or pads a batch to the smallest bucket that holds its longest row.

  The collate function reads `input_ids` [B, M] and `length` [B], gives
  `input_ids` and `attention_mask`, both int32 [B, L] with L one of `lengths`,
  and leaves other columns alone.

  Raises:
    UsageError: (the collate function) if a row is longer than every bucket.
  """
  buckets = sorted(lengths)

  def collate(batch):
    batch = dict(batch)
    length = column(batch, 'length')
    del batch['length']
    width = bucket_of(int(length.max()), buckets)
    ids = batch['input_ids'][:, :width]
    ids = np.pad(
      ids, [(0, 0), (0, width - ids.shape[1])], constant_values=pad_id
    )
    mask = np.arange(width)[None] < length[:, None]
    return {**batch, 'input_ids': ids, 'attention_mask': mask.astype(np.int32)}

  return collate


def bucket_of(length: int, lengths: Sequence[int]) -> int:
  """The smallest bucket that holds `length` tokens.

  Raises:
    UsageError: if none does.
  """
  holding = [bucket for bucket in lengths if bucket >= length]
  if not holding:
    raise UsageError(
      f'a text has {length} tokens, the buckets are {tuple(lengths)}; add a'
      ' larger one or encode with a smaller max_length'
    )
  return min(holding)


def bucketed_batches(
  columns: Columns,
  batch_size: int,
  seed: int,
  lengths: Sequence[int] = BUCKETS,
  window: int = 32,
) -> Batches:
  """Shuffled batches of similar lengths, in at most len(lengths) shapes.

  Each epoch's permutation is cut into windows of `window` batches, each window
  is sorted by length, and the order of all batches is shuffled. Every example
  appears once an epoch, except N mod batch_size of them, others each epoch.

  Args:
    columns: from `encode`, with a `length` and perhaps labels.
    batch_size: rows of the global batch, at most N.
    seed: names the order.
    lengths: the buckets.
    window: batches sorted together: more saves padding, less keeps the order
      closer to uniform (32: the brief; untuned).

  Raises:
    UsageError: if the columns are empty or unequal, have no `length`, a text
      fits no bucket, or there are too few for a batch.
  """
  size = check_batch_size(columns, batch_size)
  length = column(columns, 'length')
  bucket_of(int(length.max()), lengths)
  if window < 1:
    raise UsageError(f'window {window} is not positive; give at least 1')
  steps = size // batch_size

  @functools.lru_cache(maxsize=1)
  def order(epoch):
    kept = permutation(seed, EPOCH, epoch, size)[: steps * batch_size]
    # lexsort: by window first, then by length; stable, so ties stay shuffled.
    windows = np.arange(len(kept)) // (window * batch_size)
    kept = kept[np.lexsort((length[kept], windows))]
    batch_order = permutation(seed, BATCH_ORDER, epoch, steps)
    return kept.reshape(steps, batch_size)[batch_order]

  def rows(i):
    epoch, step = divmod(i, steps)
    return order(epoch)[step]

  collate = bucket_collate(lengths)
  return Batches(numeric(columns), batch_size, seed, steps, rows, collate)


def padding_share(batches: Iterable[Batch]) -> float:
  """The share of token positions that are padding, in [0, 1)."""
  real = total = 0
  for batch in batches:
    mask = np.asarray(batch['attention_mask'])
    real += int(mask.sum())
    total += mask.size
  if not total:
    raise UsageError('no batches to measure; give at least one')
  return 1.0 - real / total
