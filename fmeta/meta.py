"""Meta-learning is a loss.

`episode_loss` adapts a learner to an episode's support set with the very
step that plain fine-tuning uses, and returns the loss on the query set as an
ordinary `LossFn` of the parameters it started from. Fine-tuning that loss is
MAML:

  finetune(episode_loss(finetune(loss, sgd(0.4)), loss, 5), adam(1e-3))
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from fmeta import through as ways
from fmeta import tree
from fmeta.errors import UsageError
from fmeta.learner import adapt
from fmeta.meta_safe import check_meta_safe as check_meta_safe
from fmeta.types import (
  Array,
  Aux,
  Batch,
  Forward,
  Learner,
  LossFn,
  ModelState,
  Params,
)

Inner = Learner | Callable[[Any], Learner]
Over = Callable[[Callable], Callable]

# Streams of randomness within one episode.
INIT, ADAPT, QUERY = range(3)


def in_chunks(size: int) -> Over:
  """`vmap` over `size` tasks at a time, one chunk after the other.

  Where `size` divides the tasks, a chunk's are equally far apart: with tasks
  split over the devices of a mesh each device has its share of every chunk, if
  their number divides `size`, and none waits or fetches.

  Raises:
    UsageError: if `size` is not positive.
  """

  if size < 1:
    raise UsageError(f'in_chunks({size}) maps no task; give at least 1')

  def over(fun):
    def run(*args):
      count = jax.tree.leaves(args)[0].shape[0]
      if count % size:
        return jax.lax.map(lambda xs: fun(*xs), args, batch_size=size)
      chunks = jax.tree.map(
        lambda x: x.reshape(size, -1, *x.shape[1:]).swapaxes(0, 1), args
      )
      outs = jax.lax.map(lambda xs: jax.vmap(fun)(*xs), chunks)
      return jax.tree.map(
        lambda x: x.swapaxes(0, 1).reshape(count, *x.shape[2:]), outs
      )

    return run

  return over


def with_hyper(params: Params, what: str) -> tuple[Any, Params]:
  """`hyper` and `model` of outer parameters that hold both.

  Args:
    params: outer parameters.
    what: needs them, for the message.

  Raises:
    UsageError: if one is missing.
  """
  missing = {'model', 'hyper'} - set(params)
  if missing:
    raise UsageError(
      f'{what} needs outer parameters {{"model", "hyper"}}, got '
      f'{sorted(params)}; give {{"model": the parameters, "hyper": what is '
      'learned beside them}'
    )
  return params['hyper'], params['model']


def inner_learner(inner: Inner, params: Params) -> tuple[Learner, Params]:
  """The inner learner and where it starts; `hyper` is part of `params`."""
  if isinstance(inner, Learner):
    return inner, params
  hyper, model = with_hyper(params, 'an inner learner of hyper-parameters')
  return inner(hyper), model


def _adapted(
  inner, num_steps, params, model_state, batches, rng, through=ways.plain
):
  learner, start = inner_learner(inner, params)
  # One key for all episodes: what a tuning adds is born the same everywhere.
  state = learner.init(start, jax.random.key(INIT), model_state)
  rng = jax.random.fold_in(rng, ADAPT)
  state, _ = adapt(
    learner,
    state,
    batches,
    rng,
    num_steps=num_steps,
    # A metric that is stacked is differentiated, too.
    every=lambda state, aux: None,
    through=through,
  )
  return learner, state


def require_parts(
  episodes: Mapping, parts: tuple[str, ...] = ('support', 'query')
) -> None:
  """Raises `UsageError` for a batch that is no meta-batch of episodes."""
  if not set(parts) <= set(episodes):
    raise UsageError(
      f'a batch of {sorted(episodes)} has no episodes; give {{"support": '
      'batch, "query": batch} with a leading task axis, as '
      'episodes.episodes(columns, ...) draws it'
    )


def num_tasks(episodes: Mapping) -> int:
  """The length of the leading axis, which all leaves share.

  Raises:
    UsageError: if they do not.
  """
  sizes = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(episodes)}
  if len(sizes) != 1 or sizes == {()}:
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(episodes)]
    raise UsageError(
      f'leaves of shapes {shapes} have no task axis in common; give [tasks, '
      'examples, ...] everywhere (a single task: [1, examples, ...])'
    )
  return sizes.pop()[0]


def per_task(fun: Callable, over: Over, episodes: Mapping, rng: Array | None):
  """Runs `fun(episode, key)` over the leading task axis of `episodes`.

  Without a key (evaluation) every task adapts with one fixed key.

  Raises:
    UsageError: if the leaves have no such axis in common.
  """
  tasks = num_tasks(episodes)
  root = jax.random.key(ADAPT) if rng is None else rng
  keys = jax.vmap(functools.partial(jax.random.fold_in, root))(
    jnp.arange(tasks)
  )
  return over(fun)(episodes, keys)


def episode_loss(
  inner: Inner,
  loss_fn: LossFn,
  num_steps: int,
  *,
  batch_size: int | None = None,
  over: Over = jax.vmap,
  through: ways.Through = ways.plain,
) -> LossFn:
  """The query loss after adaptation, as a loss of the initial parameters.

    L(p) = mean_task loss(adapt(p, support), query)

  Differentiating it is second-order MAML (Finn et al. 2017,
  https://arxiv.org/abs/1703.03400, eq. 1); an inner learner built with
  `value_and_grad=first_order()` makes it FOMAML, one with
  `tuning=select('head/.*')` ANIL. An inner optimiser without a derivative, such
  as Adam without `eps_root`, is refused once a gradient has to flow through it.

  Args:
    inner: a learner, or a function `hyper -> learner`; then the outer
      parameters are `{'model': ..., 'hyper': ...}` and hyper-parameters such
      as step sizes are meta-learned.
    loss_fn: the loss on the query set.
    num_steps: inner steps on the support set.
    batch_size: rows of the support per inner step, in turn; 1 makes the
      support a stream of single examples. None: all rows in every step.
    over: how tasks are mapped: `jax.vmap` or `in_chunks(k)`.
    through: how the inner loop is differentiated, one of `fmeta.through`.

  Returns:
    A `LossFn` whose batch is `{'support': batch, 'query': batch}` with a
    leading task axis everywhere; its unit of weight is a task and its outputs
    are the query outputs [tasks, ...]. Model state is an input only.

  Raises:
    UsageError: if `batch_size` is not positive.
  """
  _check_batch_size(batch_size)

  def loss(params, model_state, batch, rng):
    require_parts(batch)

    def one(episode, key):
      support = batches_of(episode['support'], batch_size)
      learner, state = _adapted(
        inner, num_steps, params, model_state, support, key, through
      )
      query_key = None if rng is None else jax.random.fold_in(key, QUERY)
      with learner.using(state) as adapted:
        value, aux = loss_fn(
          adapted, state.model_state, episode['query'], query_key
        )
      return value, dict(aux.metrics), aux.outputs

    values, metrics, outputs = per_task(one, over, batch, rng)
    weight = jnp.asarray(values.shape[0], values.dtype)
    metrics = jax.tree.map(jnp.mean, metrics)
    return values.mean(), Aux(model_state, metrics, weight, outputs)

  return loss


def batches_of(
  batch: Batch, batch_size: int | None
) -> Callable[[Array], Batch]:
  """`k -> batch` of the k-th inner step: rows in turn, or all of them."""
  _check_batch_size(batch_size)
  if batch_size is None:
    return lambda _: batch
  return _in_turn(batch, batch_size)


def _check_batch_size(batch_size: int | None) -> None:
  if batch_size is not None and batch_size < 1:
    raise UsageError(f'batch_size {batch_size} has no rows; give at least 1')


def _in_turn(batch: Batch, size: int) -> Callable[[Array], Batch]:
  """`k -> rows [size]`, one part after the other and then anew."""
  rows = jax.tree.leaves(batch)[0].shape[0]
  return lambda k: jax.tree.map(
    lambda x: x[(k * size + jnp.arange(size)) % rows], batch
  )


def reptile_loss(
  inner: Inner,
  num_steps: int,
  *,
  batch_size: int | None = None,
  over: Over = jax.vmap,
) -> LossFn:
  """A loss whose gradient is Reptile's: initial minus adapted parameters.

    L(p) = mean_task 1/2 |p - stop_gradient(adapt(p, support))|^2

  (Nichol et al. 2018, https://arxiv.org/abs/1803.02999, eq. 28; with an SGD
  outer step of rate e it is their update p <- p + e (adapted - p).) Query
  sets are not used.

  Args:
    inner: as for `episode_loss`, with any optimiser.
    num_steps: inner steps on the support set.
    batch_size: rows of the support per inner step, in turn, as what Reptile
      has of MAML comes from steps on different rows (their section 5.1). Any
      prefix of whole shots of an episode is balanced. None: all rows.
    over: how tasks are mapped.

  Raises:
    UsageError: if `batch_size` is not positive.
  """
  _check_batch_size(batch_size)

  def loss(params, model_state, batch, rng):
    require_parts(batch, ('support',))
    # Stopped where it starts: the adaptation is never differentiated, so any
    # inner optimiser will do.
    start = jax.lax.stop_gradient(params)

    def one(support, key):
      batches = batches_of(support, batch_size)
      _, state = _adapted(inner, num_steps, start, model_state, batches, key)
      return tree.combine(state.frozen, state.trainable)

    adapted = per_task(one, over, batch['support'], rng)
    model = params if isinstance(inner, Learner) else params['model']
    extra = sorted(set(tree.names(adapted)) - set(tree.names(model)))
    if extra:
      raise UsageError(
        f'{extra[0]!r} is no outer parameter, so reptile_loss cannot move it; '
        'put it there first, for example with lora_init'
      )
    distances = jax.tree.map(
      lambda p, q: 0.5 * jnp.sum((p[None] - q) ** 2) / q.shape[0],
      model,
      adapted,
    )
    value = sum(jax.tree.leaves(distances), jnp.zeros(()))
    tasks = jax.tree.leaves(adapted)[0].shape[0]
    return value, Aux(model_state, {}, jnp.asarray(tasks, value.dtype))

  return loss


def predict_episodes(
  inner: Inner,
  forward: Forward,
  num_steps: int,
  *,
  model_state: ModelState | None = None,
  batch_size: int | None = None,
  over: Over = jax.vmap,
) -> Callable[[Params, Batch, Array | None], Array]:
  """`(params, episodes, rng) -> query outputs [tasks, ...]`.

  Adapts to each support set, then runs the model on the query set in
  evaluation mode; `evaluate.evaluate_episodes` takes the result.

  Args:
    inner: as for `episode_loss`; its step size and `num_steps` may differ
      from training's.
    forward: the model.
    num_steps: inner steps on the support set; 0 evaluates the start.
    model_state: where the inner learner starts; none by default. The query
      sees the state that the support left, so a norm with running averages
      normalises by support statistics.
    batch_size: as for `episode_loss`.
    over: how tasks are mapped.
  """
  _check_batch_size(batch_size)

  def predict(params, episodes, rng):
    require_parts(episodes)

    def one(episode, key):
      support = batches_of(episode['support'], batch_size)
      learner, state = _adapted(
        inner, num_steps, params, model_state, support, key
      )
      with learner.using(state) as adapted:
        return forward(adapted, state.model_state, episode['query'], None)[0]

    return per_task(one, over, episodes, rng)

  return predict
