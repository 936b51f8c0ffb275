"""Learning without forgetting: the old model teaches on the new data."""

from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from fmeta.errors import UsageError, check_number
from fmeta.penalty.quadratic import no_penalty
from fmeta.penalty.teacher import (
  first_teacher,
  mean_over_rows,
  next_teacher,
  student_and_teacher,
)
from fmeta.types import Array, Batch, Forward, ModelState, Penalty, Scalar

# Its exponential is zero.
NEVER = -1e9


def lwf(
  forward: Forward,
  strength: Scalar,
  heads: Array | np.ndarray,
  temperature: Scalar = 2.0,
  model_state: ModelState = None,
) -> Penalty:
  """Learning without forgetting.

  With p and q the softmax of the teacher's and the student's logits / T over
  the classes of head h that the teacher knows,

    strength * T^2 * mean over rows of sum_h KL(p_h | q_h)

  (Li & Hoiem 2016, https://arxiv.org/abs/1606.09282, whose cross entropy has
  the same gradient; T^2 keeps the gradient's size, Hinton et al. 2015,
  https://arxiv.org/abs/1503.02531.) The teacher is the model at the last
  task's end, on the rows of the new task; it knows the classes whose labels
  were among the batches consolidated so far. One that had no row in them is
  not taught: let `Stage.remember` hold a row of every class of the task. Before
  the first end the penalty and its gradient are zero. Both run in evaluation
  mode with the model state of the last boundary, see `fmeta.penalty.teacher`.

  Args:
    forward: gives logits [B, classes].
    strength: the paper's lambda_o. May be traced.
    heads: bool [heads, classes], each softmax's classes.
      `fmeta.stream.class_mask(groups, classes)`, a head per task, is
      task-incremental; `np.ones((1, classes), bool)` is class-incremental (the
      classes so far) and domain-incremental (all, once seen).
    temperature: T; 2 as in the paper. May be traced.
    model_state: as `learner.init` gets it; only its structure matters.

  Raises:
    UsageError: for heads or logits of another shape, labels that are no class
      numbers, a model state that was not announced, a number out of range,
      or, at a task's end, no batches.
  """
  check_number('lwf strength', strength)
  check_number('lwf temperature', temperature, above=True)
  heads = heads if isinstance(heads, jax.Array) else np.asarray(heads)
  if np.ndim(heads) != 2 or heads.dtype != bool:
    raise UsageError(
      f'heads of shape {np.shape(heads)} and type {heads.dtype}; give bool '
      '[heads, classes], see fmeta.stream.class_mask'
    )

  def init(trainable, params):
    known = jnp.zeros(heads.shape, bool)
    return {**first_teacher(trainable, params, model_state), 'known': known}

  def value(trainable, params, state, batch, rng):
    del trainable, rng
    student, teacher = student_and_teacher(forward, params, state, batch)
    if student.ndim != 2 or student.shape[1] != heads.shape[1]:
      raise UsageError(
        f'logits of shape {student.shape} for heads over {heads.shape[1]} '
        'classes; give both the same classes'
      )
    of_head = jax.vmap(_divergence, (0, None, None, None))
    rows = of_head(state['known'], teacher, student, temperature).sum(0)
    return strength * temperature**2 * mean_over_rows(rows, batch)

  def consolidate(state, trainable, params, model_state, forward, batches, rng):
    del forward, rng
    seen = _seen(batches, heads.shape[1])
    state = next_teacher(state, trainable, params, model_state)
    return {**state, 'known': state['known'] | (heads & seen[None])}

  return no_penalty()._replace(init=init, value=value, consolidate=consolidate)


def _divergence(
  known: Array, teacher: Array, student: Array, temperature: Scalar
) -> Array:
  """KL(p | q) over the known classes, [B]; exactly 0 if there are none."""

  def log_softmax(logits):
    dtype = jnp.promote_types(logits.dtype, jnp.float32)
    logits = logits.astype(dtype) / temperature
    return jax.nn.log_softmax(jnp.where(known[None], logits, NEVER))

  log_p, log_q = log_softmax(teacher), log_softmax(student)
  return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)


def _seen(batches: Iterable[Batch], num_classes: int) -> Array:
  """bool [classes]: labels of rows of weight above zero."""
  batches, seen = list(batches), jnp.zeros(num_classes, bool)
  if not batches:
    raise UsageError(
      "no batches to read the task's classes from; give some of the task, as "
      '`remember` of a train.Stage'
    )
  for batch in batches:
    label = jnp.asarray(batch['label'])
    if label.ndim != 1 or not jnp.issubdtype(label.dtype, jnp.integer):
      raise UsageError(
        f'labels of shape {label.shape} and type {label.dtype}; lwf '
        'consolidates class numbers, int [B]'
      )
    real = jnp.asarray(batch.get('weight', jnp.ones(label.shape))) > 0
    hot = label[:, None] == jnp.arange(num_classes)[None]
    _check(hot.any(1) | ~real, label, num_classes)
    seen |= (hot & real[:, None]).any(0)
  return seen


def _check(fits: Array, label: Array, num_classes: int) -> None:
  if not isinstance(fits, Tracer) and not fits.all():
    worst = int(label[jnp.argmin(fits)])
    raise UsageError(
      f'label {worst} with heads over {num_classes} classes; give heads all '
      'classes of the stream, and labels below their number'
    )
