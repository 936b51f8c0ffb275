"""The learning-rate range test: one short run through all rates.

(Smith 2017, https://arxiv.org/abs/1506.01186, section 3.3; exponential ramp,
smoothing and stop as in fastai's `lr_find`, described by Gugger 2018,
https://sgugger.github.io/how-do-you-find-a-good-learning-rate.html.)
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from fmeta.errors import UsageError
from fmeta.learner import adapt
from fmeta.report import style
from fmeta.search.hyper import Factory, Hyper, Watched, as_factory
from fmeta.train.dispatch import chunks
from fmeta.types import Array, Batch, Learner, TrainState


class Range(NamedTuple):
  """What a range test saw, up to where it stopped.

  Attributes:
    rates: [n], the rate of each step.
    losses: [n], the loss before that step.
    smoothed: [n].
    suggestion: a tenth of the rate at the smallest smoothed loss.
    diverged: whether the loss ended the ramp before its last rate.
  """

  rates: np.ndarray
  losses: np.ndarray
  smoothed: np.ndarray
  suggestion: float
  diverged: bool


def range_test(
  learner: Learner | Factory,
  state: TrainState,
  batches: Callable[[int], Batch],
  rng: Array,
  *,
  hyper: Hyper | None = None,
  low: float = 1e-7,
  high: float = 10.0,
  num_steps: int = 100,
  smoothing: float = 0.9,
  stop: float = 4.0,
  steps_per_dispatch: int = 20,
) -> Range:
  """Trains once with a rate that grows by a constant factor per step.

    rate_i = low (high / low)^(i / (n - 1)),
    s_i = (b m_{i-1} + (1 - b) loss_i) / (1 - b^{i+1})   with m the numerator,

  and stops where loss or s is not finite or s_i > stop * min_j<=i s_j. The
  suggestion is rate_k / 10 with k = argmin s: at the minimum the loss is about
  to rise, and a tenth of it still falls fast (Gugger 2018). Ramp
  and stop are fastai's; its b = 0.98 averages over 50 steps, four decades of
  this ramp, and never stopped on digits (2026-11-24): 0.9 is untuned.

  Args:
    learner: reads the hyper-parameter `rate`, as for `Trials`.
    state: where to start, of one run; it is not changed.
    batches: `i -> batch`.
    rng: root key.
    hyper: the learner's other hyper-parameters, one value each.
    low: first rate.
    high: last rate.
    num_steps: length n of the ramp.
    smoothing: b of the running mean; 0: none.
    stop: times the smallest smoothed loss.
    steps_per_dispatch: steps between two looks at the loss; the result does
      not depend on it.

  Raises:
    UsageError: for an impossible ramp, or a loss that is not finite at once.
  """
  _check(low, high, num_steps, smoothing, stop, steps_per_dispatch)
  factory = as_factory(learner)
  rates = np.geomspace(low, high, num_steps).astype(np.float32)

  @jax.jit
  def run(state, rates, hyper, batches, rng):
    def step(state, inputs, rng):
      watched = Watched({**hyper, 'rate': inputs['rate']})
      done = factory(watched).step(state, inputs['batch'], rng)
      watched.require_read()
      return done

    ramp = factory(Watched({**hyper, 'rate': rates[0]}))._replace(step=step)
    stacked = {'batch': batches, 'rate': rates}
    state, metrics = adapt(
      ramp,
      state,
      lambda i: jax.tree.map(lambda x: x[i], stacked),
      rng,
      num_steps=len(rates),
    )
    return state, metrics['loss']

  others = {name: jnp.asarray(value) for name, value in (hyper or {}).items()}
  losses = np.zeros(0)
  for count, chunk in chunks(
    batches, 0, num_steps, lambda _: steps_per_dispatch
  ):
    part = rates[len(losses) : len(losses) + count]
    state, found = run(state, part, others, chunk, rng)
    losses = np.append(losses, np.asarray(found, np.float64))
    if _ending(losses, smoothing, stop) < len(losses):
      break
  return _range(rates.astype(np.float64), losses, smoothing, stop)


def smooth(losses: np.ndarray, smoothing: float) -> np.ndarray:
  """Exponential moving mean, unbiased at the start.

    s_i = sum_j b^{i-j} l_j / sum_j b^{i-j},   j = 0..i

  Args:
    losses: [n].
    smoothing: 0 <= b < 1.
  """
  mean, out = 0.0, []
  for index, loss in enumerate(losses):
    mean = smoothing * mean + (1 - smoothing) * loss
    out.append(mean / (1 - smoothing ** (index + 1)))
  return np.array(out)


def _ending(losses, smoothing, stop) -> int:
  """Number of steps before the loss diverges."""
  with np.errstate(invalid='ignore', over='ignore'):
    smoothed = smooth(losses, smoothing)
    best = np.minimum.accumulate(np.where(np.isnan(smoothed), 0, smoothed))
    # Not `>`: a NaN is no number below the limit either.
    fine = np.isfinite(losses) & (smoothed <= stop * np.maximum(best, 0))
  return int(np.argmin(fine)) if not fine.all() else len(losses)


def _range(rates, losses, smoothing, stop) -> Range:
  size = _ending(losses, smoothing, stop)
  if size == 0:
    raise UsageError(
      f'the loss is {losses[0]} before the first step of the range test; '
      'check the model and the data'
    )
  smoothed = smooth(losses[:size], smoothing)
  suggestion = float(rates[smoothed.argmin()] / 10)
  diverged = size < len(losses)
  return Range(rates[:size], losses[:size], smoothed, suggestion, diverged)


def _check(low, high, num_steps, smoothing, stop, steps_per_dispatch) -> None:
  if not 0 < low < high:
    raise UsageError(f'a ramp from {low} to {high}; give 0 < low < high')
  if num_steps < 2 or steps_per_dispatch < 1:
    raise UsageError(
      f'num_steps={num_steps}, steps_per_dispatch={steps_per_dispatch}; give '
      'at least 2 and 1'
    )
  if not 0 <= smoothing < 1 or stop <= 1:
    raise UsageError(
      f'smoothing={smoothing}, stop={stop}; give 0 <= smoothing < 1 < stop'
    )


def figure(found: Range) -> style.Picture:
  """The loss over the rate, raw and smoothed, and the suggested rate."""
  with style.house():
    canvas = Figure((style.WIDTH, 4.4), layout='constrained')
    axes = canvas.add_subplot()
    axes.plot(found.rates, found.losses, color=style.GREY, lw=1)
    axes.plot(found.rates, found.smoothed, color=style.COLOURS[0], lw=2)
    axes.axvline(found.suggestion, color=style.COLOURS[1], ls='--')
    axes.annotate(
      f'suggested {found.suggestion:.2g}',
      (found.suggestion, 0.97),
      xycoords=axes.get_xaxis_transform(),
      xytext=(6, 0),
      textcoords='offset points',
      va='top',
      color=style.darker(style.COLOURS[1]),
      fontweight='bold',
    )
    axes.set_xscale('log')
    # A raw spike may leave the picture: it would flatten everything else.
    low, high = found.losses.min(), found.smoothed.max()
    axes.set_ylim(low - 0.05 * (high - low), high + 0.25 * (high - low))
    axes.set_xlabel('learning rate')
    axes.set_ylabel('training loss (grey: raw)')
    axes.grid(color=style.FAINT)
    return style.picture(canvas, _alt(found))


def _alt(found: Range) -> str:
  lowest = int(found.smoothed.argmin())
  end = 'where it diverges' if found.diverged else 'the end of the ramp'
  return (
    f'Line chart of the smoothed loss over the learning rate: '
    f'{found.smoothed[0]:.3g} at {found.rates[0]:.2g}, smallest '
    f'{found.smoothed[lowest]:.3g} at {found.rates[lowest]:.2g}, '
    f'{found.smoothed[-1]:.3g} at {found.rates[-1]:.2g}, {end}. '
    f'Suggested rate {found.suggestion:.2g}.'
  )
