"""Nearest class mean over a stream: Euclid, cosine, SimpleCIL, APER."""

from collections.abc import Callable, Sequence

import jax.numpy as jnp

from fmeta import baselines
from fmeta.continual.streaming import sums
from fmeta.continual.streaming.sums import Streaming
from fmeta.types import Array, Batch, Params


def nearest_mean_euclid(num_classes: int, dim: int) -> Streaming:
  """`baselines.nearest_mean_euclid` of all rows so far.

  Args:
    num_classes: C, of the whole stream.
    dim: D.
  """
  return _nearest(num_classes, dim, baselines.nearest_mean_euclid)


def simple_cil(num_classes: int, dim: int) -> Streaming:
  """Cosine between a row and each class mean of RAW rows.

  The prototype classifier of a frozen encoder (Zhou et al. 2023,
  https://arxiv.org/abs/2303.07338, SimpleCIL). `nearest_mean_cosine` differs
  from it in that rows have unit length before they are averaged; where the
  encoder's do, the two are one. With first-session adaptation the same
  classifier is APER, see `concatenated`.

  Args:
    num_classes: C, of the whole stream.
    dim: D.
  """
  return _nearest(num_classes, dim, baselines.nearest_mean_cosine)


def nearest_mean_cosine(num_classes: int, dim: int) -> Streaming:
  """`baselines.nearest_mean_cosine` of all rows so far.

  Args:
    num_classes: C, of the whole stream.
    dim: D.
  """
  return sums.transformed(simple_cil(num_classes, dim), baselines.unit_length)


def concatenated(
  embed: Callable[[Params, Batch], Array],
) -> Callable[[Sequence[Params], Batch], Array]:
  """Features of one encoder with several parameters, side by side.

  APER (Zhou et al. 2023, https://arxiv.org/abs/2303.07338; also called ADAM)
  fine-tunes the encoder on the first task, freezes it, and classifies
  [frozen, adapted] features by SimpleCIL:

    both = concatenated(embed)
    classifier = simple_cil(num_classes, 2 * dim)
    state = classifier.update(state, both((frozen, adapted), batch), label)

  Args:
    embed: `(params, batch) -> [B, D]`, in evaluation mode.

  Returns:
    `((params, ...), batch) -> [B, sum of D]`.
  """
  return lambda several, batch: jnp.concatenate(
    [embed(params, batch) for params in several], axis=-1
  )


def _nearest(num_classes, dim, rule: baselines.NearestMean) -> Streaming:
  init, update = sums.class_sums(num_classes, dim)

  def solve(state):
    return {'mean': sums.means(state), 'seen': state['count'] > 0}

  def answer(solved, features):
    # Each class mean is the only example of its class.
    return rule(
      solved['mean'],
      jnp.arange(num_classes),
      jnp.asarray(features, solved['mean'].dtype),
      num_classes,
      solved['seen'],
    )

  return Streaming(init, update, solve, answer)
