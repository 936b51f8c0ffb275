"""The parts of MAML++ (Antoniou et al. 2019), each by itself.

https://arxiv.org/abs/1810.09502. Learned rates per layer and step are an
optimiser (`step_rates`), the multi-step loss is a loss of episodes that carry
its weights (`multi_step_loss`, `with_step_weights`), and norms whose scale and
bias depend on the step follow learned offsets (`step_offsets`). The other
parts need nothing new: derivative-order annealing is two stages, the first
with a learner of `value_and_grad=first_order()` (`train.Stage(...,
learner=...)`), and the cosine outer rate is `optim.warmup_cosine`. (The
paper's running statistics per step are collected and not used in the authors'
code: it normalises by the batch in training and in evaluation.)
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fmeta import tree
from fmeta.errors import UsageError, suggest
from fmeta.learner import adapt
from fmeta.meta import ADAPT, INIT, QUERY, Inner, Over, inner_learner, per_task
from fmeta.types import Array, Aux, Batch, LossFn, Params


class StepsState(NamedTuple):
  """How many steps have been taken."""

  count: Array


def step_rates(rates: Params) -> optax.GradientTransformation:
  """Gradient descent with a rate per leaf and inner step (LSLR).

    p_i <- p_i - rates_i[min(k, K - 1)] g_i   at step k

  (Antoniou et al. 2019, section 4.) Further steps, as at test time, use the
  last rate. To learn the rates, make the inner learner a function of them:
  `hyper -> finetune(loss, step_rates(hyper), tuning=...)`.

  Args:
    rates: a tree named like the trainable leaves, [K] each; may be traced.

  Raises:
    UsageError: at `init`, if a trainable leaf has no rates.
  """
  known = tree.names(rates)

  def rates_of(name):
    if name not in known:
      raise UsageError(
        f'no step rates for {name!r}; make them with step_rates_init on the '
        f'same tuning{suggest(name, known)}'
      )
    return tree.get(rates, name)

  def init(params):
    for name in tree.names(params):
      rates_of(name)
    return StepsState(jnp.zeros((), jnp.int32))

  def update(updates, state, params=None):
    del params

    def moved(name, grad):
      given = rates_of(name)
      return -given[jnp.minimum(state.count, len(given) - 1)] * grad

    moves = tree.map_with_name(moved, updates)
    return moves, StepsState(state.count + 1)

  return optax.GradientTransformation(init, update)


def step_rates_init(trainable: Params, num_steps: int, rate: float) -> Params:
  """Rates [num_steps] per leaf, all equal to `rate`.

  Args:
    trainable: what the inner loop moves, `tuning.init(params, key)[0]`.
    num_steps: inner steps of training.
    rate: where all rates start.

  Raises:
    UsageError: if there are no steps.
  """
  if num_steps < 1:
    raise UsageError(f'{num_steps} inner steps have no rates; give at least 1')
  return jax.tree.map(
    lambda leaf: jnp.full(num_steps, rate, leaf.dtype), trainable
  )


def step_offsets(offsets: Params) -> optax.GradientTransformation:
  """Leaves that follow a learned path in the inner loop, not a gradient.

    p_i after k steps = p_i + o_i[min(k, K)],   o_i[0] = 0

  With norms' scales and biases these are the parameters per step of Antoniou
  et al. 2019, section 4 (BNWB). It comes after what moves the other leaves,
  whose updates it lets through:

    optax.chain(step_rates(hyper['rates']), step_offsets(hyper['norms']))

  Args:
    offsets: a tree named like the leaves that follow, [K, ...] each: what has
      been added after step 1, ..., K; may be traced. Those of a leaf that the
      inner loop's tuning leaves out do nothing.
  """
  known = tree.names(offsets)

  def init(params):
    del params
    return StepsState(jnp.zeros((), jnp.int32))

  def update(updates, state, params=None):
    del params

    def moved(name, given):
      if name not in known:
        return given
      path = tree.get(offsets, name)
      path = jnp.concatenate([jnp.zeros_like(path[:1]), path])
      last = len(path) - 1
      at = jnp.minimum(jnp.stack([state.count, state.count + 1]), last)
      before, after = path[at]
      return after - before

    moves = tree.map_with_name(moved, updates)
    return moves, StepsState(state.count + 1)

  return optax.GradientTransformation(init, update)


def step_offsets_init(trainable: Params, num_steps: int) -> Params:
  """Zeros [num_steps, ...] per leaf.

  Args:
    trainable: the leaves that shall follow, and no others.
    num_steps: inner steps of training; later steps stay where the last was.

  Raises:
    UsageError: if there are no steps.
  """
  if num_steps < 1:
    raise UsageError(f'{num_steps} inner steps have no path; give at least 1')
  return jax.tree.map(
    lambda leaf: jnp.zeros((num_steps, *leaf.shape), leaf.dtype), trainable
  )


def annealed_weights(
  num_steps: int, iterations: int
) -> Callable[[int], np.ndarray]:
  """`iteration -> weights [num_steps]` from equal ones to the last step's.

    w_k = (1 - t) / K for k < K,   w_K = 1 - sum of the others,
    t = min(iteration / iterations, 1)

  (Antoniou et al. 2019, section 4; the paper says "anneal" and gives no rule:
  this one is linear and ends at MAML's loss.)

  Args:
    num_steps: K, inner steps.
    iterations: outer steps until only the last step counts.

  Raises:
    UsageError: if a number is not positive.
  """
  if num_steps < 1 or iterations < 1:
    raise UsageError(
      f'{num_steps} inner steps, {iterations} iterations; give at least 1'
    )

  def weights(iteration):
    others = max(1 - iteration / iterations, 0) / num_steps
    out = np.full(num_steps, others, np.float32)
    out[-1] = 1 - others * (num_steps - 1)
    return out

  return weights


def with_step_weights(
  episodes: Callable[[int], Any], weights: Callable[[int], np.ndarray]
) -> Callable[[int], Any]:
  """Meta-batches that carry `step_weight` [tasks, num_steps].

  What anneals over the run is data, a function of the meta-batch's index, so
  one compiled step serves all iterations and a resumed run continues exactly.

  Args:
    episodes: `i -> {'support', 'query'}` with a leading task axis.
    weights: `i -> [num_steps]`, for example `annealed_weights(...)`.
  """

  def source(i):
    batch = episodes(i)
    tasks = jax.tree.leaves(batch)[0].shape[0]
    return {**batch, 'step_weight': np.tile(weights(i), (tasks, 1))}

  return source


def multi_step_loss(
  inner: Inner, loss_fn: LossFn, num_steps: int, *, over: Over = jax.vmap
) -> LossFn:
  """MAML whose query loss is taken after every inner step.

    L(p) = mean_task sum_k w_k loss(p_k, query),   p_k after k steps

  (Antoniou et al. 2019, eq. 4.) With all weight on the last step it is
  `episode_loss`.

  Args:
    inner: as for `episode_loss`.
    loss_fn: the loss on the query set.
    num_steps: inner steps on the support set, at least 1.
    over: how tasks are mapped.

  Returns:
    A `LossFn` of `{'support', 'query', 'step_weight'}` with a leading task
    axis, see `with_step_weights`; metrics and outputs are those after the
    last step.

  Raises:
    UsageError: if there are no steps, or in the trace when `step_weight` does
      not fit.
  """
  if num_steps < 1:
    raise UsageError('the multi-step loss needs an inner step; give at least 1')

  def loss(params, model_state, batch, rng):
    _check_step_weight(batch, num_steps)

    def one(episode, key):
      learner, start = inner_learner(inner, params)
      asked = None if rng is None else jax.random.fold_in(key, QUERY)

      def query(state, aux):
        del aux
        with learner.using(state) as adapted:
          value, after = loss_fn(
            adapted, state.model_state, episode['query'], asked
          )
        return value, dict(after.metrics), after.outputs

      _, (values, metrics, outputs) = adapt(
        learner,
        learner.init(start, jax.random.key(INIT), model_state),
        lambda _: episode['support'],
        jax.random.fold_in(key, ADAPT),
        num_steps=num_steps,
        every=query,
      )
      last = jax.tree.map(lambda x: x[-1], (metrics, outputs))
      weight = episode['step_weight'].astype(values.dtype)
      return jnp.sum(weight * values), *last

    values, metrics, outputs = per_task(one, over, batch, rng)
    weight = jnp.asarray(values.shape[0], values.dtype)
    metrics = jax.tree.map(jnp.mean, metrics)
    return values.mean(), Aux(model_state, metrics, weight, outputs)

  return loss


def _check_step_weight(batch: Batch, num_steps: int) -> None:
  given = jnp.shape(batch['step_weight']) if 'step_weight' in batch else None
  if given is None or given[1:] != (num_steps,):
    raise UsageError(
      f'step_weight {given} of a batch with {sorted(batch)}; {num_steps} inner '
      f'steps need [tasks, {num_steps}]: see with_step_weights'
    )
