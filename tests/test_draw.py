"""Draws are the published Philox words, and draws without replacement fair."""

import numpy as np
import pytest
import scipy.stats

from fmeta import draw
from fmeta.errors import UsageError


def test_words_are_the_published_philox_4x64_answers():
  # Random123 kat_vectors, philox4x64 with 10 rounds, key and counter 0.
  # numpy counts up before the first block, hence the start at -1.
  words = draw.random_words(0, 0, 2**256 - 1, 4)
  assert [int(word) for word in words] == [
    0x16554D9ECA36314C,
    0xDB20FE9D672D0FDC,
    0xD7E772CEE186176B,
    0x7E68B68AEC7BA23B,
  ]


def test_blocks_of_a_stream_follow_each_other():
  whole = draw.random_words(7, draw.EPISODE, 4, 24)
  part = draw.random_words(7, draw.EPISODE, 6, 16)
  np.testing.assert_array_equal(whole[8:], part)


def test_streams_and_seeds_differ():
  first = draw.random_words(7, draw.EPOCH, 0, 8)
  assert not np.any(first == draw.random_words(7, draw.PIXELS, 0, 8))
  assert not np.any(first == draw.random_words(8, draw.EPOCH, 0, 8))


@pytest.mark.parametrize('seed', [-1, 2**64])
def test_a_seed_out_of_range_is_refused(seed):
  with pytest.raises(UsageError, match='out of range; give one in'):
    draw.random_words(seed, draw.EPOCH, 0, 4)


def test_permutations_hold_every_number_once_and_differ_by_index():
  first, second = (draw.permutation(3, draw.EPOCH, i, 1000) for i in range(2))
  np.testing.assert_array_equal(np.sort(first), np.arange(1000))
  np.testing.assert_array_equal(np.sort(second), np.arange(1000))
  assert np.mean(first == second) < 0.01


def test_neighbouring_permutations_share_no_words():
  ranks = [
    np.argsort(draw.permutation(3, draw.EPOCH, i, 400)) for i in range(2)
  ]
  for shift in range(0, 40, 4):
    moved = ranks[0][shift:], ranks[1][: 400 - shift]
    assert abs(np.corrcoef(*moved)[0, 1]) < 0.2


def test_permutations_are_the_same_forever():
  # Recorded 2026-11; a change would silently break every resumed run.
  order = draw.permutation(0, draw.EPOCH, 0, 8)
  np.testing.assert_array_equal(order, [5, 3, 7, 2, 4, 1, 0, 6])


def test_all_orders_of_three_are_equally_likely():
  codes = [
    int(np.dot(draw.permutation(11, draw.EPOCH, i, 3), [9, 3, 1]))
    for i in range(3000)
  ]
  _, counts = np.unique(codes, return_counts=True)
  assert len(counts) == 6
  assert scipy.stats.chisquare(counts).pvalue > 0.01


def test_draws_equal_a_plain_fisher_yates_shuffle():
  sizes = np.array([5, 9, 4])
  words = draw.random_words(1, draw.EPISODE, 0, 12).reshape(3, 4)
  expected = []
  for row, size in zip(words, sizes, strict=True):
    pool = list(range(size))
    for j, word in enumerate(row):
      other = j + int(word) % (int(size) - j)
      pool[j], pool[other] = pool[other], pool[j]
    expected.append(pool[:4])
  drawn = draw.draw_without_replacement(words, sizes)
  np.testing.assert_array_equal(drawn, expected)


def test_ordered_pairs_are_drawn_with_equal_chance():
  words = draw.random_words(2, draw.EPISODE, 0, 8000).reshape(4000, 2)
  drawn = draw.draw_without_replacement(words, np.full(4000, 4))
  assert np.all(drawn[:, 0] != drawn[:, 1])
  _, counts = np.unique(drawn @ np.array([4, 1]), return_counts=True)
  assert len(counts) == 12
  assert scipy.stats.chisquare(counts).pvalue > 0.01
