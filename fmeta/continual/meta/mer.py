"""MER: Reptile within a replayed batch and, around it, across batches."""

import jax
import jax.numpy as jnp

from fmeta import optim
from fmeta.errors import UsageError
from fmeta.learner import finetune, rehearse
from fmeta.meta import reptile_loss
from fmeta.types import Batch, Learner, LossFn, Memory, Scalar, Tuning


def mer(
  loss_fn: LossFn,
  memory: Memory,
  *,
  num_batches: int,
  size: int,
  rate: Scalar,
  within: Scalar,
  across: Scalar,
  tuning: Tuning | None = None,
) -> Learner:
  """Meta-experience replay: one example of a stream at a time.

  s batches of k rows each, k - 1 remembered and the new one, in which

    p_{i,j} = p_{i,j-1} - rate grad loss(p_{i,j-1}; row j of batch i),
    p_{i+1,0} = p_{i,0} + within (p_{i,k} - p_{i,0}),
    p <- p + across (p_{s+1,0} - p)

  and then the new row is offered to the memory (Riemer et al. 2019,
  https://arxiv.org/abs/1810.11910, algorithm 1). Both interpolations are a
  gradient step on `reptile_loss`, one inside the other. Each batch is a draw
  of its own; the new row is its last, and while the memory has fewer than
  k - 1 rows a batch is shorter.

  Args:
    loss_fn: of the model; respects the rows' `weight`.
    memory: `reservoir(...)` in the paper.
    num_batches: s.
    size: k, at least 2.
    rate: alpha, of the steps on single rows.
    within: beta.
    across: gamma.
    tuning: what moves; everything by default. Leaves that it adds must be
      among the parameters already.

  Returns:
    A learner of batches of one row.

  Raises:
    UsageError: if a batch has no remembered row, there is no batch, or in the
      step, if there is more than one new row.
  """
  if num_batches < 1 or size < 2:
    raise UsageError(
      f'{num_batches} batches of {size} rows; give at least 1 batch of 2 rows, '
      'one of them remembered'
    )
  inner = finetune(loss_fn, optim.sgd(rate), tuning=tuning)
  batch = reptile_loss(inner, size, batch_size=1)
  middle = finetune(batch, optim.sgd(within), tuning=tuning)
  batches = reptile_loss(middle, num_batches, batch_size=1)
  outer = finetune(batches, optim.sgd(across), tuning=tuning)
  drawn = _drawn_apart(memory, num_batches)
  return rehearse(outer, drawn, size - 1, mix=_with_new_row(num_batches))


def _drawn_apart(memory: Memory, num: int) -> Memory:
  """A memory whose sample is `num` independent draws, one after the other."""

  def sample(held, size, rng):
    keys = jax.random.split(rng, num)
    drawn = jax.vmap(lambda key: memory.sample(held, size, key))(keys)
    return jax.tree.map(lambda x: x.reshape(num * size, *x.shape[2:]), drawn)

  return memory._replace(sample=sample)


def _with_new_row(num: int):
  """`mix` for `rehearse`: `num` batches, each ending with the new row."""

  def mix(batch: Batch, rows: Batch, valid: jax.Array) -> Batch:
    new = {k: v for k, v in batch.items() if k != 'weight'}
    missing = sorted(set(new) - set(rows))
    count = jax.tree.leaves(batch)[0].shape[0]
    if missing:
      raise UsageError(
        f'the memory does not hold {missing[0]!r} of the batch; it holds '
        f'{sorted(rows)}: add it to the spec of the memory'
      )
    if count != 1:
      raise UsageError(f'mer learns one row at a time, not {count}; give one')

    def joined(held, own):
      held = held.reshape(num, -1, *held.shape[1:])
      own = jnp.broadcast_to(own[None], (num, *own.shape))
      return jnp.concatenate([held, own.astype(held.dtype)], axis=1)

    parts = {key: joined(rows[key], value) for key, value in new.items()}
    weight = batch.get('weight', jnp.ones(1, valid.dtype))
    parts['weight'] = joined(valid, weight)
    # An axis of one task for the outer Reptile; the inner one takes a batch
    # as a task of its own.
    return {'support': {'support': jax.tree.map(lambda x: x[None], parts)}}

  return mix
