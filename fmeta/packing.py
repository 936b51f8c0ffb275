"""Several texts in a row: batches of texts with little padding.

`data.batches(columns, 32, seed, collate=pack_collate(64))` draws the texts of
a batch at random, as `data.batches` does, and lays them end to end in as few
rows as hold them; `models.forward(module, models.PACKED_TEXT,
method='packed')` gives one output per text, that of the padded batch. Texts do
not see each other.
"""

from collections.abc import Sequence

import numpy as np

from fmeta.data import Collate, column
from fmeta.errors import UsageError


def first_fit(
  lengths: Sequence[int] | np.ndarray, width: int
) -> list[list[int]]:
  """First-fit decreasing: texts by length, each into the first row with room.

  At most 11/9 of the fewest rows, plus one (Johnson 1973; Dosa 2007).

  Args:
    lengths: tokens of each text, from 1 to `width`.
    width: tokens of a row.

  Returns:
    For each row the numbers of its texts, in the order they are laid in.
  """
  rows, room = [], []
  for text in np.argsort(-np.asarray(lengths), kind='stable'):
    size = int(lengths[text])
    place = next((k for k, free in enumerate(room) if free >= size), len(rows))
    if place == len(rows):
      rows.append([])
      room.append(width)
    rows[place].append(int(text))
    room[place] -= size
  return rows


def pack_collate(width: int, multiple: int = 1, pad_id: int = 0) -> Collate:
  """Packs a batch of texts into rows of `width` tokens.

  The collate function reads `input_ids` [B, M] and `length` [B], leaves other
  columns alone (labels and weights stay [B]) and gives

  - `input_ids` int32 [R, width];
  - `text_ids` int32 [R, width]: which text of the batch, -1 for padding;
  - `position_ids` int32 [R, width]: where the token stands in its text;
  - `length` int32 [B].

  Args:
    width: tokens of a row, at least those of the longest text.
    multiple: R is rounded up to a multiple of it: each R is a compilation of
      its own, and a mesh wants one that its data axis divides.
    pad_id: fills what is left.

  Raises:
    UsageError: if `multiple` is not positive; (the collate function) if a
      text is longer than `width` or has no token.
  """
  if multiple < 1:
    raise UsageError(f'multiple {multiple} of rows; give at least 1')

  def collate(batch):
    batch = dict(batch)
    length, ids = column(batch, 'length'), column(batch, 'input_ids')
    _check(length, width)
    rows = first_fit(length, width)
    shape = (-(-len(rows) // multiple) * multiple, width)
    packed = {
      'input_ids': np.full(shape, pad_id, np.int32),
      'text_ids': np.full(shape, -1, np.int32),
      'position_ids': np.zeros(shape, np.int32),
    }
    for row, texts in enumerate(rows):
      start = 0
      for text in texts:
        size = int(length[text])
        span = slice(start, start + size)
        packed['input_ids'][row, span] = ids[text, :size]
        packed['text_ids'][row, span] = text
        packed['position_ids'][row, span] = np.arange(size)
        start += size
    return {**batch, **packed, 'length': length.astype(np.int32)}

  return collate


def _check(length: np.ndarray, width: int) -> None:
  if length.max() > width:
    raise UsageError(
      f'a text has {length.max()} tokens and a row {width}; pack into wider '
      'rows or encode with a smaller max_length'
    )
  if length.min() < 1:
    raise UsageError('a text without tokens cannot be packed; drop it')
