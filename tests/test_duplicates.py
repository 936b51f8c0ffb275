"""Near-duplicates against brute force, and planted ones."""

import itertools

import numpy as np
import pytest

from fmeta.data import checks, duplicates
from fmeta.errors import UsageError

WORDS = 'the a dog cat ran sat on mat it was red big old new'.split()


def make_texts(count=150, seed=0):
  """Short sentences, many of them one edit away from another."""
  random = np.random.default_rng(seed)
  texts = [
    ' '.join(random.choice(WORDS, random.integers(1, 9))) for _ in range(count)
  ]
  for text in texts[: count // 3]:
    words = text.split()
    words[random.integers(len(words))] = str(random.choice(WORDS))
    texts.append(' '.join(words))
  return [*sorted(set(texts)), '', '!!', 'x']


def jaccard(first, second):
  sets = []
  for text in (first, second):
    text = f' {text} '
    sets.append({text[k : k + 4] for k in range(max(len(text) - 3, 1))})
  return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


@pytest.mark.parametrize('threshold', [0.3, 0.5, 0.6, 0.8, 1.0])
def test_near_texts_are_exactly_those_of_brute_force(threshold):
  texts = make_texts()
  words = [k for k, text in enumerate(texts) if text not in ('', '!!')]
  expected = {
    (i, j): jaccard(texts[i], texts[j])
    for i, j in itertools.combinations(words, 2)
    if jaccard(texts[i], texts[j]) >= threshold
  }
  pairs = duplicates.near_texts(texts, threshold)
  found = dict(
    zip(
      zip(pairs.first, pairs.second, strict=True), pairs.similarity, strict=True
    )
  )
  assert found == pytest.approx(expected)
  assert len(pairs.first) == len(found) and (threshold == 1 or expected)


def test_case_spacing_and_punctuation_do_not_count():
  texts = ['How are  you?', 'how are you', 'Who are you']
  pairs = duplicates.near_texts(texts)
  assert (pairs.first, pairs.second, pairs.similarity) == ([0], [1], [1.0])
  assert duplicates.normalise('ＦＵＬＬ  wiDth, ') == 'full width'


def test_a_threshold_out_of_range_is_refused():
  with pytest.raises(UsageError, match='give'):
    duplicates.near_texts(['a'], 0)


def smooth_images(count=40, side=16, seed=0):
  """Random blobs: images with structure, as photographs have it."""
  random = np.random.default_rng(seed)
  coarse = random.random((count, 4, 4, 1))
  return np.kron(coarse, np.ones((1, side // 4, side // 4, 1)))


def test_planted_near_images_are_found_and_no_others():
  images = smooth_images()
  random = np.random.default_rng(1)
  noisy = images[:5] + random.normal(0, 0.02, images[:5].shape)
  darker = 0.6 * images[5:10] + 0.1
  pairs = duplicates.near_images(np.concatenate([images, noisy, darker]))
  found = set(zip(pairs.first.tolist(), pairs.second.tolist(), strict=True))
  planted = {(k, 40 + k) for k in range(10)}
  # Darker copies keep every bit; noise flips those of the flat cells.
  assert {(k, 40 + k) for k in range(5, 10)} <= found <= planted


def test_a_difference_hash_says_where_it_gets_darker():
  ramp = np.tile(np.arange(16.0)[None, None, :, None], (1, 16, 1, 1))
  # Only the last cell of a row is brighter than the next, the row's first.
  (bits,) = duplicates.difference_hash(ramp).view(np.uint8).reshape(1, 8)
  assert bits.tolist() == [1] * 8
  odd = np.ones((1, 5, 3, 1))  # fewer pixels than cells
  assert duplicates.difference_hash(odd) == 0


def test_images_of_another_rank_are_refused():
  with pytest.raises(UsageError, match='height, width, channels'):
    duplicates.near_images(np.zeros((3, 4, 4)))


def make_splits(seed=0):
  """Three splits of few distinct texts, so that all kinds of copies occur."""
  random = np.random.default_rng(seed)
  pool = np.array(make_texts(12), object)
  return {
    name: {'text': random.choice(pool, size)}
    for name, size in (('train', 14), ('validation', 6), ('test', 9))
  }


@pytest.mark.parametrize('seed', range(5))
def test_copies_within_and_across_splits_are_those_of_brute_force(seed):
  splits = make_splits(seed)
  unique = checks.unique(splits, 'text')
  texts = checks.pooled(splits, 'text')[unique.first]
  pairs = duplicates.near_texts(texts, 0.5)
  near = set(zip(texts[pairs.first], texts[pairs.second], strict=True))
  found = checks.copies(unique.counts(3), pairs)

  def is_near(a, b):
    return (a, b) in near or (b, a) in near

  lists = [list(c['text']) for c in splits.values()]
  for a, b in itertools.product(range(3), repeat=2):
    rows, others = lists[b], lists[a]
    if a == b:
      equal = len(rows) - len(set(rows))
      close = sum(any(is_near(r, o) for o in others) for r in rows)
    else:
      equal = sum(r in others for r in rows)
      close = sum(
        r not in others and any(is_near(r, o) for o in others) for r in rows
      )
    assert (found.equal[a, b], found.near[a, b]) == (equal, close)


def test_equal_images_are_one_unique_image():
  image = np.random.default_rng(0).random((3, 4, 4, 1)).astype(np.float32)
  splits = {'train': {'image': image[[0, 1, 0]]}, 'test': {'image': image[1:]}}
  unique = checks.unique(splits, 'image')
  assert len(unique.first) == 3
  assert unique.code[0] == unique.code[2] and unique.code[1] == unique.code[3]
  assert unique.split.tolist() == [0, 0, 0, 1, 1]
