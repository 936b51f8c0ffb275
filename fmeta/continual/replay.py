"""Losses of a batch and of remembered rows beside it.

They read the `memory_*` keys that `rehearse(..., mix=fmeta.beside)` puts into
the batch. Own and remembered rows go through the model together, as with
`fmeta.append`. `Aux.outputs` and the metrics are those of the own rows, and
the outputs are the model's own, unmasked: what `rehearse` remembers. Rows of
a memory that is still empty contribute nothing.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from fmeta.continual.beside import apart
from fmeta.continual.masking import masked
from fmeta.errors import UsageError, check_number
from fmeta.losses import Criterion
from fmeta.memory import append
from fmeta.types import Array, Aux, Batch, Forward, LossFn, Scalar

Mix = Callable[[Batch, Batch, Array], Batch]


class Part(NamedTuple):
  """Rows that one term of a loss is a mean over.

  Attributes:
    batch: their keys, without prefix.
    weight: [B], zero for what is no row.
    outputs: of the model on them.
  """

  batch: Batch
  weight: Array
  outputs: Any


def der(forward: Forward, criterion: Criterion, alpha: Scalar) -> LossFn:
  """Dark experience replay: remembered logits are held on to.

    L = mean_own criterion + alpha mean_memory |z - h(x)|^2 / classes

  with h(x) the logits now and z those of when the row was inserted (Buzzega
  et al. 2020, https://arxiv.org/abs/2004.07211). The square is a mean over
  the classes, over the allowed ones if the remembered rows have `allowed`;
  as a sum, its alpha would be that many times smaller.

  Args:
    forward: gives logits [B, classes].
    criterion: of the own rows.
    alpha: strength; may be traced.

  Returns:
    A `LossFn` for `rehearse(..., mix=fmeta.beside)` and a memory of the
    batch's keys and `outputs`.

  Raises:
    UsageError: for a strength below 0, and when traced without such a memory.
  """
  check_number('der alpha', alpha)

  def loss_fn(params, model_state, batch, rng):
    own, past, model_state = _run(forward, params, model_state, batch, rng)
    loss, aux = _own_loss(criterion, own, model_state)
    kept = _distance(past)
    return loss + alpha * kept, _with(aux, loss, distillation=kept)

  return loss_fn


def der_plus_plus(
  forward: Forward, criterion: Criterion, alpha: Scalar, beta: Scalar
) -> LossFn:
  """DER++: one half of the remembered rows keep their logits, one labels.

    L = mean_own criterion + alpha mean_1 |z - h(x)|^2 / classes
        + beta mean_2 criterion

  (Buzzega et al. 2020, https://arxiv.org/abs/2004.07211.) The paper draws two
  samples for the two terms; here they are the rows at even and at odd
  positions of one sample without replacement, so give `rehearse` twice the
  size. They never share a row.

  Args:
    forward: gives logits [B, classes].
    criterion: of own rows and of labels remembered.
    alpha: strength of the logits; as for `der`.
    beta: strength of the labels.

  Raises:
    UsageError: for a strength below 0, and when traced with fewer than two
      remembered rows.
  """
  check_number('der_plus_plus alpha', alpha)
  check_number('der_plus_plus beta', beta)

  def loss_fn(params, model_state, batch, rng):
    own, past, model_state = _run(forward, params, model_state, batch, rng)
    if len(past.weight) < 2:
      raise UsageError(
        f'DER++ splits {len(past.weight)} remembered rows into two halves; '
        'give rehearse a size of at least 2'
      )
    loss, aux = _own_loss(criterion, own, model_state)
    even, odd = (jax.tree.map(lambda x, k=k: x[k::2], past) for k in range(2))
    kept = _distance(even)
    replayed = _mean(criterion(odd.outputs, odd.batch)[0], odd.weight)
    aux = _with(aux, loss, distillation=kept, replayed=replayed)
    return loss + alpha * kept + beta * replayed, aux

  return loss_fn


def er_ace(forward: Forward, criterion: Criterion) -> LossFn:
  """Asymmetric cross entropy: new classes do not push old ones away.

    L = mean_own criterion over the classes of the batch
        + mean_memory criterion

  (Caccia et al. 2022, https://arxiv.org/abs/2104.05025.) The own rows'
  softmax is over the classes present in the batch; other logits get no
  gradient from them. Remembered rows compete among all classes, or among the
  `allowed` ones if the criterion is `masked`.

  Args:
    forward: gives logits [B, classes].
    criterion: of logits and an integer `label`.

  Raises:
    UsageError: when traced with labels that are distributions.
  """
  asymmetric = masked(criterion)

  def loss_fn(params, model_state, batch, rng):
    own, past, model_state = _run(forward, params, model_state, batch, rng)
    present = _present(own.batch['label'], own.weight, own.outputs)
    current = own._replace(batch={**own.batch, 'allowed': present})
    loss, aux = _own_loss(asymmetric, current, model_state)
    replayed = _mean(criterion(past.outputs, past.batch)[0], past.weight)
    return loss + replayed, _with(aux, loss, replayed=replayed)

  return loss_fn


def today(mix: Mix) -> Mix:
  """Remembered rows may answer what the batch's may, not what they once did.

  For streams whose batches have one `allowed` for all rows (the classes seen
  so far). The memory need not hold that key.

  Args:
    mix: `fmeta.append` or `fmeta.beside`.

  Raises:
    UsageError: when traced with a batch that has no `allowed`.
  """

  def mixed(batch, rows, valid):
    if 'allowed' not in batch:
      raise UsageError(
        f"the batch has no 'allowed' for `today` to repeat; it has "
        f'{sorted(batch)}: see fmeta.stream.with_allowed, or leave `today` out'
      )
    now = batch['allowed'][0]
    allowed = jnp.broadcast_to(now, (*valid.shape, len(now)))
    return mix(batch, {**rows, 'allowed': allowed}, valid)

  return mixed


def _run(forward, params, model_state, batch, rng) -> tuple[Part, Part, Any]:
  own, rows = apart(batch)
  if not rows:
    raise UsageError(
      "the batch has no 'memory_*' keys; use "
      'rehearse(learner, memory, size, mix=fmeta.beside)'
    )
  valid = rows.pop('weight')
  together = append(own, rows, valid)
  outputs, model_state = forward(params, model_state, together, rng)
  size = len(together['weight']) - len(valid)
  first = jax.tree.map(lambda x: x[:size], (together['weight'], outputs))
  last = jax.tree.map(lambda x: x[size:], outputs)
  return Part(own, *first), Part(rows, valid, last), model_state


def _own_loss(criterion, own: Part, model_state) -> tuple[Array, Aux]:
  losses, metrics = criterion(own.outputs, own.batch)
  means = {key: _mean(value, own.weight) for key, value in metrics.items()}
  aux = Aux(model_state, means, own.weight.sum(), own.outputs)
  return _mean(losses, own.weight), aux


def _with(aux: Aux, own_loss: Array, **terms: Array) -> Aux:
  return aux._replace(metrics={**aux.metrics, 'own_loss': own_loss, **terms})


def _mean(values: Array, weight: Array) -> Array:
  """Weighted mean; zero, with a zero gradient, where nothing has weight."""
  chex.assert_equal_shape([values, weight])
  total = weight.sum()
  return jnp.sum(values * weight) / jnp.where(total > 0, total, 1)


def _distance(past: Part) -> Array:
  if 'outputs' not in past.batch:
    raise UsageError(
      "the memory holds no 'outputs'; add them to its spec: one row of the "
      "model's logits"
    )
  stored = past.batch['outputs']
  if past.outputs.shape != stored.shape:
    raise UsageError(
      f'the memory holds outputs of shape {stored.shape[1:]} per row, the '
      f'model gives {past.outputs.shape[1:]}; correct the spec of the memory'
    )
  squared = (past.outputs - stored) ** 2
  allowed = past.batch.get('allowed')
  if allowed is None:
    return _mean(squared.mean(-1), past.weight)
  chex.assert_equal_shape([squared, allowed])
  count = jnp.maximum(allowed.sum(-1), 1)
  return _mean(jnp.where(allowed, squared, 0).sum(-1) / count, past.weight)


def _present(label: Array, weight: Array, outputs: Array) -> Array:
  """bool [B, classes]: the classes of rows that have weight."""
  if not jnp.issubdtype(label.dtype, jnp.integer):
    raise UsageError(
      f'er_ace got labels of {label.dtype}; give classes as integers'
    )
  member = jax.nn.one_hot(label, outputs.shape[-1], dtype=jnp.float32)
  there = (member * (weight > 0)[:, None]).max(0) > 0
  # A row without weight keeps its own class: its loss stays finite.
  return there[None] | (member > 0)
