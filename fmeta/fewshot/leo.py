"""LEO: a head is decoded from latents, and the latents adapt.

Rusu et al. 2019 (https://arxiv.org/abs/1807.05960). Two inner loops of the
one step follow each other: `leo_start` encodes the support, moves the latents
and decodes a linear head; `episode_loss` then moves that head.

  params = leo_init(key, features)             # {'model': ..., 'hyper': ...}
  finetune(leo_loss(embed, ways), adamw(...))  # adamw: their l2 penalty
"""

import jax
import jax.numpy as jnp

from fmeta.baselines import class_means
from fmeta.fewshot.episode_losses import (
  Predict,
  Start,
  predict_from,
  starting_from,
)
from fmeta.fewshot.heads import product
from fmeta.fewshot.starts import NEVER
from fmeta.learner import adapt, finetune
from fmeta.losses import softmax_cross_entropy, supervised
from fmeta.meta import Over, episode_loss, predict_episodes, with_hyper
from fmeta.optim import sgd
from fmeta.tuning import select
from fmeta.types import Array, Batch, Forward, Learner, LossFn, Params, Scalar

LAYERS = 3  # of the relation network, as in the authors' code
# Streams of randomness of a start.
EMBED, LATENT, STEPS, DECODE = range(1, 5)


def leo_init(
  rng: Array,
  features: int,
  latents: int = 64,
  *,
  latent_rate: float = 1.0,
  head_rate: float = 1e-3,
) -> Params:
  """Outer parameters of `leo_loss`; put those of the encoder into `model`.

  Args:
    rng: `jax.random.key`.
    features: D, of the embedding.
    latents: Z per class. It and the rates are the authors' code's.
    latent_rate: where the rates of latents start, one per latent.
    head_rate: where the rates of the head start, one per feature.
  """
  draw = jax.nn.initializers.glorot_uniform()
  keys = jax.random.split(rng, LAYERS + 2)
  relation = {
    f'layer_{k}': {'kernel': draw(keys[k], (2 * latents, 2 * latents))}
    for k in range(LAYERS)
  }
  model = {
    'encoder': {'kernel': draw(keys[-2], (features, latents))},
    'relation': relation,
    'decoder': {'kernel': draw(keys[-1], (latents, 2 * features))},
  }
  hyper = {
    # With a type: a weak one would be compiled for twice.
    'latent': jnp.full((1, latents), latent_rate, jnp.float32),
    'head': jnp.full((features, 1), head_rate, jnp.float32),
  }
  return {'model': model, 'hyper': hyper}


def _encoded(model: Params, rows: Array, support: Batch, ways: int):
  """(means, logarithms of deviations [ways, Z], which classes are there)."""
  codes = product(rows, model['encoder']['kernel'])
  shape = (len(codes), *codes.shape)
  pairs = jnp.concatenate(
    [
      jnp.broadcast_to(codes[:, None], shape),
      jnp.broadcast_to(codes[None], shape),
    ],
    axis=-1,
  )
  for k in range(LAYERS):
    pairs = product(pairs, model['relation'][f'layer_{k}']['kernel'])
    pairs = jax.nn.relu(pairs) if k + 1 < LAYERS else pairs
  weight = support.get('weight', jnp.ones(len(codes)))
  share = (weight / weight.sum()).astype(codes.dtype)
  means, counts = class_means(
    (pairs * share[None, :, None]).sum(1), support['label'], ways, weight
  )
  centre, deviation = jnp.split(means, 2, axis=-1)
  return centre, deviation, counts > 0


def _drawn(centre: Array, deviation: Array, key: Array | None) -> Array:
  """From N(centre, exp(deviation)^2); the centre without a key."""
  if key is None:
    return centre
  noise = jax.random.normal(key, centre.shape, centre.dtype)
  return centre + jnp.exp(deviation) * noise


def _decoded(params: Params, key: Array | None) -> Array:
  """The head's kernel [D, ways] from the latents."""
  latents = params['latent']['z']
  centre, deviation = jnp.split(
    product(latents, params['decoder']['kernel']), 2, axis=-1
  )
  # Glorot's deviation where the decoder says 0, as in the authors' code.
  offset = 0.5 * jnp.log(2 / sum(centre.shape))
  return _drawn(centre, deviation + offset, key).T


def _classifier(embed: Forward) -> Forward:
  """The decoded head on embeddings."""

  def forward(params, model_state, batch, rng):
    rows, model_state = embed(params, model_state, batch, rng)
    bias = params['latent']['bias']
    logits = product(rows, params['weights']['kernel'])
    return logits + bias[None], model_state

  return forward


def _of_latents(embed: Forward, noisy: bool) -> Forward:
  """The head that the latents decode to, anew in every call."""
  classify = _classifier(embed)

  def forward(params, model_state, batch, rng):
    keys = None, None
    if noisy:
      keys = [jax.random.fold_in(rng, k) for k in (EMBED, DECODE)]
    weights = {'kernel': _decoded(params, keys[1])}
    params = {**params, 'weights': weights}
    return classify(params, model_state, batch, keys[0])

  return forward


def leo_start(embed: Forward, ways: int, num_steps: int) -> Start:
  """Encodes the support, moves the latents, decodes the head.

    z_n ~ N(m_n, s_n^2),  (m_n, log s_n) = mean over the rows i of class n and
    all rows j of g([e x_i, e x_j])
    z <- z - a dL(w(z))/dz,   w_n ~ N(decoder(z_n))

  (Rusu et al. 2019, section 2.) Without a key (evaluation) all draws are their
  means. Unlike the authors' code there is one latent per class and not
  one per row, as in the paper, and deviations are exponentials, which have a
  derivative everywhere.

  Args:
    embed: gives embeddings [B, D] from the other parameters.
    ways: columns of the head; classes without support rows get probability 0.
    num_steps: of the latents.

  Returns:
    `{'model', 'hyper'}` with `weights/kernel` and `latent/...` in the model
    and the head's rates as `hyper`.
  """

  def start(params, model_state, support, rng):
    rates, model = with_hyper(params, 'LEO')
    keys = [None] * 4
    if rng is not None:
      streams = (EMBED, LATENT, STEPS, DECODE)
      keys = [jax.random.fold_in(rng, k) for k in streams]
    rows, _ = embed(model, model_state, support, keys[0])
    centre, deviation, there = _encoded(model, rows, support, ways)
    begun = _drawn(centre, deviation, keys[1])
    latent = {
      'z': begun,
      'start': begun,
      'centre': centre,
      'deviation': deviation,
      'bias': jnp.where(there, 0.0, NEVER).astype(begun.dtype),
    }
    forward = _of_latents(embed, noisy=rng is not None)
    learner = finetune(
      supervised(forward, softmax_cross_entropy),
      sgd(1.0, multipliers=(('.*', rates['latent']),)),
      tuning=select('latent/z'),
    )
    state, _ = adapt(
      learner,
      learner.init({**model, 'latent': latent}, jax.random.key(0), model_state),
      lambda _: support,
      jax.random.key(0) if keys[2] is None else keys[2],
      num_steps=num_steps,
    )
    model = learner.params(state)
    weights = {'kernel': _decoded(model, keys[3])}
    return {'model': {**model, 'weights': weights}, 'hyper': rates['head']}

  return start


def _head_learner(embed: Forward):
  """`rates -> learner` of the decoded head."""

  def inner(rates) -> Learner:
    return finetune(
      supervised(_classifier(embed), softmax_cross_entropy),
      sgd(1.0, multipliers=(('.*', rates),)),
      tuning=select('weights/kernel'),
    )

  return inner


def divergence(latent: Params) -> Array:
  """Mean KL(N(m, s^2) || N(0, 1)) over latents of classes that are there."""
  centre, deviation = latent['centre'], latent['deviation']
  variance = jnp.exp(2 * deviation)
  each = 0.5 * (centre**2 + variance - 1) - deviation
  there = (latent['bias'] == 0).astype(each.dtype)
  return (each.mean(-1) * there).sum() / there.sum()


def correlation(kernel: Array) -> Array:
  """Mean squared distance of the rows' cosines from the identity."""
  squares = product(kernel, kernel.T)
  norms = jnp.sqrt(jnp.diagonal(squares))
  cosines = squares / (norms[:, None] * norms[None])
  return jnp.mean((cosines - jnp.eye(len(kernel), dtype=kernel.dtype)) ** 2)


def leo_loss(
  embed: Forward,
  ways: int,
  *,
  latent_steps: int = 5,
  head_steps: int = 5,
  kl: Scalar = 1e-3,
  encoder: Scalar = 1e-9,
  orthogonality: Scalar = 1e-3,
  over: Over = jax.vmap,
) -> LossFn:
  """LEO's objective, a loss of episodes of `leo_init`'s parameters.

    L = mean_task [loss(w', query) + kl KL(N(m, s^2) || N(0, 1))
        + encoder |stop_gradient(z') - z|^2 / size] + orthogonality R(decoder)

  with R the mean squared distance of the decoder rows' cosines from the
  identity (Rusu et al. 2019, section 2; their l2 penalty is the outer
  optimiser's decay). Means, not sums, as in the authors' code.

  Args:
    embed: as for `leo_start`.
    ways: as for `leo_start`.
    latent_steps: in the latents; like all defaults from the authors' code.
    head_steps: on the decoded head.
    kl: beta.
    encoder: gamma.
    orthogonality: lambda_2.
    over: how tasks are mapped.
  """
  data = supervised(_classifier(embed), softmax_cross_entropy)

  def of_query(params, model_state, batch, rng):
    value, aux = data(params, model_state, batch, rng)
    latent = params['latent']
    moved = jax.lax.stop_gradient(latent['z']) - latent['start']
    value += kl * divergence(latent) + encoder * jnp.mean(moved**2)
    value += orthogonality * correlation(params['decoder']['kernel'])
    return value, aux

  loss = episode_loss(_head_learner(embed), of_query, head_steps)
  return starting_from(leo_start(embed, ways, latent_steps), loss, over=over)


def predict_leo(
  embed: Forward,
  ways: int,
  *,
  latent_steps: int = 5,
  head_steps: int = 5,
  over: Over = jax.vmap,
) -> Predict:
  """LEO as the `predict_fn` of `evaluate_episodes`; arguments as `leo_loss`."""
  predict = predict_episodes(
    _head_learner(embed), _classifier(embed), head_steps
  )
  return predict_from(leo_start(embed, ways, latent_steps), predict, over=over)
