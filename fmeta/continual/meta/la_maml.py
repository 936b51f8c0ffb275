"""La-MAML: look ahead along the stream, at a learned rate per weight.

Outer parameters are `{'model': weights, 'hyper': a rate for each}`. One step
of the one update rule takes the gradient of both at once; what the paper adds
is an order, rates first, which is an outer optimiser (`rates_first`).
"""

import re

import jax
import jax.numpy as jnp
import optax

from fmeta import optim, tree
from fmeta.continual.beside import apart
from fmeta.errors import UsageError
from fmeta.learner import finetune, rehearse
from fmeta.memory import append, beside
from fmeta.meta import Inner, episode_loss
from fmeta.types import Learner, LossFn, Memory, Params, Scalar


def la_maml_init(params: Params, rate: float) -> Params:
  """Outer parameters: the weights and a rate for each.

  Args:
    params: of the model.
    rate: where all rates start.
  """
  rates = jax.tree.map(lambda x: jnp.full_like(x, rate), params)
  return {'model': params, 'hyper': rates}


def rates_first(rate: Scalar) -> optax.GradientTransformation:
  """The rates move first, and the weights move at the rates that result.

    a' = a - rate g_a,   p' = p - max(0, a') g_p

  with both gradients taken at (p, a) (Gupta et al. 2020,
  https://arxiv.org/abs/2007.13904, algorithm 1). A rate below zero holds its
  weight still and may come back.

  Args:
    rate: of the rates; may be traced.

  Raises:
    UsageError: at `init`, unless there is one rate for each weight.
  """

  def init(params):
    _check_paired(params)
    return optax.EmptyState()

  def update(updates, state, params=None):
    if params is None:
      raise UsageError('rates_first moves weights at their rates; give params')
    moved = jax.tree.map(lambda g: -rate * g, updates['hyper'])
    rates = jax.tree.map(jnp.add, params['hyper'], moved)
    weights = jax.tree.map(
      lambda a, g: -jnp.maximum(a, 0) * g, rates, updates['model']
    )
    return {'model': weights, 'hyper': moved}, state

  return optax.GradientTransformation(init, update)


def _check_paired(params: Params) -> None:
  def shapes(part):
    return jax.tree.map(jnp.shape, params.get(part))

  paired = set(params) == {'model', 'hyper'}
  if not paired or shapes('model') != shapes('hyper'):
    raise UsageError(
      f'outer parameters {sorted(params)} are no weights with a rate each; '
      'make them with la_maml_init'
    )


def lookahead_loss(inner: Inner, loss_fn: LossFn) -> LossFn:
  """The loss after a step on each new row, on new and remembered ones.

    p_0 = p,  p_{j+1} = p_j - a * grad loss(p_j; b_j),
    L(p, a) = loss(p_k; b and the remembered rows)

  with b the batch of k new rows, in their order.

  Args:
    inner: as for `episode_loss`.
    loss_fn: of the model; respects the rows' `weight`.

  Returns:
    A `LossFn` of a plain batch with `memory_*` keys, as `rehearse(...,
    mix=beside)` makes it; without them the new rows are all there is. Its
    outputs are those of the new rows, after the steps.
  """

  def loss(params, model_state, batch, rng):
    own, held = apart(batch)
    rows = jax.tree.leaves(own)[0].shape[0]
    episode = {'support': own, 'query': _with_remembered(own, held)}
    episode = jax.tree.map(lambda x: x[None], episode)
    ahead = episode_loss(inner, loss_fn, rows, batch_size=1)
    value, aux = ahead(params, model_state, episode, rng)
    outputs = jax.tree.map(lambda x: x[0, :rows], aux.outputs)
    return value, aux._replace(outputs=outputs)

  return loss


def _with_remembered(own, held):
  if not held:
    return own
  return append(own, held, held.pop('weight'))


def la_maml(
  loss_fn: LossFn, memory: Memory, size: int, rate_of_rates: Scalar
) -> Learner:
  """Meta-learning along a stream in one pass: weights and their rates.

  For each batch of the stream: draw `size` remembered rows, take a step on
  each new row at the rates as they are, then move the rates and the weights
  by `rates_first` against the loss of new and remembered rows together, and
  put the new rows into the memory (Gupta et al. 2020,
  https://arxiv.org/abs/2007.13904, algorithm 1).

    learner = la_maml(loss, reservoir(200, spec), 10, 0.3)
    state = learner.init(la_maml_init(params, 0.1), key)

  The weights are `learner.params(state)['model']`.

  Args:
    loss_fn: of the model; respects the rows' `weight`.
    memory: for example `reservoir(...)`.
    size: remembered rows per step.
    rate_of_rates: may be traced.
  """

  def inner(rates):
    names = tree.names(rates)
    own = tuple((re.escape(name), tree.get(rates, name)) for name in names)
    return finetune(loss_fn, optim.sgd(1.0, multipliers=own))

  outer = finetune(lookahead_loss(inner, loss_fn), rates_first(rate_of_rates))
  return rehearse(outer, memory, size, mix=beside)
