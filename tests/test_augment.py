"""Augmentations do what they say, and are functions of a key alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from fmeta import data
from fmeta.data import augment, augment_images, augment_text
from fmeta.errors import UsageError

IMAGES = np.random.default_rng(0).random((64, 6, 6, 2)).astype(np.float32)


def apply(change, images=IMAGES, seed=0):
  augmented = jax.jit(augment_images.images(change))
  return np.asarray(augmented({'image': images}, jax.random.key(seed))['image'])


def places(changed, candidates):
  """Which candidate each image has become, [N]; every one must be one."""
  found = np.stack([(changed == c).all((1, 2, 3)) for c in candidates], 1)
  assert (found.sum(1) == 1).all()
  return found.argmax(1)


def test_crops_are_all_windows_of_the_padded_image():
  padded = np.pad(IMAGES, [(0, 0), (1, 1), (1, 1), (0, 0)])
  windows = [
    padded[:, r : r + 6, c : c + 6] for r in range(3) for c in range(3)
  ]
  chosen = places(apply(augment_images.crop(1)), windows)
  assert set(chosen) == set(range(9))


def test_reflected_crops_invent_no_value():
  changed = apply(augment_images.crop(2, 'reflect'))
  for image, original in zip(changed, IMAGES, strict=True):
    assert set(image.ravel()) <= set(original.ravel())


def test_flips_and_turns_are_numpy_s():
  flipped = places(apply(augment_images.flip()), [IMAGES, IMAGES[:, :, ::-1]])
  assert 0.3 < flipped.mean() < 0.7
  turned = [np.rot90(IMAGES, k, (1, 2)) for k in range(4)]
  chosen = places(apply(augment_images.rotate90()), turned)
  assert (np.bincount(chosen, minlength=4) >= 6).all()


@pytest.mark.parametrize('rate, turned', [(0.0, False), (1.0, True)])
def test_rates_of_zero_and_one_are_never_and_always(rate, turned):
  for change in (augment_images.flip(rate), augment_images.rotate90(rate)):
    moved = (apply(change) != IMAGES).any((1, 2, 3))
    assert moved.all() if turned else not moved.any()


def test_a_cutout_is_one_clipped_square_and_its_size_may_be_traced():
  ones = np.ones((64, 6, 6, 2), np.float32)
  change = jax.jit(
    lambda size, key: augment_images.images(augment_images.cutout(size))(
      {'image': ones}, key
    )['image']
  )
  whole = 0
  for seed in range(3):
    for image in np.asarray(change(jnp.int32(3), jax.random.key(seed))):
      rows, cols = np.nonzero(image[..., 0] == 0)
      height, width = np.ptp(rows) + 1, np.ptp(cols) + 1
      assert len(rows) == height * width and max(height, width) <= 3
      assert min(height, width) >= 2
      np.testing.assert_array_equal(image[..., 0], image[..., 1])
      whole += len(rows) == 9
  assert change._cache_size() == 1
  # 4 x 4 of 6 x 6 centres leave the square whole: 85 of 192 are expected.
  assert 50 < whole < 120


def test_brightness_moves_the_mean_and_contrast_keeps_it():
  moved = apply(augment_images.brightness(0.2)) - IMAGES
  shift = moved.mean((1, 2, 3))
  np.testing.assert_allclose(
    moved, np.broadcast_to(shift[:, None, None, None], moved.shape), atol=1e-6
  )
  assert -0.2 <= shift.min() < -0.1 and 0.1 < shift.max() <= 0.2
  scaled = apply(augment_images.contrast(0.5))
  mean = IMAGES.mean((1, 2, 3), keepdims=True)
  np.testing.assert_allclose(scaled.mean((1, 2, 3), keepdims=True), mean, 1e-5)
  factor = (scaled - mean).std((1, 2, 3)) / (IMAGES - mean).std((1, 2, 3))
  assert 0.5 <= factor.min() < 0.7 and 1.3 < factor.max() <= 1.5


def test_an_augmentation_is_a_function_of_its_key():
  run = jax.jit(augment_images.images(augment_images.crop(1)))
  same = {'image': np.repeat(IMAGES[:1], 32, 0)}
  first, again, other = (
    np.asarray(run(same, jax.random.key(seed))['image']) for seed in (0, 0, 1)
  )
  np.testing.assert_array_equal(first, again)
  assert (first != other).any()
  assert len(np.unique(first, axis=0)) > 4  # a key for every example


def test_images_that_cannot_be_augmented_are_refused():
  with pytest.raises(UsageError, match='give square images'):
    apply(augment_images.rotate90(), np.zeros((2, 4, 6, 1), np.float32))
  with pytest.raises(UsageError, match="no column 'image'"):
    augment_images.images()({'x': IMAGES}, jax.random.key(0))
  with pytest.raises(UsageError, match='negative'):
    augment_images.crop(-1)


def make_tokens(rows=200, width=12, seed=0):
  random = np.random.default_rng(seed)
  length = random.integers(2, width + 1, rows)
  mask = np.arange(width)[None] < length[:, None]
  ids = np.where(mask, random.integers(10, 99, (rows, width)), 0)
  return {
    'input_ids': ids.astype(np.int32),
    'attention_mask': mask.astype(np.int32),
  }


def inner(batch):
  places = np.arange(batch['input_ids'].shape[1])[None]
  length = batch['attention_mask'].sum(1, keepdims=True)
  return (places > 0) & (places < length - 1)


def change_tokens(factory, rate, *options):
  batch = make_tokens()
  run = jax.jit(lambda rate, b, key: factory(rate, *options)(b, key))
  out = run(jnp.float32(rate), batch, jax.random.key(0))
  return batch, {k: np.asarray(v) for k, v in out.items()}


def test_masked_tokens_are_inner_ones_at_the_rate():
  batch, out = change_tokens(augment_text.mask_tokens, 0.3, 5)
  changed = out['input_ids'] != batch['input_ids']
  assert (out['input_ids'][changed] == 5).all()
  assert not (changed & ~inner(batch)).any()
  assert abs(changed.sum() / inner(batch).sum() - 0.3) < 0.05
  np.testing.assert_array_equal(out['attention_mask'], batch['attention_mask'])


def test_dropped_tokens_close_the_gap():
  batch, out = change_tokens(augment_text.drop_tokens, 0.4)
  lost = 0
  for row in range(200):
    before = batch['input_ids'][row][batch['attention_mask'][row] > 0].tolist()
    after = out['input_ids'][row][out['attention_mask'][row] > 0].tolist()
    assert [before[0], before[-1]] == [after[0], after[-1]]
    rest = iter(before)
    assert all(token in rest for token in after)  # a subsequence
    lost += len(before) - len(after)
    padding = out['attention_mask'][row] == 0
    assert (out['input_ids'][row][padding] == 0).all()
    assert (np.diff(out['attention_mask'][row]) <= 0).all()
  assert abs(lost / inner(batch).sum() - 0.4) < 0.05


def test_swapped_tokens_are_disjoint_neighbours():
  batch, out = change_tokens(augment_text.swap_tokens, 0.5)
  swaps = 0
  for before, after, free in zip(
    batch['input_ids'], out['input_ids'], inner(batch), strict=True
  ):
    place = 0
    while place < len(before):
      if before[place] == after[place]:
        place += 1
        continue
      assert free[place] and free[place + 1]
      assert [*after[place : place + 2]] == [*before[place : place + 2]][::-1]
      swaps, place = swaps + 1, place + 2
  # Half of about (inner - 1) / 2 pairs a text.
  pairs = np.maximum(inner(batch).sum(1) - 1, 0).sum() / 2
  assert abs(swaps / pairs - 0.5) < 0.1


@pytest.mark.parametrize(
  'factory, options',
  [
    (augment_text.mask_tokens, (5,)),
    (augment_text.drop_tokens, ()),
    (augment_text.swap_tokens, ()),
  ],
)
def test_a_rate_of_zero_changes_no_token(factory, options):
  batch, out = change_tokens(factory, 0.0, *options)
  for name, value in batch.items():
    np.testing.assert_array_equal(out[name], value)


TEXTS = ['the quick brown fox jumps over it', 'a', '', 'two words', 'x y z'] * 9


def test_variants_are_functions_of_seed_index_and_row():
  noises = [augment_text.swap_words(0.3), augment_text.typos(0.5)]
  first = augment_text.variant(TEXTS, noises, 3, 7)
  np.testing.assert_array_equal(
    first, augment_text.variant(TEXTS, noises, 3, 7)
  )
  # A row does not depend on those before it.
  other = ['something else'] * 5 + TEXTS[5:]
  np.testing.assert_array_equal(
    first[5:], augment_text.variant(other, noises, 3, 7)[5:]
  )
  for seed, index in ((4, 7), (3, 8)):
    assert (first != augment_text.variant(TEXTS, noises, seed, index)).any()
  assert len(set(first[::5])) > 1  # equal texts, other rows


def test_dropped_words_leave_the_others_in_order():
  texts = [' '.join(f'w{k}' for k in range(20))] * 100
  out = augment_text.variant(texts, [augment_text.drop_words(0.2)], 0, 0)
  kept = [text.split() for text in out]
  for words in kept:
    assert words == sorted(words, key=lambda w: int(w[1:]))
  assert abs(sum(map(len, kept)) / 2000 - 0.8) < 0.04
  none = augment_text.variant(TEXTS, [augment_text.drop_words(1.0)], 0, 0)
  assert [len(text.split()) for text in none] == [1, 1, 0, 1, 1] * 9


def test_swapped_words_are_the_same_words():
  out = augment_text.variant(TEXTS, [augment_text.swap_words(0.5)], 0, 0)
  assert [sorted(t.split()) for t in out] == [sorted(t.split()) for t in TEXTS]
  assert (out[::5] != TEXTS[0]).any()


def test_a_typo_is_one_letter_lost_doubled_or_swapped():
  word = 'abcdefgh'
  seen = set(
    augment_text.variant([word] * 400, [augment_text.typos(1.0)], 0, 0)
  )
  expected = set()
  for k in range(1, 8):
    expected |= {
      word[:k] + word[k + 1 :],
      word[:k] + word[k] + word[k:],
      word[: k - 1] + word[k] + word[k - 1] + word[k + 1 :],
    }
  assert seen == expected
  spaced = augment_text.variant(['a  b c '], [augment_text.typos(1.0)], 0, 0)
  assert spaced[0] == 'a  b c '


def test_variants_are_appended_with_their_labels():
  columns = {'text': np.array(TEXTS, object), 'label': np.arange(45)}
  out = augment_text.with_variants(columns, [augment_text.typos(0.5)], 1, 2)
  assert data.check_columns(out) == 135
  np.testing.assert_array_equal(out['label'], np.tile(np.arange(45), 3))
  np.testing.assert_array_equal(out['text'][:45], columns['text'])
  np.testing.assert_array_equal(
    out['text'][90:],
    augment_text.variant(TEXTS, [augment_text.typos(0.5)], 1, 1),
  )
  with pytest.raises(UsageError, match='at least 1'):
    augment_text.with_variants(columns, [], 0, 0)
  with pytest.raises(UsageError, match='rate 2 is out of range'):
    augment_text.typos(2)


def shift(batch, key):
  return {**batch, 'x': batch['x'] + jax.random.normal(key, (6,))[None]}


@pytest.fixture(scope='module')
def problem():
  return toys.problem()


def test_an_augmented_loss_is_the_loss_of_the_augmented_batch(problem):
  loss_fn, params, batch, _ = problem
  rng = jax.random.key(3)
  loss, aux = augment.augmented(loss_fn, shift)(params, {}, batch, rng)
  key, _ = jax.random.split(rng)
  expected, _ = loss_fn(params, {}, shift(batch, key), None)
  np.testing.assert_allclose(loss, expected, 1e-6)
  assert aux.outputs.shape == (8, 3)


def test_evaluation_is_not_augmented(problem):
  loss_fn, params, batch, _ = problem
  loss, _ = augment.augmented(loss_fn, shift)(params, {}, batch, None)
  assert loss == loss_fn(params, {}, batch, None)[0]


def test_a_chain_gives_each_its_own_key():
  batch = toys.batch_of()
  key = jax.random.key(0)
  twice = augment.chain(shift, shift)(batch, key)['x'] - batch['x']
  expected = sum(
    jax.random.normal(jax.random.fold_in(key, k), (6,)) for k in range(2)
  )
  np.testing.assert_allclose(twice[0], expected, 1e-5)
