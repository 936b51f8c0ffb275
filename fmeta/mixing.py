"""Mixup and CutMix: training on mixtures of two rows.

Each wraps a `LossFn` whose criterion takes distributions as labels
(`losses.softmax_cross_entropy` and those made from it). They draw from the
step's key inside the step, so a resumed run mixes the same rows, and leave
evaluation (`rng=None`) alone.

Padding stays padding. Rows of weight zero are never mixed into others, and
for weights w and a share s a mixture of rows i and j counts s w_i +
(1 - s) w_j, with each label in proportion to its part of that: over a
permutation the weights add up to those of the batch. `Aux.outputs` are those
of the mixtures: a memory that stores outputs does not fit together with them.
"""

from collections.abc import Callable, Sequence

import chex
import jax
import jax.numpy as jnp

from fmeta.errors import UsageError
from fmeta.types import Array, Batch, LossFn, Scalar

# Folded into the step's key, hence a number that no microbatch has.
_STREAM = 2**32 - 3

# (input [B, ...], the same permuted, share, rng) -> (mixture, exact share)
_Blend = Callable[[Array, Array, Array, Array], tuple[Array, Array]]


def mixup(
  loss_fn: LossFn,
  alpha: Scalar,
  num_classes: int,
  inputs: Sequence[str] = ('image',),
) -> LossFn:
  """Convex combinations of two rows and of their labels.

    x = s x_i + (1 - s) x_j,  y = s y_i + (1 - s) y_j,  s ~ Beta(alpha, alpha)

  (Zhang et al. 2018, https://arxiv.org/abs/1710.09412, section 2; as in their
  figure 1a one share per batch and j a permutation of it.)

  Args:
    loss_fn: reads the batch's `label`, int [B] or float [B, num_classes].
    alpha: above 0; may be traced. The paper: 0.1 to 0.4 on ImageNet, 1 on
      CIFAR-10.
    num_classes: of the labels.
    inputs: floating arrays [B, ...] of the batch to mix, for example images,
      or cached hidden states; token ids cannot be mixed.

  Raises:
    UsageError: for an alpha that is not positive, and in a step for an input
      that the batch lacks or that is not floating.
  """
  _check(alpha, num_classes, inputs, 'mixup')

  def blend(x, other, share, rng):
    del rng
    part = share.astype(x.dtype)
    return part * x + (1 - part) * other, share

  return _mixing(loss_fn, alpha, num_classes, inputs, blend)


def cutmix(
  loss_fn: LossFn,
  alpha: Scalar,
  num_classes: int,
  image: str = 'image',
) -> LossFn:
  """A rectangle of one image is pasted over another; labels mix by area.

  The rectangle has sides sqrt(1 - s) of the image's, s ~ Beta(alpha, alpha),
  and a uniform centre; it is cut off at the border, after which s is the
  exact share of the pixels that stayed (Yun et al. 2019,
  https://arxiv.org/abs/1905.04899, eqs. 1 and 2). One rectangle per
  batch, as in their appendix A.

  Args:
    loss_fn: reads the batch's `label`, int [B] or float [B, num_classes].
    alpha: above 0; may be traced. 1 in the paper, a uniform share.
    num_classes: of the labels.
    image: key of the floating images [B, H, W, C].

  Raises:
    UsageError: as `mixup`, and for an input that has not four axes.
  """
  _check(alpha, num_classes, (image,), 'cutmix')

  def blend(x, other, share, rng):
    if x.ndim != 4:
      raise UsageError(
        f'cutmix needs images [B, H, W, C]; {image!r} has shape {x.shape}'
      )
    inside = rectangle(rng, share, x.shape[1:3])
    mixed = jnp.where(inside[None, :, :, None], other, x)
    return mixed, 1 - inside.mean(dtype=share.dtype)

  return _mixing(loss_fn, alpha, num_classes, (image,), blend)


def symmetric_beta(rng: Array, alpha: Scalar) -> Array:
  """A draw from Beta(alpha, alpha), in closed form.

  With u, v uniform, w = u^(1 / alpha) and c = cos(2 pi v),

    s = (1 + z) / 2,  z^2 = (1 - w) c^2 / (w + (1 - w) c^2),

  z with the sign of c: Bailey's draw from Student's t (1994, Mathematics of
  Computation 62, page 779), carried over to the beta distribution.
  `jax.random.beta` has loops that take 1.3 s to compile here, a small model's
  step 0.6 s, this 0.2 s (2 CPU cores, 2026-11-24).

  Args:
    rng: key.
    alpha: above 0; differentiable.
  """
  u, v = jax.random.uniform(rng, (2,))
  tiny = jnp.finfo(u.dtype).tiny
  log_w = jnp.log(jnp.maximum(u, tiny)) / alpha
  w, rest = jnp.exp(log_w), -jnp.expm1(log_w)
  c = jnp.cos(2 * jnp.pi * v)
  both = w + rest * c**2 + tiny
  # (1 - |z|) / 2 as (1 - z^2) / (1 + |z|) / 2, without the cancellation.
  smaller = 0.5 * w / (both + jnp.abs(c) * jnp.sqrt(rest * both))
  return jnp.where(c < 0, smaller, 1 - smaller)


def rectangle(rng: Array, share: Array, shape: tuple[int, int]) -> Array:
  """CutMix's box: bool [H, W], about 1 - `share` of it True.

  Args:
    rng: draws the centre, uniform over the pixels.
    share: scalar in [0, 1].
    shape: H and W.
  """

  def inside(rng, size):
    centre = jax.random.randint(rng, (), 0, size)
    side = jnp.floor(size * jnp.sqrt(1 - share)).astype(jnp.int32)
    first = centre - side // 2
    places = jnp.arange(size)
    return (places >= first) & (places < first + side)

  down, across = jax.random.split(rng)
  rows, columns = inside(down, shape[0]), inside(across, shape[1])
  return rows[:, None] & columns[None, :]


def _check(alpha, num_classes, inputs, what) -> None:
  if isinstance(alpha, int | float) and alpha <= 0:
    raise UsageError(
      f'{what} alpha={alpha}; give one above 0, or leave {what} out'
    )
  if num_classes < 2:
    raise UsageError(f'{what} num_classes={num_classes}; give at least 2')
  if isinstance(inputs, str) or not inputs:
    raise UsageError(f'{what} inputs={inputs!r}; give a sequence of batch keys')


def _mixing(
  loss_fn: LossFn,
  alpha: Scalar,
  num_classes: int,
  inputs: Sequence[str],
  blend: _Blend,
) -> LossFn:
  def wrapped(params, model_state, batch, rng):
    if rng is None:
      return loss_fn(params, model_state, batch, rng)
    drawn = jax.random.fold_in(rng, _STREAM)
    share_rng, pair_rng, blend_rng = jax.random.split(drawn, 3)
    label = _entry(batch, 'label')
    weight = batch.get('weight')
    if weight is None:
      weight = jnp.ones(label.shape[:1], jnp.float32)
    chex.assert_rank(weight, 1)
    partner = permutation(pair_rng, weight)
    share = symmetric_beta(share_rng, alpha)
    mixed = {}
    for name in inputs:
      x = _floating(batch, name)
      mixed[name], share = blend(x, x[partner], share, blend_rng)
    labels = _labels(label, num_classes, weight.dtype)
    return loss_fn(
      params,
      model_state,
      {**batch, **mixed, **_target(labels, weight, partner, share)},
      rng,
    )

  return wrapped


def _entry(batch: Batch, name: str) -> Array:
  if name not in batch:
    raise UsageError(
      f'the batch has no {name!r} to mix; it has {sorted(batch)}'
    )
  return jnp.asarray(batch[name])


def _floating(batch: Batch, name: str) -> Array:
  x = _entry(batch, name)
  if not jnp.issubdtype(x.dtype, jnp.floating):
    raise UsageError(
      f'{name!r} is {x.dtype.name} and cannot be mixed; give floating inputs'
    )
  return x


def _labels(label: Array, num_classes: int, dtype) -> Array:
  if label.ndim == 1:
    return jax.nn.one_hot(label, num_classes, dtype=dtype)
  return label


def _target(
  labels: Array, weight: Array, partner: Array, share: Array
) -> dict[str, Array]:
  """The mixtures' labels [B, classes] and weights [B]."""
  share = share.astype(weight.dtype)
  own, other = share * weight, (1 - share) * weight[partner]
  total = own + other
  part = (own / jnp.where(total > 0, total, 1))[:, None]
  return {
    'label': part * labels + (1 - part) * labels[partner],
    'weight': total,
  }


def permutation(rng: Array, weight: Array) -> Array:
  """A random permutation of the rows of weight > 0; others stay in place.

  Args:
    rng: key.
    weight: [B].

  Returns:
    int [B], a permutation of range(B).
  """
  size = weight.shape[0]
  padding = weight <= 0
  # Both orders list the real rows first and then the padding, as it stands.
  places = jnp.argsort(padding, stable=True)
  drawn = jnp.where(padding, 2.0, jax.random.uniform(rng, (size,)))
  return (
    jnp.zeros(size, places.dtype)
    .at[places]
    .set(jnp.argsort(drawn, stable=True))
  )
