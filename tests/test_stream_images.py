"""Permuted, rotated and corrupted images."""

import numpy as np
import pytest
import scipy.ndimage

from fmeta import stream
from fmeta.errors import UsageError

RANDOM = np.random.default_rng(0)
IMAGE = RANDOM.random((6, 12, 12, 3)).astype(np.float32)
COLUMNS = {'image': IMAGE, 'label': np.arange(6)}
GREY = np.full((4, 32, 32, 1), 0.5, np.float32)


def test_permuted_pixels_move_together_in_every_image_and_split():
  image = np.arange(2 * 3 * 4 * 2).reshape(2, 3, 4, 2)
  label = np.array([1, 0])
  out = stream.permuted({'image': image, 'label': label}, 1)
  assert out['label'] is label
  flat, moved = image.reshape(2, 12, 2), out['image'].reshape(2, 12, 2)
  # Where pixel 0 of the first image went tells where all of them did.
  order = [int(np.flatnonzero(flat[0, :, 0] == v)[0]) for v in moved[0, :, 0]]
  assert sorted(order) == list(range(12)) and order != list(range(12))
  np.testing.assert_array_equal(moved, flat[:, order])
  again = stream.permuted({'image': image[1:]}, 1)
  np.testing.assert_array_equal(again['image'][0], out['image'][1])


def test_other_seeds_permute_otherwise():
  image = np.arange(49).reshape(1, 7, 7, 1)
  first, second = (
    stream.permuted({'image': image}, seed)['image'] for seed in (1, 2)
  )
  assert not np.array_equal(first, second)


def test_images_without_channels_are_refused():
  with pytest.raises(UsageError, match=r'shape \(2, 4, 4\); give \[N, H'):
    stream.permuted({'image': np.zeros((2, 4, 4))}, 0)


def test_quarter_turns_move_pixels_and_are_exact():
  for degrees, turns in [(0, 0), (90, 1), (180, 2), (270, 3), (-90, 3)]:
    turned = stream.rotated(COLUMNS, degrees)
    np.testing.assert_array_equal(
      turned['image'], np.rot90(IMAGE, turns, axes=(1, 2))
    )
  assert turned['label'] is COLUMNS['label']
  oblong = {'image': np.zeros((1, 4, 6, 1))}
  assert stream.rotated(oblong, 180)['image'].shape == (1, 4, 6, 1)
  with pytest.raises(UsageError, match='turned by 90 degrees; give square'):
    stream.rotated(oblong, 90)


def bilinear(image, degrees):
  """Each pixel's source, turned clockwise about the centre, by hand."""
  size = len(image)
  angle, centre = np.deg2rad(degrees), (size - 1) / 2
  out = np.zeros_like(image, np.float64)
  for i in range(size):
    for j in range(size):
      y, x = i - centre, j - centre
      row = np.cos(angle) * y + np.sin(angle) * x + centre
      col = -np.sin(angle) * y + np.cos(angle) * x + centre
      if not (0 <= row <= size - 1 and 0 <= col <= size - 1):
        continue
      top, left = min(int(row), size - 2), min(int(col), size - 2)
      down, right = row - top, col - left
      out[i, j] = (
        (1 - down) * (1 - right) * image[top, left]
        + (1 - down) * right * image[top, left + 1]
        + down * (1 - right) * image[top + 1, left]
        + down * right * image[top + 1, left + 1]
      )
  return out


@pytest.mark.parametrize('degrees', [10, 45.5, 100, -30])
def test_other_angles_interpolate_bilinearly_with_zeros_outside(degrees):
  turned = stream.rotated(COLUMNS, degrees)['image']
  assert turned.dtype == np.float32
  expected = bilinear(IMAGE[0].astype(np.float64), degrees)
  np.testing.assert_allclose(turned[0], expected, atol=1e-6)


def test_rotation_goes_the_same_way_at_every_angle():
  smooth = scipy.ndimage.gaussian_filter(IMAGE, (0, 3, 3, 0))
  near = stream.rotated({'image': smooth}, 89.999)['image']
  exact = stream.rotated({'image': smooth}, 90)['image']
  inner = slice(1, -1)
  # A thousandth of a degree moves a pixel by 1e-4 of its side.
  np.testing.assert_allclose(
    near[:, inner, inner], exact[:, inner, inner], atol=1e-4
  )


def test_bytes_stay_bytes_and_are_rounded():
  byte = np.round(255 * IMAGE).astype(np.uint8)
  turned = stream.rotated({'image': byte}, 30)['image']
  exact = bilinear(byte[0].astype(np.float64), 30)
  assert turned.dtype == np.uint8
  # Half a level of rounding, and single precision.
  assert np.abs(turned[0] - exact).max() <= 0.5 + 1e-4
  with pytest.raises(UsageError, match='angle of nan degrees'):
    stream.rotated(COLUMNS, float('nan'))


@pytest.mark.parametrize('name', stream.CORRUPTIONS)
def test_corruptions_grow_with_severity_and_keep_shape_type_and_labels(name):
  drift = []
  for severity in range(1, 6):
    worse = stream.corrupted(COLUMNS, name, severity)
    assert worse['label'] is COLUMNS['label']
    image = worse['image']
    assert image.shape == IMAGE.shape and image.dtype == np.float32
    assert 0 <= image.min() and image.max() <= 1
    drift.append(np.abs(image - IMAGE).mean())
  assert drift[0] > 0 and drift == sorted(drift) and drift[4] > drift[0]


def test_noise_has_its_deviation_and_is_drawn_for_every_image():
  deviations = (0.04, 0.06, 0.08, 0.09, 0.10)
  for severity, deviation in enumerate(deviations, 1):
    noisy = stream.corrupted({'image': GREY}, 'gaussian_noise', severity)
    noise = noisy['image'] - 0.5
    # 4,096 numbers: their deviation is known to 1.1 %; five of those.
    assert noise.std() == pytest.approx(deviation, rel=0.055)
    assert abs(noise.mean()) < 5 * deviation / 64
    assert (noise[0] != noise[1]).mean() > 0.99
  again = stream.corrupted({'image': GREY}, 'gaussian_noise', 5)
  np.testing.assert_array_equal(again['image'], noisy['image'])
  other = stream.corrupted({'image': GREY}, 'gaussian_noise', 5, seed=1)
  assert (other['image'] != noisy['image']).mean() > 0.99


def test_blur_contrast_and_pixels_are_what_they_are_called():
  blurred = stream.corrupted(COLUMNS, 'gaussian_blur', 5)['image']
  one = scipy.ndimage.gaussian_filter(IMAGE[2, :, :, 1], 1.0)
  np.testing.assert_allclose(blurred[2, :, :, 1], one, atol=1e-6)
  flat = stream.corrupted(COLUMNS, 'contrast', 2)['image']
  mean = IMAGE.mean((1, 2), keepdims=True)
  np.testing.assert_allclose(flat - mean, 0.5 * (IMAGE - mean), atol=1e-6)
  coarse = stream.corrupted({'image': IMAGE[:1, :, :, :1]}, 'pixelate', 5)
  # 12 pixels through int(0.65 * 12) = 7: at most 49 distinct levels.
  assert len(np.unique(coarse['image'])) <= 49
  # A box of one block is its mean: constant images come back.
  same = stream.corrupted({'image': GREY}, 'pixelate', 5)['image']
  np.testing.assert_allclose(same, GREY, atol=1 / 255)


def test_bytes_are_corrupted_as_bytes():
  byte = np.round(255 * IMAGE).astype(np.uint8)
  worse = stream.corrupted({'image': byte}, 'contrast', 5)['image']
  assert worse.dtype == np.uint8
  share = stream.corrupted({'image': byte / 255}, 'contrast', 5)['image']
  assert np.abs(worse / 255 - share).max() <= 0.5 / 255 + 1e-6


@pytest.mark.parametrize(
  'columns, name, severity, message',
  [
    (COLUMNS, 'contast', 1, "no corruption 'contast'; did you mean 'contrast'"),
    (COLUMNS, 'contrast', 6, r"severity 6 of 'contrast'; give one of 1\.\.5"),
    ({'image': 2 * IMAGE}, 'contrast', 1, r'give floats in \[0, 1\] or uint8'),
    ({'image': IMAGE * np.nan}, 'contrast', 1, 'give floats in'),
    ({'image': IMAGE[0]}, 'contrast', 1, r'give \[N, H, W, C\]'),
  ],
)
def test_bad_corruptions_are_named_in_one_line(
  columns, name, severity, message
):
  with pytest.raises(UsageError, match=message) as caught:
    stream.corrupted(columns, name, severity)
  assert '\n' not in str(caught.value)
