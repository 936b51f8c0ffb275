"""Mixup and CutMix against the two losses they stand for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from fmeta import losses, mixing
from fmeta.errors import UsageError
from fmeta.types import Aux

KEY = jax.random.key(9)
LOSS, PARAMS, BATCH, FORWARD = toys.problem()
WEIGHT = jnp.asarray([1.0, 0.0, 2.0, 0.5, 1.0, 0.0, 1.0, 0.0])


LABELS = np.asarray(BATCH['label'])


def mixup(loss_fn, alpha=0.8, inputs=('x',)):
  return mixing.mixup(loss_fn, alpha, 3, inputs)


def cutmix(loss_fn, alpha=1.0):
  return mixing.cutmix(loss_fn, alpha, 3)


def seen_by(wrap, loss_fn=None):
  """(batch, rng) -> the batch that the wrapped loss is given, and its value."""

  def run(batch, rng):
    kept = []

    def recording(params, model_state, batch, rng):
      kept.append(batch)
      if loss_fn is None:
        return jnp.zeros(()), Aux(model_state, {}, jnp.ones(()))
      return loss_fn(params, model_state, batch, rng)

    value, aux = wrap(recording)(PARAMS, {}, batch, rng)
    return kept[0], value, aux

  return run


# An identity matrix beside the inputs shows who is mixed with whom.
MIXUP = jax.jit(seen_by(lambda loss: mixup(loss, inputs=('x', 'eye')), LOSS))


def batch_of(weight):
  return {**BATCH, 'eye': jnp.eye(8), 'weight': weight}


def share_and_partners(mixed, weight):
  rows = np.float64(mixed['eye'])
  share = rows.diagonal()[weight > 0].min()
  return share, (rows - share * np.eye(8)).argmax(1)


@pytest.mark.parametrize('weight', [jnp.ones(8), WEIGHT], ids=['whole', 'part'])
def test_mixup_is_the_weighted_sum_of_the_two_losses(weight):
  mixed, value, aux = MIXUP(batch_of(weight), KEY)
  share, partner = share_and_partners(mixed, weight)
  assert 0 < share < 1
  assert sorted(partner) == list(range(8)) and (partner != range(8)).any()
  real, w = np.flatnonzero(weight > 0), np.float64(weight)
  inputs = share * BATCH['x'] + (1 - share) * BATCH['x'][partner]
  np.testing.assert_allclose(mixed['x'][real], inputs[real], atol=1e-6)
  log_p = np.float64(jax.nn.log_softmax(aux.outputs))
  total = share * w * log_p[range(8), LABELS]
  total += (1 - share) * w[partner] * log_p[range(8), LABELS[partner]]
  np.testing.assert_allclose(value, -total.sum() / w.sum(), rtol=1e-5)
  np.testing.assert_allclose(aux.weight, w.sum(), rtol=1e-6)
  if w.min() == 1:
    labels = np.eye(3)[LABELS]
    expected = share * labels + (1 - share) * labels[partner]
    np.testing.assert_allclose(mixed['label'], expected, atol=1e-6)
    np.testing.assert_allclose(mixed['weight'], 1, rtol=1e-6)


def test_padding_is_never_mixed_into_a_row():
  for seed in range(5):
    order = mixing.permutation(jax.random.key(seed), WEIGHT)
    assert sorted(np.asarray(order)) == list(range(8))
    np.testing.assert_array_equal(order[WEIGHT == 0], [1, 5, 7])
  rows = np.asarray(MIXUP(batch_of(WEIGHT), KEY)[0]['eye'])
  assert (rows[WEIGHT > 0][:, WEIGHT == 0] == 0).all()


def test_permutations_are_uniform():
  weight = jnp.asarray([1.0, 1.0, 0.0, 1.0])
  draw = jax.jit(jax.vmap(lambda key: mixing.permutation(key, weight)))
  orders = np.asarray(draw(jax.random.split(KEY, 6000)))
  _, counts = np.unique(orders, axis=0, return_counts=True)
  assert len(counts) == 6
  assert abs(counts - 1000).max() < 4 * (1000 * 5 / 6) ** 0.5


def test_evaluation_is_untouched():
  for wrap in (mixup, cutmix):
    given = (PARAMS, {}, BATCH, None)
    seen = wrap(lambda *args: args)(*given)
    assert all(x is y for x, y in zip(seen, given, strict=True))


def test_the_share_follows_its_beta_distribution():
  from scipy import stats

  run = seen_by(lambda loss: mixup(loss, 0.4))
  # Row 1 of a pair becomes s, unless it is its own partner.
  pair = {'x': jnp.asarray([0.0, 1.0]), 'label': jnp.asarray([0, 1])}
  first, second = np.float64(
    jax.jit(jax.vmap(lambda key: run(pair, key)[0]['x']))(
      jax.random.split(KEY, 2000)
    )
  ).T
  swapped = second != 1
  np.testing.assert_allclose(first, np.where(swapped, 1 - second, 0), atol=1e-6)
  assert abs(swapped.mean() - 0.5) < 4 * (0.25 / 2000) ** 0.5
  test = stats.kstest(second[swapped], stats.beta(0.4, 0.4).cdf)
  assert test.pvalue > 1e-3


def images(rows=4, height=5, width=7, weight=None):
  """Row k is k everywhere, so a mixture shows where each pixel is from."""
  x = jnp.broadcast_to(
    jnp.arange(rows, dtype=jnp.float32)[:, None, None, None],
    (rows, height, width, 2),
  )
  batch = {'image': x, 'label': jnp.arange(rows) % 3}
  return batch if weight is None else {**batch, 'weight': weight}


def test_cutmix_pastes_one_rectangle_and_labels_by_its_area():
  weight = jnp.asarray([1.0, 1.0, 3.0, 0.0])
  run = jax.jit(seen_by(cutmix))
  for seed in range(4):
    mixed, _, _ = run(images(weight=weight), jax.random.key(seed))
    rows = np.asarray(mixed['image'])
    assert (rows[3] == 3).all() and (rows[:3] != 3).all()
    pasted = (rows != np.arange(4)[:, None, None, None])[..., 0]
    moved = np.flatnonzero(pasted.any((1, 2)))
    area = 0.0
    if moved.size:
      box = pasted[moved[0]]
      assert (pasted[moved] == box).all()
      outer = box.any(1)[:, None] & box.any(0)[None, :]
      np.testing.assert_array_equal(box, outer)
      area = box.mean()
      assert (np.diff(np.flatnonzero(box.any(0))) == 1).all()
    labels, w = np.eye(3)[np.arange(4) % 3], np.asarray(weight)
    for k in moved:
      other = int(rows[k][pasted[k]][0, 0])
      own, their = (1 - area) * w[k], area * w[other]
      np.testing.assert_allclose(mixed['weight'][k], own + their, rtol=1e-5)
      expected = (own * labels[k] + their * labels[other]) / (own + their)
      np.testing.assert_allclose(mixed['label'][k], expected, atol=1e-5)
  assert moved.size


def test_a_rectangle_has_the_sides_of_its_share_where_the_border_allows():
  draw = jax.jit(
    jax.vmap(
      lambda share, key: mixing.rectangle(key, share, (20, 40)),
      in_axes=(None, 0),
    )
  )
  keys = jax.random.split(KEY, 400)
  for share, sides in ((0.0, (20, 40)), (0.36, (16, 32)), (0.75, (10, 20))):
    boxes = np.asarray(draw(jnp.float32(share), keys))
    for axis, side in zip((1, 2), sides, strict=True):
      found = boxes.any(3 - axis).sum(1)
      # Whole in the middle, half of it around a centre on the border.
      assert found.max() == side and side // 2 <= found.min() < side
  assert not np.asarray(draw(jnp.float32(1.0), keys)).any()


def test_mixtures_pass_through_label_smoothing():
  smooth = losses.supervised(FORWARD, losses.smoothed_cross_entropy(0.2))
  mixed, plain, aux = MIXUP(batch_of(WEIGHT), KEY)
  value, other = jax.jit(smooth)(PARAMS, {}, mixed, None)
  rows = -jax.nn.log_softmax(aux.outputs).mean(-1)
  uniform = jnp.sum(rows * mixed['weight']) / WEIGHT.sum()
  np.testing.assert_allclose(value, 0.8 * plain + 0.2 * uniform, rtol=1e-5)
  np.testing.assert_allclose(other.metrics['cross_entropy'], plain, rtol=1e-5)


def test_bad_input_is_refused_in_one_line():
  for make, word in (
    (lambda: mixup(LOSS, 0), 'alpha=0'),
    (lambda: mixing.mixup(LOSS, 1.0, 1), 'num_classes=1'),
    (lambda: mixing.mixup(LOSS, 1.0, 3, 'image'), "inputs='image'"),
  ):
    with pytest.raises(UsageError, match=word):
      make()
  ids = {'x': jnp.zeros((2, 3), jnp.int32), 'label': jnp.zeros(2, jnp.int32)}
  for wrap, batch, word in (
    (mixup, ids, "'x' is int32 and cannot be mixed"),
    (cutmix, ids, "has no 'image' to mix"),
    (mixup, {'x': jnp.zeros((2, 3))}, "has no 'label' to mix"),
    (cutmix, {**ids, 'image': jnp.zeros((2, 3))}, r'shape \(2, 3\)'),
  ):
    with pytest.raises(UsageError, match=word):
      jax.eval_shape(lambda b, w=wrap: w(LOSS)(PARAMS, {}, b, KEY)[0], batch)
