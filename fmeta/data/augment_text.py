"""Noise for texts: on token ids inside the step, on strings before it.

`mask_tokens`, `drop_tokens` and `swap_tokens` are `Augment`s of a collated
batch (`input_ids`, `attention_mask`, int32 [B, L]); shapes stay, rates may be
traced, and the first and last token of a text ([CLS], [SEP]) are left alone.

`drop_words`, `swap_words` and `typos` change a string: `(text, draw) -> text`.
`variant(texts, noises, seed, index)` is the index-th variation of every text:
a pure function of (seed, index, row). They are the operations of EDA that
need no thesaurus (Wei and Zou 2019, https://arxiv.org/abs/1901.11196,
section 2).
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from fmeta.data.augment import Augment
from fmeta.data.columns import Columns, Texts, check_columns, column
from fmeta.draw import VARIANT, random_words
from fmeta.errors import UsageError
from fmeta.types import Array, Scalar

# count -> float64 [count], uniform in [0, 1), the next ones of a stream.
Draw = Callable[[int], np.ndarray]
Noise = Callable[[str, Draw], str]


def mask_tokens(rate: Scalar, mask_id: int) -> Augment:
  """Each inner token becomes `mask_id` with probability `rate`.

  Args:
    rate: 0.15 is BERT's (Devlin et al. 2019, https://arxiv.org/abs/1810.04805,
      section 3.1), for another purpose; may be traced.
    mask_id: the id of [MASK] or [UNK].
  """

  def augment(batch, key):
    ids = batch['input_ids']
    chosen = jax.random.bernoulli(key, rate, ids.shape)
    chosen &= _inner(batch['attention_mask'])
    return {**batch, 'input_ids': jnp.where(chosen, mask_id, ids)}

  return augment


def drop_tokens(rate: Scalar, pad_id: int = 0) -> Augment:
  """Each inner token is left out with probability `rate`; the rest moves up.

  Args:
    rate: may be traced.
    pad_id: fills the end.
  """

  def augment(batch, key):
    ids, mask = batch['input_ids'], batch['attention_mask']
    dropped = jax.random.bernoulli(key, rate, ids.shape) & _inner(mask)
    kept = (mask > 0) & ~dropped
    # Stable: what is kept comes first, in its order.
    order = jnp.argsort(~kept, axis=1, stable=True)
    places = jnp.arange(ids.shape[1])[None, :]
    alive = places < kept.sum(1, keepdims=True)
    ids = jnp.where(alive, jnp.take_along_axis(ids, order, axis=1), pad_id)
    return {
      **batch,
      'input_ids': ids,
      'attention_mask': alive.astype(mask.dtype),
    }

  return augment


def swap_tokens(rate: Scalar) -> Augment:
  """Exchanges neighbours: each of a row's disjoint pairs with chance `rate`.

  The pairs are (1, 2), (3, 4), ... or (2, 3), (4, 5), ..., by a fair coin per
  text.
  """

  def augment(batch, key):
    ids = batch['input_ids']
    inner = _inner(batch['attention_mask'])
    coin_key, swap_key = jax.random.split(key)
    offset = jax.random.bernoulli(coin_key, 0.5, (len(ids), 1))
    place = jnp.arange(ids.shape[1])[None, :]
    left = place - (place + offset) % 2  # the left place of each pair
    chosen = jax.random.bernoulli(swap_key, rate, ids.shape)
    partner = jnp.clip(2 * left + 1 - place, 0, ids.shape[1] - 1)
    both = inner & jnp.take_along_axis(inner, partner, axis=1)
    swap = both & jnp.take_along_axis(chosen, jnp.maximum(left, 0), axis=1)
    source = jnp.where(swap, partner, place)
    return {**batch, 'input_ids': jnp.take_along_axis(ids, source, axis=1)}

  return augment


def _inner(mask: Array) -> Array:
  """True on tokens that are neither padding nor a text's first or last."""
  places = jnp.arange(mask.shape[1])[None, :]
  return (places > 0) & (places < mask.sum(1, keepdims=True) - 1)


def drop_words(rate: float) -> Noise:
  """Leaves each word out with probability `rate` (0.1: EDA); never all."""
  _check_rate(rate)

  def noise(text, draw):
    words = text.split()
    if not words:
      return text
    chance = draw(len(words))
    kept = [w for w, p in zip(words, chance, strict=True) if p >= rate]
    return ' '.join(kept or [words[int(np.argmax(chance))]])

  return noise


def swap_words(rate: float) -> Noise:
  """Exchanges two random words, round(rate * words) times (0.1: EDA)."""
  _check_rate(rate)

  def noise(text, draw):
    words = text.split()
    times = round(rate * len(words))
    if len(words) < 2 or not times:
      return text
    for first, second in (draw(2 * times) * len(words)).reshape(-1, 2):
      i, j = int(first), int(second)
      words[i], words[j] = words[j], words[i]
    return ' '.join(words)

  return noise


def typos(rate: float) -> Noise:
  """In each word with probability `rate`: a letter lost, doubled or swapped.

  The letter is any but the first (people rarely miss that one: untuned); a
  swap exchanges it with the one before, so words of one letter stay.
  """
  _check_rate(rate)

  def noise(text, draw):
    words = text.split(' ')
    chance = draw(3 * len(words)).reshape(-1, 3)
    return ' '.join(
      _typo(word, where, kind) if p < rate and len(word) > 1 else word
      for word, (p, where, kind) in zip(words, chance, strict=True)
    )

  return noise


def _typo(word: str, where: float, kind: float) -> str:
  place = 1 + int(where * (len(word) - 1))
  before, letter, after = word[:place], word[place], word[place + 1 :]
  typed = (
    before + after,
    before + letter + letter + after,
    before[:-1] + letter + before[-1] + after,
  )
  return typed[int(kind * len(typed))]


def variant(
  texts: Texts, noises: Sequence[Noise], seed: int, index: int
) -> np.ndarray:
  """The index-th variation of each text, object [N].

  Row r depends on (seed, index, r) and on its text, on nothing else.

  Args:
    texts: N strings.
    noises: applied one after the other.
    seed: of all variations.
    index: for example the epoch, 0 <= index < 2^32.
  """
  if not 0 <= index < 2**32:
    raise UsageError(f'index {index} is out of range; give one in [0, 2^32)')
  out = np.empty(len(texts), object)
  for row, text in enumerate(texts):
    draw = _stream(seed, (index << 192) + (row << 64))
    for noise in noises:
      text = noise(text, draw)
    out[row] = text
  return out


def with_variants(
  columns: Columns,
  noises: Sequence[Noise],
  seed: int,
  copies: int,
  *,
  key: str = 'text',
) -> dict[str, np.ndarray]:
  """The columns and, after them, `copies` variations of every row.

  Args:
    columns: N examples.
    noises: for `variant`.
    seed: of all variations.
    copies: variations per text, at least 1 (EDA, table 3: 16, 8 and 4 for
      500, 2,000 and 5,000 examples).
    key: the column of texts; the others are repeated.

  Raises:
    UsageError: for bad columns, no such column, or no copies.
  """
  check_columns(columns)
  texts = column(columns, key)
  if copies < 1:
    raise UsageError(f'copies {copies} adds nothing; give at least 1')
  new = [variant(texts, noises, seed, index) for index in range(copies)]
  repeated = {
    name: np.concatenate([np.asarray(value)] * (copies + 1))
    for name, value in columns.items()
  }
  return {**repeated, key: np.concatenate([texts.astype(object), *new])}


def _stream(seed: int, start: int) -> Draw:
  """Numbers of the stream VARIANT from a block on, as many as are asked for."""
  block = start

  def draw(count):
    nonlocal block
    words = random_words(seed, VARIANT, block, count)
    block += -(-count // 4)  # four words to a block
    return (words >> np.uint64(11)) * 2.0**-53

  return draw


def _check_rate(rate: float) -> None:
  if not 0 <= rate <= 1:
    raise UsageError(f'rate {rate} is out of range; give one in [0, 1]')
