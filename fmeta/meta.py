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
import optax

from fmeta import tree
from fmeta.errors import UsageError
from fmeta.learner import adapt, finetune
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
  """`vmap` over `size` tasks at a time, one chunk after the other."""

  def over(fun):
    return lambda *args: jax.lax.map(lambda xs: fun(*xs), args, batch_size=size)

  return over


def _split_hyper(inner: Inner, params: Params) -> tuple[Learner, Params]:
  """The inner learner and where it starts; `hyper` is part of `params`."""
  if isinstance(inner, Learner):
    return inner, params
  return inner(params['hyper']), params['model']


def _adapted(inner, num_steps, params, model_state, support, rng):
  learner, start = _split_hyper(inner, params)
  # One key for all episodes: what a tuning adds is born the same everywhere.
  state = learner.init(start, jax.random.key(INIT), model_state)
  rng = jax.random.fold_in(rng, ADAPT)
  state, _ = adapt(learner, state, lambda _: support, rng, num_steps=num_steps)
  return learner, state


def _per_task(fun: Callable, over: Over, episodes: Mapping, rng: Array | None):
  """Runs `fun(episode, key)` over the leading task axis of `episodes`.

  Without a key (evaluation) every task adapts with one fixed key.
  """
  tasks = jax.tree.leaves(episodes)[0].shape[0]
  root = jax.random.key(ADAPT) if rng is None else rng
  keys = jax.vmap(functools.partial(jax.random.fold_in, root))(
    jnp.arange(tasks)
  )
  return over(fun)(episodes, keys)


def episode_loss(
  inner: Inner, loss_fn: LossFn, num_steps: int, *, over: Over = jax.vmap
) -> LossFn:
  """The query loss after adaptation, as a loss of the initial parameters.

    L(p) = mean_task loss(adapt(p, support), query)

  Differentiating it is second-order MAML (Finn et al. 2017,
  https://arxiv.org/abs/1703.03400, eq. 1); an inner learner built with
  `value_and_grad=first_order()` makes it FOMAML, one with
  `tuning=select('head/.*')` ANIL.

  Args:
    inner: a learner, or a function `hyper -> learner`; then the outer
      parameters are `{'model': ..., 'hyper': ...}` and hyper-parameters such
      as step sizes are meta-learned.
    loss_fn: the loss on the query set.
    num_steps: inner steps on the support set.
    over: how tasks are mapped: `jax.vmap` or `in_chunks(k)`.

  Returns:
    A `LossFn` whose batch is `{'support': batch, 'query': batch}` with a
    leading task axis everywhere; its unit of weight is a task and its outputs
    are the query outputs [tasks, ...]. Model state is an input only.
  """

  def loss(params, model_state, batch, rng):
    def one(episode, key):
      learner, state = _adapted(
        inner, num_steps, params, model_state, episode['support'], key
      )
      query_key = None if rng is None else jax.random.fold_in(key, QUERY)
      with learner.using(state) as adapted:
        value, aux = loss_fn(
          adapted, state.model_state, episode['query'], query_key
        )
      return value, dict(aux.metrics), aux.outputs

    values, metrics, outputs = _per_task(one, over, batch, rng)
    weight = jnp.asarray(values.shape[0], values.dtype)
    metrics = jax.tree.map(jnp.mean, metrics)
    return values.mean(), Aux(model_state, metrics, weight, outputs)

  return loss


def reptile_loss(
  inner: Inner, num_steps: int, *, over: Over = jax.vmap
) -> LossFn:
  """A loss whose gradient is Reptile's: initial minus adapted parameters.

    L(p) = mean_task 1/2 |p - stop_gradient(adapt(p, support))|^2

  (Nichol et al. 2018, https://arxiv.org/abs/1803.02999, eq. 28; with an SGD
  outer step of rate e it is their update p <- p + e (adapted - p).) Query
  sets are not used.
  """

  def loss(params, model_state, batch, rng):
    def one(support, key):
      _, state = _adapted(inner, num_steps, params, model_state, support, key)
      adapted = tree.combine(state.frozen, state.trainable)
      return jax.lax.stop_gradient(adapted)

    adapted = _per_task(one, over, batch['support'], rng)
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
    over: how tasks are mapped.
  """

  def predict(params, episodes, rng):
    def one(episode, key):
      learner, state = _adapted(
        inner, num_steps, params, model_state, episode['support'], key
      )
      with learner.using(state) as adapted:
        return forward(adapted, state.model_state, episode['query'], None)[0]

    return _per_task(one, over, episodes, rng)

  return predict


def check_meta_safe(
  optimizer: optax.GradientTransformation, *, num_steps: int = 8
) -> None:
  """Refuses an optimiser through which a meta-gradient is wrong.

  An inner loop is differentiated, and so is its optimiser. Some divide by a
  norm or take a root that has no derivative at an exactly zero gradient,
  which is common: LoRA's B = 0 gives A no gradient, and a zero head gives the
  body none. This measures it: `num_steps` updates are differentiated in
  float64 with respect to parameters and gradients, and compared with central
  differences (h = 1e-7, small beside the root of an `eps_root` of 1e-8), at a
  random point, at exactly zero gradients and at a zero parameter.

  Args:
    optimizer: closed over concrete numbers, not tracers.
    num_steps: updates; 8 reaches the second phase of RAdam.

  Raises:
    UsageError: naming the point and both numbers.
  """

  def loss_fn(params, model_state, batch, rng):
    terms = jax.tree.map(lambda p, g: jnp.sum(p * g), params, batch)
    value = sum(jax.tree.leaves(terms), jnp.zeros(()))
    return value, Aux(model_state, {}, jnp.ones(()))

  learner = finetune(loss_fn, optimizer)

  def moved(point, weights):
    params, grads = point
    # Gradients differ between steps, or Adam's would cancel.
    state, _ = adapt(
      learner,
      learner.init(params, jax.random.key(INIT)),
      lambda i: jax.tree.map(lambda g: g * (1 + 0.3 * jnp.cos(i)), grads),
      jax.random.key(ADAPT),
      num_steps=num_steps,
    )
    return optax.tree.vdot(
      weights, jax.tree.map(jnp.subtract, state.trainable, params)
    )

  with jax.enable_x64(True):
    # Reverse mode, as a meta-gradient is taken: where a norm is zero, forward
    # mode may be right and reverse mode NaN (`optax.clip_by_global_norm`).
    derivative = jax.jit(jax.value_and_grad(moved))
    for where, point, direction, weights in _probe_points():

      def at(h, point=point, direction=direction, weights=weights):
        near = jax.tree.map(lambda x, d: x + h * d, point, direction)
        return derivative(near, weights)

      value, grads = at(0.0)
      slope = float(jnp.asarray(optax.tree.vdot(grads, direction)))
      measured = float(at(1e-7)[0] - at(-1e-7)[0]) / 2e-7
      allowed = 1e-3 * (abs(measured) + abs(float(value))) + 1e-8
      if not abs(slope - measured) <= allowed:
        raise UsageError(
          f'this optimiser has a wrong derivative {where}: {slope:.3g} where '
          f'differences measure {measured:.3g}; in an inner loop use sgd '
          'without clipping, or adam with eps_root=1e-8'
        )


def _probe_points():
  keys = iter(jax.random.split(jax.random.key(0), 10))

  def draw():
    return {
      'a': jax.random.normal(next(keys), (3, 2), 'float64'),
      'b': jax.random.normal(next(keys), (2,), 'float64'),
    }

  params, grads, direction, weights = draw(), draw(), (draw(), draw()), draw()
  zero = jnp.zeros_like(params['b'])
  nothing = jax.tree.map(jnp.zeros_like, grads)
  for where, point in (
    ('at a random point', (params, grads)),
    ('where one gradient is exactly zero', (params, {**grads, 'b': zero})),
    ('where all gradients are exactly zero', (params, nothing)),
    ('where a parameter is zero', ({**params, 'b': zero}, grads)),
  ):
    yield where, point, direction, weights
