"""BiC: the head's bias towards new classes, corrected by two numbers.

Wu et al. 2019 (https://arxiv.org/abs/1905.13260). After a task, with rows
that were neither trained on nor replayed, equally many of each class (a
`fmeta.memory.class_balanced` of a held-out part of the stream, filled by
`collect`):

  bias = fit_bias(logits, label, new, weight)
  params = with_bias(params, bias, new)
  answers = bias_corrected(forward)

The paper's distillation is `fmeta.penalty.lwf`, or replay with `der`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from fmeta.errors import UsageError
from fmeta.losses import softmax_cross_entropy
from fmeta.types import Array, Forward, Params

KEY = 'bic'


class Bias(NamedTuple):
  """What the logits of new classes become: alpha o + beta.

  Attributes:
    alpha: scalar, 1 for none.
    beta: scalar, 0 for none.
  """

  alpha: Array
  beta: Array


def corrected(logits: Array, new: Array, bias: Bias) -> Array:
  """alpha o_k + beta for new classes k, o_k for old ones.

  Args:
    logits: [B, classes].
    new: bool [classes].
    bias: two scalars.

  Raises:
    UsageError: for another number of classes.
  """
  if jnp.ndim(logits) != 2 or jnp.shape(new) != jnp.shape(logits)[1:]:
    raise UsageError(
      f'logits of shape {jnp.shape(logits)} and new classes of shape '
      f'{jnp.shape(new)}; give [B, classes] and bool [classes]'
    )
  return jnp.where(new[None], bias.alpha * logits + bias.beta, logits)


def fit_bias(
  logits: Array,
  label: Array,
  new: Array,
  weight: Array | None = None,
  num_steps: int = 30,
) -> Bias:
  """The two numbers of least mean cross entropy on held-out rows.

  The problem is convex, and solved by Newton's method: each step the best of
  its halvings, so the loss never grows. Rows that some bias separates have no
  minimum; the last iterate stands.

  Args:
    logits: [N, classes] of the trained network, uncorrected.
    label: int [N].
    new: bool [classes], those of the last task.
    weight: [N], zero for what is no row; all ones by default. Without any row
      there is no correction.
    num_steps: of Newton; 30 is past convergence in float32 (untuned).

  Returns:
    `Bias`; pure, so this may be jitted and vmapped.
  """
  weight = jnp.ones(len(label)) if weight is None else weight
  share = weight / jnp.where(weight.sum() > 0, weight.sum(), 1)

  def loss(numbers):
    outputs = corrected(logits, new, Bias(*numbers))
    return jnp.sum(share * softmax_cross_entropy(outputs, {'label': label})[0])

  # A step of no length last: at the minimum rounding moves nothing.
  lengths = jnp.asarray([0.5**k for k in range(12)] + [0.0], logits.dtype)

  def newton(numbers, _):
    slope = jax.grad(loss)(numbers)
    curvature = jax.hessian(loss)(numbers) + 1e-6 * jnp.eye(2)
    step = jnp.linalg.solve(curvature, slope).astype(numbers.dtype)
    tried = numbers[None] - lengths[:, None] * step[None]
    return tried[jnp.argmin(jax.vmap(loss)(tried))], None

  start = jnp.asarray([1.0, 0.0], logits.dtype)
  return Bias(*jax.lax.scan(newton, start, length=num_steps)[0])


def with_bias(params: Params, bias: Bias, new: Array) -> Params:
  """Parameters of a model that carry the correction, for `bias_corrected`."""
  return {**params, KEY: {**bias._asdict(), 'new': jnp.asarray(new, bool)}}


def bias_corrected(forward: Forward) -> Forward:
  """A forward pass whose new classes' logits are corrected.

  Args:
    forward: gives logits [B, classes]; it never sees the correction.

  Raises:
    UsageError: when traced with parameters that carry none.
  """

  def with_correction(params, model_state, batch, rng):
    if KEY not in params:
      raise UsageError(
        f'the parameters have no {KEY!r}; add it by with_bias(params, bias, '
        'new)'
      )
    rest = {key: value for key, value in params.items() if key != KEY}
    logits, model_state = forward(rest, model_state, batch, rng)
    held = params[KEY]
    bias = Bias(held['alpha'], held['beta'])
    return corrected(logits, held['new'], bias), model_state

  return with_correction
