"""EASE: each task trains an adapter of its own on the frozen model.

Zhou et al. 2024 (https://arxiv.org/abs/2403.12030). At a task's end its
adapter goes into a bank among the frozen leaves, its rows are summed by class
in all subspaces so far, and a fresh adapter is born:

  embed = models.forward(module, method='embed')
  loss = supervised(cosine_classifier(embed, 20.0), masked(cross_entropy))
  inner = finetune(loss, adam(1e-3), tuning=bottleneck(..., also=('head/.*',)))
  learner = ease(inner, embed, tasks=10, num_classes=100, dim=384)
  fitted = train.fit(learner, ..., [Stage(..., remember=rows_of_the_task)])
  logits, _ = ease_forward(embed)(fitted.params, {}, batch, None)

The bank is a part of the parameters, under `ease`, so that whoever is given
the parameters can answer.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from fmeta import tree
from fmeta.continual.ease import bank as banks
from fmeta.continual.ease.prototypes import completed, ensemble, means
from fmeta.continual.streaming.sums import class_sums
from fmeta.errors import UsageError
from fmeta.penalty.leaves import own
from fmeta.retune import carried_slots
from fmeta.types import (
  Array,
  Batch,
  Forward,
  Learner,
  Params,
  Scalar,
  TrainState,
)

# Folded into the key of a task's end, hence a number that no penalty has.
BIRTH = 2**32 - 1


def ease(
  learner: Learner,
  embed: Forward,
  *,
  tasks: int,
  num_classes: int,
  dim: int,
  head: str = 'head',
) -> Learner:
  """The same learner, whose adapters are kept and renewed at each task's end.

  Every task begins as the first one did: adapters are born again, the other
  trainable leaves, the head among them, and the model state are those of the
  start, and so are the optimiser's slots (a schedule's own count goes on).
  Train with `continual.masked`, so that the head tells apart the classes of the
  task; `ease_forward`, which answers, does not read it.

  What a penalty remembers of an adapter it holds the next one to, which no
  paper asks for. Inside an episode, where frozen leaves are constants, there is
  no place for a bank.

  A task's end runs the model on each of its rows in each subspace so far; give
  it all rows of the task, once. The bank has `tasks` times the trainable leaves
  without the head, and tasks * classes * dim sums.

  Args:
    learner: trains the adapters. Its tuning is one whose leaves the model
      enters (`bottleneck`, `prefix`, `prompt`) or has by itself (`select`,
      `bitfit`). The paper's adapter stands beside the MLP of each block, with
      a ReLU; `bottleneck` behind it, with a gelu.
    embed: gives features [B, dim]; it does not read the head.
    tasks: how many there is room for.
    num_classes: of the whole stream.
    dim: of the features.
    head: top-level key of the leaves that are not kept.

  Raises:
    UsageError: for fewer than one task; at `init`, for trainable leaves that
      are merged into others (LoRA) or lie in the head alone; at a task's end,
      without rows, for one task too many (not where the state is traced), or
      for features of another shape.
  """
  if tasks < 1:
    raise UsageError(f'ease over {tasks} tasks; give at least 1')
  no_rows, add_rows = class_sums(num_classes, dim)

  def init(params, rng, model_state=None):
    base = banks.without(params)
    state = learner.init(base, rng, model_state)
    names = set(tree.names(base))
    bank = banks.new_bank(
      _kept(learner, state, head),
      tree.partition(state.trainable, names.__contains__)[0],
      state.model_state,
      no_rows(),
      tasks,
    )
    if banks.KEY in params:  # It goes on, as `retune` wants it.
      bank = {key: params[banks.KEY].get(key, {}) for key in bank}
    return banks.with_bank(state, bank)

  def step(state, batch, rng):
    after, aux = learner.step(banks.bare(state), batch, rng)
    return banks.with_bank(after, state.frozen[banks.KEY]), aux

  @contextmanager
  def using(state) -> Iterator[Params]:
    with learner.using(banks.bare(state)) as params:
      yield {**params, banks.KEY: state.frozen[banks.KEY]}

  @jax.jit
  def add(summed, params, batch):
    features = banks.subspaces(embed, params, batch)
    if features.shape[2:] != (dim,):
      raise UsageError(
        f'features of shape {features.shape[1:]}; ease was told dim={dim}'
      )
    given = batch['label'], batch.get('weight')
    return jax.vmap(add_rows, (0, 0, None, None))(summed, features, *given)

  def remembered(bank, params, batches):
    summed = {'sum': bank['sum'], 'count': jnp.zeros_like(bank['rows'])}
    for batch in batches:
      summed = add(summed, {**params, banks.KEY: bank}, dict(batch))
    # The same rows were counted in every subspace.
    rows = bank['rows'].at[bank['done'] - 1].set(summed['count'][0])
    return {**bank, 'sum': summed['sum'], 'rows': rows}

  def begin_task(state, *given):
    after = learner.begin_task(banks.bare(state), *given)
    return banks.with_bank(after, state.frozen[banks.KEY])

  def end_task(state, forward, batches, rng):
    bank = state.frozen[banks.KEY]
    _check_end(bank, batches)
    state = learner.end_task(banks.bare(state), forward, batches, rng)
    kept = _kept(learner, state, head)
    bank = banks.banked(bank, kept, state.model_state)
    bank = remembered(bank, learner.params(state), batches)
    return banks.with_bank(_reborn(learner, state, bank, rng), bank)

  return Learner(
    init=init,
    step=step,
    params=lambda state: {
      **learner.params(banks.bare(state)),
      banks.KEY: state.frozen[banks.KEY],
    },
    using=using,
    end_task=end_task,
    gradient=lambda state, *given: learner.gradient(banks.bare(state), *given),
    begin_task=begin_task,
  )


def ease_forward(
  embed: Forward, alpha: Scalar = 0.1, temperature: Scalar = 1.0
) -> Forward:
  """Logits of all classes from all banked adapters, [B, classes].

  See `ensemble` for the logits and `completed` for the prototypes; classes
  that no ended task had get -inf. The adapter that is being trained does not
  answer before its task has ended.

  The released code differs from the paper's equations in three ways (read, not
  run): alpha is divided by the number of earlier tasks; with `recalc_sim` the
  missing prototypes are synthesised anew with the classes of all later tasks;
  with `use_init_ptm` the model without an adapter is one more subspace.

  Args:
    embed: that of `ease`.
    alpha: weight of the subspaces of other tasks; 0.1 as in the paper
      (section 4.3). May be traced.
    temperature: see `complement`.

  Raises:
    UsageError: for parameters without a bank.
  """

  def run(params, model_state, batch, rng):
    del rng
    bank = banks.of(params)
    rows = bank['rows']
    features = banks.subspaces(embed, params, batch)
    prototypes = completed(means(bank['sum'], rows), rows, temperature)
    return ensemble(features, prototypes, rows, alpha), model_state

  return run


def _kept(learner: Learner, state: TrainState, head: str) -> Params:
  """The trainable leaves without the head, as they stand in the parameters."""
  params = set(tree.names(learner.params(state)))
  for name in tree.names(state.trainable):
    if name not in params:
      raise UsageError(
        f'{name!r} is merged into another parameter, where one bank cannot '
        'keep it; give the learner bottleneck(...), prefix(...), prompt(...) '
        'or select(...)'
      )
  kept = {k: v for k, v in state.trainable.items() if k != head}
  if not kept:
    raise UsageError(
      f'only {head!r} is trainable, so all subspaces are one; give the learner '
      'an adapter, or take continual.streaming.simple_cil'
    )
  return kept


def _check_end(bank: Mapping[str, Any], batches: Sequence[Batch]) -> None:
  if not len(batches):
    raise UsageError(
      'ease needs the rows of the task that ends: Stage(..., remember=batches)'
    )
  tasks, done = len(bank['rows']), bank['done']
  if not isinstance(done, Tracer) and done >= tasks:
    raise UsageError(
      f'ease has room for tasks={tasks}, all of which have ended; give more'
    )


def _reborn(
  learner: Learner, state: TrainState, bank: Mapping[str, Any], rng: Array
) -> TrainState:
  """The state of a task that begins."""
  start = banks.start_of(bank, state.frozen)
  rng = jax.random.fold_in(rng, BIRTH)
  # Copied: the start stays in the bank, and `fit` donates what moves.
  fresh = learner.init(start, rng, bank['start_state'])
  return state.replace(
    trainable=own(fresh.trainable),
    opt_state=carried_slots(state.opt_state, set(), fresh),
    model_state=own(fresh.model_state),
  )
