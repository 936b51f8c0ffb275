"""Where a task's inner loop starts, if not at the outer parameters."""

import jax.numpy as jnp

from fmeta.baselines import class_means
from fmeta.errors import UsageError
from fmeta.fewshot.episode_losses import Start
from fmeta.types import Forward

# The bias of a class without support rows: finite, so that a decay of zero
# times it is zero, and far enough that its probability is exactly zero.
NEVER = -1e9


def prototype_start(embed: Forward, ways: int, head: str = 'head') -> Start:
  """Proto-MAML: a linear head that begins as a prototypical network.

    w_k = 2 c_k,   b_k = -|c_k|^2

  so that w_k q + b_k = |q|^2 - |q - c_k|^2, and |q|^2 is the same for all
  classes (Triantafillou et al. 2020, https://arxiv.org/abs/1903.03096,
  section 3). Give it to `starting_from`; the gradient runs through the
  prototypes.

  Args:
    embed: gives what the head reads, [B, D].
    ways: columns of the head. Classes without support rows get probability 0.
    head: the outer parameters' key for the head, `{'kernel', 'bias'}`; one
      that is there is replaced.
  """

  def start(params, model_state, support, rng):
    known, _ = embed(params, model_state, support, rng)
    means, counts = class_means(
      known, support['label'], ways, support.get('weight')
    )
    bias = jnp.where(counts > 0, -(means**2).sum(-1), NEVER)
    return {**params, head: {'kernel': 2 * means.T, 'bias': bias}}

  return start


def of_model(start: Start) -> Start:
  """The start of `params['model']`; `hyper` stays as it is.

  For inner loops with learned hyper-parameters: Proto-MAML with MAML++'s rates
  is `starting_from(of_model(prototype_start(...)), multi_step_loss(...))`.

  Args:
    start: of the model's parameters alone.
  """

  def begin(params, model_state, support, rng):
    begun = start(params['model'], model_state, support, rng)
    return {**params, 'model': begun}

  return begin


def context_start(size: int) -> Start:
  """CAVIA: context parameters that are zero at the start of every task.

  (Zintgraf et al. 2019, https://arxiv.org/abs/1810.03642, section 3.1: at
  zero they add nothing, and what there is to meta-learn of them the weights
  that read them can.) Give it to `starting_from`, with an inner learner of
  `tuning=select('context/.*')` on a model that is `with_context`.

  Args:
    size: how many.

  Raises:
    UsageError: if `size` is not positive.
  """
  if size < 1:
    raise UsageError(f'{size} context parameters; give at least 1')

  def start(params, model_state, support, rng):
    del model_state, support, rng
    return {**params, 'context': {'vector': jnp.zeros(size)}}

  return start


def with_context(forward: Forward, inputs: str = 'x') -> Forward:
  """A model that reads its task's context beside each input.

    f(x; phi, theta) = f([x, phi]; theta)

  (Zintgraf et al. 2019, eq. 3, for fully connected networks.) The wrapped
  model's first layer has `size` inputs more than `x` has.

  Args:
    forward: reads `batch[inputs]` [B, D + size].
    inputs: the batch's key.
  """

  def run(params, model_state, batch, rng):
    if 'context' not in params:
      raise UsageError(
        f'no parameter context/vector among {sorted(params)}; wrap the loss '
        'in starting_from(context_start(size), ...)'
      )
    x = batch[inputs]
    vector = params['context']['vector'].astype(x.dtype)
    rows = jnp.broadcast_to(vector[None], (len(x), len(vector)))
    model = {k: v for k, v in params.items() if k != 'context'}
    wide = {**batch, inputs: jnp.concatenate([x, rows], axis=1)}
    return forward(model, model_state, wide, rng)

  return run
