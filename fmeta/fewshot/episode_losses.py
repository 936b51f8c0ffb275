"""Losses of episodes that need no inner loop, and starts for those that do.

`head_loss` makes a closed-form head an ordinary `LossFn`, so that

  finetune(head_loss(prototypes, embed, ways), adam(1e-3))

trains a prototypical network. `starting_from` wraps any loss of episodes, so
that each task begins where its own support set says.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from fmeta.fewshot.heads import Head, Learned
from fmeta.losses import Criterion, softmax_cross_entropy, supervised
from fmeta.meta import ADAPT, QUERY, Over, per_task, require_parts, with_hyper
from fmeta.types import (
  Array,
  Aux,
  Batch,
  Forward,
  LossFn,
  ModelState,
  Params,
)

# (params, model_state, support batch, rng) -> params of that task
Start = Callable[[Params, ModelState, Batch, Array | None], Params]
Predict = Callable[[Params, Batch, Array | None], Array]


def _split(head: Head | Learned, params: Params) -> tuple[Head, Params]:
  if not isinstance(head, Learned):
    return head, params
  hyper, model = with_hyper(params, 'a learned head')
  return head.head_of(hyper), model


def head_forward(head: Head | Learned, embed: Forward, ways: int) -> Forward:
  """A head as a `Forward` of queries that carry their support.

  Args:
    head: as for `head_loss`.
    embed: as for `head_loss`.
    ways: as for `head_loss`.

  Returns:
    A `Forward` of a batch of queries with one key more, `support`, the
    support's batch; see `beside_support`. Model state is an input only.
  """

  def forward(params, model_state, batch, rng):
    solve, model = _split(head, params)
    rngs = [None, None]
    if rng is not None:
      rngs = [jax.random.fold_in(rng, k) for k in (ADAPT, QUERY)]
    support = batch['support']
    known, _ = embed(model, model_state, support, rngs[0])
    asked, _ = embed(model, model_state, batch, rngs[1])
    weight = support.get('weight')
    return solve(known, support['label'], asked, ways, weight), model_state

  return forward


def beside_support(episode: Batch) -> Batch:
  """The episode with its support under one more key of its queries."""
  require_parts(episode)
  support = episode['support']
  return {**episode, 'query': {**episode['query'], 'support': support}}


def head_loss(
  head: Head | Learned,
  embed: Forward,
  ways: int,
  criterion: Criterion = softmax_cross_entropy,
  *,
  over: Over = jax.vmap,
) -> LossFn:
  """The query loss of a head that learns each task in closed form.

    L(p) = mean_task mean_query criterion(head(f_p(support), f_p(query)))

  With `prototypes` that is a prototypical network's objective (Snell et al.
  2017, https://arxiv.org/abs/1703.05175, algorithm 1), with
  `learned_ridge()` R2D2's.

  Args:
    head: from `fmeta.fewshot.heads`, or `Learned`; then the outer parameters
      are `{'model': ..., 'hyper': ...}`.
    embed: gives embeddings [B, D].
    ways: number of logits; of a task with fewer classes the rest is -inf.
    criterion: the loss per query.
    over: how tasks are mapped: `jax.vmap` or `in_chunks(k)`.

  Returns:
    A `LossFn` of `{'support', 'query'}` batches with a leading task axis;
    their optional `weight` is 0 for padding. Its unit of weight is a task and
    its outputs are the query logits [tasks, Q, ways]. Model state is an input
    only.
  """

  of_queries = supervised(head_forward(head, embed, ways), criterion)

  def loss(params, model_state, batch, rng):
    def one(query, key):
      key = None if rng is None else key
      value, aux = of_queries(params, model_state, query, key)
      return value, dict(aux.metrics), aux.outputs

    queries = beside_support(batch)['query']
    values, metrics, outputs = per_task(one, over, queries, rng)
    weight = jnp.asarray(values.shape[0], values.dtype)
    metrics = jax.tree.map(jnp.mean, metrics)
    return values.mean(), Aux(model_state, metrics, weight, outputs)

  return loss


def predict_head(
  head: Head | Learned,
  embed: Forward,
  ways: int,
  *,
  model_state: ModelState | None = None,
  over: Over = jax.vmap,
) -> Predict:
  """The head as the `predict_fn` of `evaluate_episodes`, in evaluation mode.

  Args:
    head: as for `head_loss`; another one than in training will do.
    embed: as for `head_loss`.
    ways: as for `head_loss`.
    model_state: of the encoder; none by default.
    over: how tasks are mapped.

  Returns:
    `(params, episodes, rng) -> logits [tasks, Q, ways]`.
  """
  state = {} if model_state is None else model_state
  forward = head_forward(head, embed, ways)

  def predict(params, episodes, rng):
    def one(query, key):
      del key
      return forward(params, state, query, None)[0]

    return per_task(one, over, beside_support(episodes)['query'], rng)

  return predict


def _alone(episode: Batch) -> Batch:
  return jax.tree.map(lambda x: x[None], episode)


def starting_from(
  start: Start, loss_fn: LossFn, *, over: Over = jax.vmap
) -> LossFn:
  """A loss of episodes in which each task chooses its own start.

    L(p) = mean_task loss(start(p, support_t), episode_t)

  The gradient runs through the start. With `prototype_start` and
  `episode_loss` this is Proto-MAML, with `context_start` CAVIA.

  Args:
    start: `(params, model_state, support, rng) -> params`; `rng` is None in
      evaluation.
    loss_fn: any loss of episodes with a leading task axis.
    over: how tasks are mapped.
  """

  def loss(params, model_state, batch, rng):
    require_parts(batch)

    def one(episode, key):
      key = None if rng is None else key
      begun = start(params, model_state, episode['support'], key)
      value, aux = loss_fn(begun, model_state, _alone(episode), key)
      outputs = jax.tree.map(lambda x: x[0], aux.outputs)
      return value, dict(aux.metrics), aux.weight, outputs

    values, metrics, weights, outputs = per_task(one, over, batch, rng)
    metrics = jax.tree.map(jnp.mean, metrics)
    return values.mean(), Aux(model_state, metrics, weights.sum(), outputs)

  return loss


def predict_from(
  start: Start,
  predict: Predict,
  *,
  model_state: ModelState | None = None,
  over: Over = jax.vmap,
) -> Predict:
  """`starting_from` for predictions: wraps what `predict_episodes` gives."""
  state = {} if model_state is None else model_state

  def predicted(params, episodes, rng):
    require_parts(episodes)

    def one(episode, key):
      begun = start(params, state, episode['support'], None)
      key = None if rng is None else key
      return predict(begun, _alone(episode), key)[0]

    return per_task(one, over, episodes, rng)

  return predicted
