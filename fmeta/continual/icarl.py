"""iCaRL: exemplars by herding, distillation by sigmoids, nearest mean.

Rebuffi et al. 2017 (https://arxiv.org/abs/1611.07725). A task is, on the
host and with the plain step in its middle:

  columns = icarl_columns(task.columns, held, teach, old)
  fitted = train.fit(...)        # finetune(icarl_loss(forward), ...)
  held = add_exemplars(held, rows, weight, features, num_classes, size)
  scores = nearest_exemplars(held, features_of_held, queries, num_classes)

with `held` the state of `fmeta.memory.class_balanced(...)`.
"""

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from fmeta.baselines import nearest_mean_cosine, unit_length
from fmeta.continual.gdumb import held_columns
from fmeta.data import Columns
from fmeta.errors import UsageError
from fmeta.losses import supervised
from fmeta.memory import herding, occupied
from fmeta.memory.class_balanced import admit
from fmeta.memory.ranked import Held
from fmeta.types import Array, Batch, Forward, LossFn


def icarl_loss(forward: Forward) -> LossFn:
  """Each class for itself: new ones by label, old ones by the old network.

  With g = sigmoid(logits) and BCE(t, g) = -t log g - (1 - t) log(1 - g),

    l = sum_{y old} BCE(q_y, g_y) + sum_{y not old} BCE([y = label], g_y)

  (algorithm 3 of the paper), q = sigmoid(`teacher`). Before the first
  boundary no class is old.

  Args:
    forward: gives logits [B, classes]. Its batches have `label` int [B],
      `teacher` [B, classes], the logits of the network before the task,
      `old`, bool of the same shape, and perhaps `allowed`: classes not
      allowed are left out of the sum.
  """
  return supervised(forward, sigmoid_distillation)


def sigmoid_distillation(
  outputs: Array, batch: Batch
) -> tuple[Array, dict[str, Array]]:
  """The criterion of `icarl_loss`; its accuracy is that of the sigmoids."""
  chex.assert_equal_shape([outputs, batch['teacher'], batch['old']])
  outputs = outputs.astype(jnp.promote_types(outputs.dtype, jnp.float32))
  label = jax.nn.one_hot(batch['label'], outputs.shape[1], dtype=outputs.dtype)
  taught = jax.nn.sigmoid(batch['teacher'].astype(outputs.dtype))
  target = jnp.where(batch['old'], taught, label)
  losses = optax.sigmoid_binary_cross_entropy(outputs, target)
  allowed = batch.get('allowed', jnp.ones(outputs.shape, bool))
  chex.assert_equal_shape([outputs, allowed])
  right = jnp.where(allowed, outputs, -jnp.inf).argmax(-1) == batch['label']
  losses = jnp.where(allowed, losses, 0).sum(-1)
  return losses, {'accuracy': right.astype(losses.dtype)}


def icarl_columns(
  columns: Columns,
  held: Held,
  teach: Callable[[Columns], np.ndarray],
  old: np.ndarray,
) -> dict[str, np.ndarray]:
  """What a task trains on: its rows and the exemplars, with their teacher.

  The teacher's logits are computed once, before the task, and are data from
  then on: no second network runs in the step.

  Args:
    columns: the task's, with all keys of the memory.
    held: the exemplars so far.
    teach: the logits [N, classes] of the network as it is now.
    old: bool [classes]: those that it knows.

  Raises:
    UsageError: if the columns lack a key of the memory, or the teacher has
      other classes.
  """
  past = held_columns(held)
  missing = sorted(set(past) - set(columns))
  if missing:
    raise UsageError(
      f'the task has no column {missing[0]!r}, which the memory holds; it '
      f'has {sorted(columns)}'
    )
  both = {
    key: np.concatenate([np.asarray(columns[key]), value])
    for key, value in past.items()
  }
  teacher = np.asarray(teach(both), np.float32)
  if teacher.ndim != 2 or np.shape(old) != teacher.shape[1:]:
    raise UsageError(
      f'a teacher of shape {teacher.shape} and old classes of shape '
      f'{np.shape(old)}; give logits [N, classes] and bool [classes]'
    )
  known = np.broadcast_to(np.asarray(old, bool), teacher.shape)
  return {**both, 'teacher': teacher, 'old': np.array(known)}


def add_exemplars(
  held: Held,
  rows: Batch,
  weight: Array,
  features: Array,
  num_classes: int,
  size: int,
) -> Held:
  """The memory with a finished task's exemplars, old ones cut to make room.

  Rows are ranked by herding on features of unit length; of the classes so far
  each keeps its first ones, as many as the memory has room for (algorithms 4
  and 5 of the paper). Pure, so it may be jitted.

  Args:
    held: state of a `class_balanced` memory that only this function fills.
    rows: {key: [N, ...]} of the task, padded to one shape for all tasks.
    weight: [N], zero for padding.
    features: [N, D] of the trained network, of any length.
    num_classes: of the whole stream, static.
    size: exemplars ranked per class, static: at least the capacity over the
      classes of the first task, or the memory will not be full.
  """
  label = rows['label']
  features = unit_length(features)
  order = herding(features, label, weight, num_classes, size)
  return admit(held, rows, order, (order < size).astype(jnp.float32))


def nearest_exemplars(
  held: Held, features: Array, queries: Array, num_classes: int
) -> Array:
  """Scores by the nearest mean of exemplars, [Q, classes].

  Rows, means and queries are scaled to unit length, so the largest cosine is
  the smallest distance (algorithm 1 of the paper). A class without exemplars
  scores -inf.

  Args:
    held: the exemplars.
    features: [capacity, D] of the memory's rows, empty slots included, by the
      network as it is now.
    queries: [Q, D].
    num_classes: static.
  """
  weight = occupied(held).astype(features.dtype)
  label = held['rows']['label']
  return nearest_mean_cosine(features, label, queries, num_classes, weight)
