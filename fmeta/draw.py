"""Random draws that are pure functions of (seed, stream, index).

They are raw words of numpy's Philox counter generator (Salmon et al. 2011):
unlike the methods of `Generator`, whose streams may change between numpy
releases, these are the same words everywhere and for good.
"""

import numpy as np

from fmeta.errors import UsageError

# The second half of a Philox key: streams that share a seed stay independent.
EPOCH, BATCH_ORDER, EPISODE, LABEL_SHUFFLE, PIXELS = range(1, 6)
SPLIT, VARIANT, VARIED, DOMAIN = range(6, 10)
CLASS_ORDER, TASK_ORDER, BLUR, DRIFT, NOISE = range(10, 15)


def random_words(seed: int, stream: int, start: int, count: int) -> np.ndarray:
  """uint64 [count] from block `start` (four words each) of a stream.

  Consecutive blocks are consecutive words, so one call can serve many
  indices: `random_words(s, t, 4, 8)[4:] == random_words(s, t, 5, 4)`.

  Args:
    seed: 0 <= seed < 2^64.
    stream: which of the independent streams of that seed.
    start: first block, 0 <= start < 2^256.
    count: how many words.

  Raises:
    UsageError: if the seed is out of range.
  """
  if not 0 <= seed < 2**64:
    raise UsageError(f'seed {seed} is out of range; give one in [0, 2^64)')
  key = np.array([seed, stream], np.uint64)
  return np.random.Philox(key=key, counter=start).random_raw(count)


def permutation(seed: int, stream: int, index: int, size: int) -> np.ndarray:
  """The `index`-th random order of `range(size)`, int64 [size]."""
  # The high half of the counter: no permutation is long enough to reach the
  # next one's words.
  words = random_words(seed, stream, index << 128, size)
  return np.argsort(words, kind='stable')


def draw_without_replacement(
  words: np.ndarray, sizes: np.ndarray
) -> np.ndarray:
  """Ordered draws: the first k steps of a Fisher-Yates shuffle, row by row.

  Args:
    words: uint64 [R, k], random.
    sizes: int [R]; row r draws from `range(sizes[r])`, sizes >= k.

  Returns:
    int [R, k], distinct within a row. (A remainder of a 64-bit word favours
    small values by less than sizes / 2^64.)
  """
  num_rows, num_draws = words.shape
  pool = np.tile(np.arange(sizes.max(), dtype=np.int32), (num_rows, 1))
  lanes = np.arange(num_rows)
  sizes = sizes.astype(np.uint64)
  for j in range(num_draws):
    other = j + (words[:, j] % (sizes - np.uint64(j))).astype(np.int64)
    drawn = pool[lanes, other]
    pool[lanes, other] = pool[:, j]
    pool[:, j] = drawn
  return pool[:, :num_draws]
