"""Rates as functions of the step, counted from 0.

Every schedule takes its peak and its length as floats or traced arrays, so
one compiled program serves a whole grid of them. Where there is a warm-up of
w = floor(warmup * num_steps) steps, the rate of step i < w is

  peak (i + 1) / (w + 1),

so no step has rate zero and the peak is reached at step w.
"""

import jax.numpy as jnp
import optax

from fmeta.types import Array, Scalar


def _floor(share: Scalar, num_steps: Scalar) -> Array:
  # Not int(): `num_steps` may be traced. In float32 0.1 * 30 is below 3.
  return jnp.floor(share * num_steps + 1e-3)


def _warmed(peak, num_steps, warmup, shape) -> optax.Schedule:
  """`shape(share of the steps after the warm-up)` times the peak."""
  rise = _floor(warmup, num_steps)
  rest = jnp.maximum(1, num_steps - rise)

  def rate(step):
    rising = (step + 1) / (rise + 1)
    done = jnp.clip((step - rise) / rest, 0, 1)
    return peak * jnp.where(step < rise, rising, shape(done))

  return rate


def warmup_linear(
  peak: Scalar, num_steps: Scalar, warmup: Scalar = 0.1
) -> optax.Schedule:
  """Linear warm-up over a share of the steps, then linear decay to zero.

  With w = floor(warmup * num_steps) the rate of step i (from 0) is

    peak * (i + 1) / (w + 1)              if i < w
    peak * (num_steps - i) / (num_steps - w)   otherwise,

  so no step of the run has rate zero and the peak is reached once.

  Args:
    peak: highest rate; may be traced.
    num_steps: length of the whole schedule; may be traced.
    warmup: share of `num_steps`; 0.1 as in the BERT code.
  """
  rise = _floor(warmup, num_steps)
  fall = jnp.maximum(1, num_steps - rise)

  def rate(step):
    rising = (step + 1) / (rise + 1)
    falling = jnp.maximum(num_steps - step, 0) / fall
    return peak * jnp.where(step < rise, rising, falling)

  return rate


def warmup_constant(
  peak: Scalar, num_steps: Scalar, warmup: Scalar = 0.1
) -> optax.Schedule:
  """Linear warm-up over a share of the steps, then the peak.

  Args:
    peak: highest rate; may be traced.
    num_steps: length of the run; may be traced.
    warmup: share of `num_steps`; 0.1 as in `warmup_linear`.
  """
  return _warmed(peak, num_steps, warmup, jnp.ones_like)


def warmup_cosine(
  peak: Scalar, num_steps: Scalar, warmup: Scalar = 0.1, final: Scalar = 0.0
) -> optax.Schedule:
  """Linear warm-up, then half a cosine.

  After the warm-up of w steps the rate of step i is, with
  t = (i - w) / (num_steps - w),

    peak (final + (1 - final) (1 + cos(pi t)) / 2)

  (Loshchilov & Hutter 2016, https://arxiv.org/abs/1608.03983, eq. 5, one
  period).

  Args:
    peak: highest rate; may be traced.
    num_steps: length of the whole schedule; may be traced.
    warmup: share of `num_steps`; 0.1 as in `warmup_linear`.
    final: last rate over the peak; 0 in the paper.
  """

  def shape(done):
    return final + (1 - final) * (1 + jnp.cos(jnp.pi * done)) / 2

  return _warmed(peak, num_steps, warmup, shape)


def warmup_polynomial(
  peak: Scalar,
  num_steps: Scalar,
  warmup: Scalar = 0.1,
  *,
  power: Scalar = 2.0,
  final: Scalar = 0.0,
) -> optax.Schedule:
  """Linear warm-up, then a power of the share that is left.

  After the warm-up of w steps the rate of step i is, with
  t = (i - w) / (num_steps - w),

    peak (final + (1 - final) (1 - t)^power);

  power 1 is `warmup_linear`; Mishkin et al. 2016
  (https://arxiv.org/abs/1606.02228) compare powers 0.5, 1 and 2.

  Args:
    peak: highest rate; may be traced.
    num_steps: length of the whole schedule; may be traced.
    warmup: share of `num_steps`; 0.1 as in `warmup_linear`.
    power: 2 is untuned.
    final: last rate over the peak.
  """

  def shape(done):
    return final + (1 - final) * (1 - done) ** power

  return _warmed(peak, num_steps, warmup, shape)


def inverse_sqrt(peak: Scalar, warmup_steps: Scalar) -> optax.Schedule:
  """Linear warm-up, then decay with the root of the step; it has no end.

    peak min((i + 1) / w, sqrt(w / (i + 1)))

  (Vaswani et al. 2017, https://arxiv.org/abs/1706.03762, eq. 3, whose peak is
  1 / sqrt(d_model w)).

  Args:
    peak: highest rate, at step w - 1; may be traced.
    warmup_steps: w, at least 1; may be traced. The paper has 4000.
  """

  def rate(step):
    share = (step + 1) / warmup_steps
    return peak * jnp.minimum(share, 1 / jnp.sqrt(share))

  return rate


def slanted_triangular(
  peak: Scalar,
  num_steps: Scalar,
  *,
  cut_frac: Scalar = 0.1,
  ratio: Scalar = 32.0,
) -> optax.Schedule:
  """A short linear rise and a long linear fall, ULMFiT's schedule.

    cut = floor(num_steps cut_frac)
    p   = i / cut                                    if i < cut
          1 - (i - cut) / (cut (1 / cut_frac - 1))   otherwise
    rate = peak (1 + p (ratio - 1)) / ratio

  (Howard & Ruder 2018, https://arxiv.org/abs/1801.06146, eq. 3.) A `cut` of
  less than one step is one step, and p is kept from falling below 0, which
  rounding `cut` down would let it.

  Args:
    peak: highest rate; may be traced. The paper uses 0.01 with Adam.
    num_steps: length of the whole schedule; may be traced.
    cut_frac: share of the steps that rise; 0.1 in the paper.
    ratio: peak over the lowest rate; 32 in the paper.
  """
  cut = jnp.maximum(1, _floor(cut_frac, num_steps))

  def rate(step):
    falling = 1 - (step - cut) / (cut * (1 / cut_frac - 1))
    p = jnp.maximum(0, jnp.where(step < cut, step / cut, falling))
    return peak * (1 + p * (ratio - 1)) / ratio

  return rate


def one_cycle(
  peak: Scalar,
  num_steps: Scalar,
  *,
  rise: Scalar = 0.3,
  start: Scalar = 1 / 25,
  final: Scalar = 4e-6,
) -> optax.Schedule:
  """One triangle, then a fall far below where it began.

  The rate is piecewise linear through

    step 0: start peak    step a: peak    step 2a: start peak
    step num_steps - 1: final peak,       a = rise num_steps - 1

  (Smith 2018, https://arxiv.org/abs/1803.09820, section 4.1). The momentum,
  which the paper cycles the other way, is left alone.

  Args:
    peak: highest rate; may be traced.
    num_steps: length of the whole schedule, with rise * num_steps > 1; may be
      traced.
    rise: share of the steps that rise, below 0.5; 0.3 is torch's
      `OneCycleLR`.
    start: first rate over the peak; 1/25 is torch's.
    final: last rate over the peak; 1/25 * 1e-4 is torch's.
  """
  top = rise * num_steps - 1
  end = num_steps - 1

  def rate(step):
    steps = jnp.stack([jnp.asarray(x, float) for x in (0, top, 2 * top, end)])
    rates = jnp.stack([jnp.asarray(x, float) for x in (start, 1, start, final)])
    return peak * jnp.interp(step, steps, rates)

  return rate
