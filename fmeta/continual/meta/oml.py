"""OML: a representation that a head can be learned on, one example at a time.

The inner loop is a stream: `episode_loss` with `batch_size=1` and as many
steps as the support has rows. Everything else is a `Tuning` and a `Start`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from fmeta import optim, through
from fmeta.errors import UsageError
from fmeta.fewshot.episode_losses import Start, starting_from
from fmeta.learner import finetune
from fmeta.meta import Over, episode_loss
from fmeta.tuning import select
from fmeta.types import Array, Batch, Forward, LossFn, Params, Scalar

Draw = Callable[..., Array]  # (key, shape, dtype) -> array, as jax.nn's

# Folded into an episode's key; no task of a meta-batch has this number.
FRESH = 2**32 - 1


def fresh_classes(
  draw: Draw = jax.nn.initializers.he_normal(),  # noqa: B008, a pure function
  head: str = 'head',
) -> Start:
  """A head that has never seen the classes of the stream.

  The columns of the classes among the support's labels are drawn anew and
  their biases are zero; the other columns are the outer parameters'. So the
  outer loss cannot be lowered by what the head remembers of the stream's
  classes, and what the stream must not overwrite stays. (Javed & White 2019,
  https://arxiv.org/abs/1905.12588, algorithm 2, draw the whole prediction
  network anew for each stream.)

  Args:
    draw: an initialiser of `jax.nn.initializers`; `zeros` gives all classes of
      the stream the same logit.
    head: the key of `{'kernel': [D, classes], 'bias': [classes]}` among the
      parameters; the bias may be absent.

  Raises:
    UsageError: in the loss, if the parameters have no such head.
  """

  def start(params, model_state, support, rng):
    del model_state
    given = _head(params, head)
    kernel = given['kernel']
    key = jax.random.key(0) if rng is None else rng
    drawn = draw(jax.random.fold_in(key, FRESH), kernel.shape, kernel.dtype)
    fresh = _seen(support, kernel.shape[-1])
    begun = {'kernel': jnp.where(fresh[None], drawn, kernel)}
    if 'bias' in given:
      begun['bias'] = jnp.where(fresh, 0.0, given['bias'])
    return {**params, head: begun}

  return start


def _head(params: Params, head: str) -> Params:
  if 'kernel' not in params.get(head, {}):
    raise UsageError(
      f'no {head!r} with a kernel among the parameters {sorted(params)}; name '
      'the linear head with head='
    )
  return params[head]


def _seen(support: Batch, num_classes: int) -> Array:
  """bool [classes]: which ones rows of positive weight belong to."""
  label = support['label']
  real = support.get('weight', jnp.ones(label.shape)) > 0
  return jnp.zeros(num_classes, bool).at[label].max(real)


def oml_loss(
  loss_fn: LossFn,
  rate: Scalar,
  num_steps: int,
  *,
  moving: tuple[str, ...] = ('head/.*',),
  batch_size: int = 1,
  start: Start | None = None,
  over: Over = jax.vmap,
  through: through.Through = through.plain,
) -> LossFn:
  """The loss after learning a stream, one example after the other.

    w_0 = fresh,  w_j = w_{j-1} - rate grad_w loss(theta, w_{j-1}; stream_j),
    L(theta) = loss(theta, w_K; query)

  with w the fast weights (the head) and theta all others (Javed & White 2019,
  https://arxiv.org/abs/1905.12588, algorithm 2). The query holds the stream's
  own rows and a random sample of other classes, the remember set: the first
  alone says how well the stream was learned, the second what it has cost. It
  is `starting_from(fresh_classes(), episode_loss(finetune(loss_fn, sgd(rate),
  tuning=select('head/.*')), loss_fn, K, batch_size=1))`.

  Args:
    loss_fn: of the whole model; on the stream and on the query.
    rate: of the inner gradient descent; may be traced.
    num_steps: K, the rows of a stream over `batch_size`.
    moving: patterns of the fast weights.
    batch_size: rows per inner step.
    start: of each episode; `fresh_classes()` by default.
    over: how episodes are mapped.
    through: how the inner loop is differentiated.

  Returns:
    A `LossFn` of `{'support': streams, 'query': rows}` with a leading axis of
    episodes; labels number the classes of one head for all episodes.

  Raises:
    UsageError: if `batch_size` is not positive, or in the loss, if the streams
      do not have `num_steps` batches.
  """
  inner = finetune(loss_fn, optim.sgd(rate), tuning=select(*moving))
  once = episode_loss(
    inner, loss_fn, num_steps, batch_size=batch_size, through=through
  )
  begun = starting_from(start or fresh_classes(), once, over=over)

  def loss(params, model_state, batch, rng):
    _check_length(batch['support'], num_steps, batch_size)
    return begun(params, model_state, batch, rng)

  return loss


def _check_length(support: Batch, num_steps: int, batch_size: int) -> None:
  rows = jax.tree.leaves(support)[0].shape[1]
  if rows != num_steps * batch_size:
    raise UsageError(
      f'a stream of {rows} rows is not one pass of {num_steps} steps of '
      f'{batch_size}; give num_steps = rows / batch_size'
    )


def on_features(embed: Forward, loss_fn: LossFn, key: str = 'x') -> LossFn:
  """A loss of episodes whose slow network runs once on every row.

  Where the inner loop moves the head alone, features do not change along the
  stream: they are computed in one batch and the inner loop steps on them. The
  value and the gradient are those of the whole model in every step, for a
  network that treats rows one by one (no statistics of a batch) and draws
  nothing at random.

  Args:
    embed: the slow network, of all parameters: outputs [B, D].
    loss_fn: a loss of episodes of a model that reads `batch[key]`, such as
      `oml_loss` of a linear head; gets all parameters.
    key: under which features are put; other arrays stay but `embed`'s inputs
      need not.

  Returns:
    A `LossFn` of episodes of `embed`'s inputs.
  """

  def loss(params, model_state, batch, rng):
    def read(part):
      label = part['label']
      rows = jax.tree.map(lambda x: x.reshape(label.size, *x.shape[2:]), part)
      features, _ = embed(params, model_state, rows, rng)
      kept = {k: part[k] for k in ('label', 'weight') if k in part}
      return {**kept, key: features.reshape(*label.shape, -1)}

    read_batch = {name: read(batch[name]) for name in ('support', 'query')}
    return loss_fn(params, model_state, read_batch, rng)

  return loss
