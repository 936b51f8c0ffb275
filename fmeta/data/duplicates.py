"""Equal and nearly equal examples, found exactly and without a quadratic loop.

Texts are near-duplicates if the Jaccard similarity of their character
shingles reaches a threshold:

  J(a, b) = |A & B| / |A | B|, A and B sets of `SHINGLE` letters in a row.

Only pairs that share a rare shingle are compared (prefix filtering, Chaudhuri
et al. 2006, https://doi.org/10.1109/ICDE.2006.9, and Bayardo et al. 2007,
https://doi.org/10.1145/1242572.1242591): of two sets of similarity t, each
keeps |A| - ceil(t |A|) + 1 of its rarest shingles, and the two share one of
those. Before a pair is compared in full, two bitmaps bound its symmetric
difference (`_may_be_near`). Nothing is missed and nothing is random, as it
would be with MinHash.

Images are near-duplicates if their difference hashes differ in few bits and
their pixels correlate (`near_images`).
"""

import re
import unicodedata
from typing import NamedTuple

import numpy as np
import scipy.sparse

from fmeta.data.columns import Texts
from fmeta.errors import UsageError

SHINGLE = 4  # letters, untuned
# Read on pairs of CLINC150, SST-2 and TREC (2026-11-24): above .8 most pairs
# say the same, at .6 most differ in the word that matters.
TEXT_THRESHOLD = 0.8
# Digits, Omniglot and MNIST hold no pair at .99 and four to six at .98, all of
# one class; at .95 hundreds of drawings of one digit pass (2026-11-24).
IMAGE_BITS, IMAGE_THRESHOLD = 4, 0.98
_BITS = 256  # of a bitmap, untuned
_SIDE = 8  # a hash has _SIDE x _SIDE bits
_BLOCK = 2048  # rows compared at once, to bound memory


class Pairs(NamedTuple):
  """Unordered pairs of unique examples, first < second.

  Attributes:
    first: int64 [P].
    second: int64 [P].
    similarity: float64 [P], in [0, 1].
  """

  first: np.ndarray
  second: np.ndarray
  similarity: np.ndarray


def normalise(text: str) -> str:
  """Lower case, words only, one space between them."""
  folded = unicodedata.normalize('NFKC', text).casefold()
  return ' '.join(re.findall(r'\w+', folded))


def near_texts(texts: Texts, threshold: float = TEXT_THRESHOLD) -> Pairs:
  """All pairs whose shingles have Jaccard similarity >= threshold.

  Texts are normalised first, so that pairs which differ in case, spacing or
  punctuation alone have similarity 1. A text without a word has no partner.

  Args:
    texts: N strings, without repetitions (else their pairs are listed, too).
    threshold: in (0, 1].

  Raises:
    UsageError: if the threshold is out of range.
  """
  if not 0 < threshold <= 1:
    raise UsageError(f'threshold {threshold} is out of range; give (0, 1]')
  sets = _shingles(texts)
  first, second = _candidates(_prefixes(sets, threshold))
  possible = _may_be_near(sets, first, second, threshold)
  first, second = first[possible], second[possible]
  shared = _intersections(sets, first, second)
  sizes = np.diff(sets.indptr)
  similarity = shared / (sizes[first] + sizes[second] - shared)
  # 0.8 * 5 / 5 may fall a rounding short of 0.8.
  kept = similarity >= threshold - 1e-9
  return Pairs(first[kept], second[kept], similarity[kept])


def _shingles(texts: Texts) -> scipy.sparse.csr_array:
  """Binary [N, V], columns from the rarest to the most frequent shingle."""
  ids: dict[str, int] = {}
  columns, starts = [], [0]
  for text in texts:
    found = _shingles_of(normalise(text))
    columns += [ids.setdefault(shingle, len(ids)) for shingle in found]
    starts.append(len(columns))
  found = np.array(columns, np.int64)
  frequency = np.bincount(found, minlength=len(ids))
  rank = np.empty(len(ids), np.int64)
  rank[np.argsort(frequency, kind='stable')] = np.arange(len(ids))
  ones = np.ones(len(found), np.int32)
  shape = (len(texts), max(len(ids), 1))
  matrix = scipy.sparse.csr_array((ones, rank[found], starts), shape=shape)
  matrix.sort_indices()
  return matrix


def _shingles_of(text: str) -> set[str]:
  if not text:
    return set()
  text = f' {text} '
  ends = range(max(len(text) - SHINGLE, 0) + 1)
  return {text[start : start + SHINGLE] for start in ends}


def _prefixes(
  sets: scipy.sparse.csr_array, threshold: float
) -> scipy.sparse.csr_array:
  """Each set's rarest shingles, as many as the filter needs."""
  sizes = np.diff(sets.indptr)
  # Without the small term, .8 * 5 = 4.000000000000001 would lose a pair.
  kept = sizes - np.ceil(threshold * sizes - 1e-9).astype(int) + 1
  kept = np.where(sizes > 0, kept, 0)
  place = np.arange(sets.nnz) - np.repeat(sets.indptr[:-1], sizes)
  mask = place < np.repeat(kept, sizes)
  starts = np.concatenate([[0], np.cumsum(kept)])
  return scipy.sparse.csr_array(
    (sets.data[mask], sets.indices[mask], starts), shape=sets.shape
  )


def _candidates(
  prefixes: scipy.sparse.csr_array,
) -> tuple[np.ndarray, np.ndarray]:
  """Pairs of rows, first < second, that share a column."""
  columns = prefixes.T.tocsr()
  found = []
  for start in range(0, len(prefixes.indptr) - 1, _BLOCK):
    block = (prefixes[start : start + _BLOCK] @ columns).tocoo()
    first, second = block.row.astype(np.int64) + start, block.col
    found.append(np.stack([first, second])[:, first < second])
  if not found:
    return np.zeros(0, np.int64), np.zeros(0, np.int64)
  first, second = np.concatenate(found, axis=1)
  return first, second


def _may_be_near(sets, first, second, threshold: float) -> np.ndarray:
  """False where bitmaps show that a pair is below the threshold.

  Each shingle flips one of `_BITS` bits, so the bits in which two bitmaps
  differ are at most |A ^ B|, and J >= t means
  |A ^ B| <= (1 - t) / (1 + t) (|A| + |B|).
  """
  width = sets.shape[1]
  flips = scipy.sparse.csr_array(
    (np.ones(width, np.int32), (np.arange(width), np.arange(width) % _BITS)),
    shape=(width, _BITS),
  )
  bits = np.packbits((sets @ flips).toarray() & 1, axis=1).view(np.uint64)
  sizes = np.diff(sets.indptr)
  slope = (1 - threshold) / (1 + threshold)
  possible = np.zeros(len(first), bool)
  for start in range(0, len(first), 50 * _BLOCK):
    pair = slice(start, start + 50 * _BLOCK)
    a, b = first[pair], second[pair]
    differing = np.bitwise_count(bits[a] ^ bits[b]).sum(axis=1, dtype=int)
    possible[pair] = differing <= slope * (sizes[a] + sizes[b]) + 1e-6
  return possible


def _intersections(sets, first, second) -> np.ndarray:
  """Size of the intersection of each pair of rows."""
  step = 50 * _BLOCK
  parts = [
    sets[first[start : start + step]]
    .multiply(sets[second[start : start + step]])
    .sum(axis=1)
    for start in range(0, len(first), step)
  ]
  return np.concatenate(parts) if parts else np.zeros(0)


def near_images(
  images: np.ndarray,
  max_bits: int = IMAGE_BITS,
  threshold: float = IMAGE_THRESHOLD,
) -> Pairs:
  """Pairs whose difference hashes are close and whose pixels correlate.

  The hash (Krawetz 2013,
  https://www.hackerfactor.com/blog/index.php?/archives/529-Kind-of-Like-That.html)
  says of each cell of an 8x8 grid whether it is brighter than the next one in
  its row (the last: than the first). It is blind to contrast and brightness,
  and so is the correlation, which settles what the hash proposes.

  Args:
    images: [N, H, W, C], any number type, without repetitions.
    max_bits: of 64, in which hashes may differ.
    threshold: least Pearson correlation of the pixels, which is the
      similarity given back; a constant image has no partner.

  Raises:
    UsageError: if images are not of rank four.
  """
  images = np.asarray(images)
  if images.ndim != 4:
    raise UsageError(
      f'images have shape {images.shape}; give [N, height, width, channels]'
    )
  first, second = _close(difference_hash(images), max_bits)
  flat = images.reshape(len(images), -1)
  similarity = _correlations(flat, first, second)
  kept = similarity >= threshold
  return Pairs(first[kept], second[kept], similarity[kept])


def difference_hash(images: np.ndarray) -> np.ndarray:
  """One hash per image, uint64 [N]; see `near_images`."""
  grey = images.mean(axis=3, dtype=np.float32)
  for axis in (1, 2):
    edges = np.linspace(0, grey.shape[axis], _SIDE, endpoint=False).astype(int)
    ends = np.append(edges[1:], grey.shape[axis])
    widths = np.expand_dims(np.maximum(ends - edges, 1), 2 - axis)
    grey = np.add.reduceat(grey, edges, axis=axis) / widths[None]
  bits = grey > np.roll(grey, -1, axis=2)
  packed = np.packbits(bits.reshape(len(images), -1), axis=1)
  return packed.view(np.uint64)[:, 0]


def _close(hashes: np.ndarray, max_bits: int) -> tuple[np.ndarray, np.ndarray]:
  """Pairs first < second of hashes that differ in few bits."""
  found = [np.zeros((2, 0), np.int64)]
  for start in range(0, len(hashes), _BLOCK // 64):
    block = hashes[start : start + _BLOCK // 64, None]
    differing = np.bitwise_count(block ^ hashes[None, start:])
    first, second = np.nonzero(differing <= max_bits)
    found.append(np.stack([first, second])[:, first < second] + start)
  first, second = np.concatenate(found, axis=1)
  return first, second


def _correlations(flat, first, second) -> np.ndarray:
  """Pearson correlation of pairs of rows; 0 where a row is constant."""
  parts = [np.zeros(0)]
  for start in range(0, len(first), _BLOCK):
    a, b = (
      flat[rows[start : start + _BLOCK]].astype(np.float64)
      for rows in (first, second)
    )
    a, b = (x - x.mean(axis=1, keepdims=True) for x in (a, b))
    scale = np.sqrt((a**2).sum(axis=1) * (b**2).sum(axis=1))
    shared = (a * b).sum(axis=1)
    parts.append(
      np.divide(shared, scale, np.zeros_like(scale), where=scale > 0)
    )
  return np.concatenate(parts)
