"""LEO against its two loops written by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import toys

from fmeta import fewshot
from fmeta.fewshot.leo import correlation, divergence, leo_start
from fmeta.testing import check_gradient

KEY = jax.random.key(3)
WAYS, WIDTH, LATENTS = 3, 4, 2


def embed(params, model_state, batch, rng):
  del rng
  return jnp.tanh(batch['x'] @ params['body']['kernel']), model_state


def model():
  params = fewshot.leo_init(KEY, WIDTH, LATENTS, latent_rate=0.5, head_rate=0.2)
  random = np.random.default_rng(1)
  body = {'kernel': jnp.asarray(random.normal(size=(6, WIDTH)), jnp.float32)}
  return {**params, 'model': {**params['model'], 'body': body}}


def episodes(tasks=2):
  parts = []
  for k in range(tasks):
    support = toys.batch_of(5, seed=k)
    support['label'] = jnp.asarray([0, 1, 2, 2, 0])
    parts.append({'support': support, 'query': toys.batch_of(4, seed=10 + k)})
  return jax.tree.map(lambda *x: jnp.stack(x), *parts)


def cross_entropy(logits, labels):
  return -jnp.take_along_axis(
    jax.nn.log_softmax(logits), labels[:, None], 1
  ).mean()


def by_hand(params, support, query):
  """Evaluation mode: every draw is its mean. (logits, latents, encoding)."""
  model, rates = params['model'], params['hyper']
  rows, asked = (embed(model, {}, part, None)[0] for part in (support, query))
  codes = rows @ model['encoder']['kernel']
  relation = [model['relation'][f'layer_{k}']['kernel'] for k in range(3)]
  per_class = []
  labels = np.array([0, 1, 2, 2, 0])
  for n in range(WAYS):
    found = []
    for i in np.flatnonzero(labels == n):
      for j in range(5):
        hidden = jax.nn.relu(
          jnp.concatenate([codes[i], codes[j]]) @ relation[0]
        )
        found.append(jax.nn.relu(hidden @ relation[1]) @ relation[2])
    per_class.append(sum(found) / len(found))
  encoding = jnp.stack(per_class)
  start = z = encoding[:, :LATENTS]

  def head(z):
    return (z @ model['decoder']['kernel'])[:, :WIDTH].T

  def of_support(kernel):
    return cross_entropy(rows @ kernel, support['label'])

  for _ in range(2):
    z = z - rates['latent'] * jax.grad(lambda z: of_support(head(z)))(z)
  kernel = head(z)
  for _ in range(2):
    kernel = kernel - rates['head'] * jax.grad(of_support)(kernel)
  return asked @ kernel, (start, z), encoding


STRENGTHS = {'kl': 0.3, 'encoder': 0.2, 'orthogonality': 0.1}
LOSS = fewshot.leo_loss(embed, WAYS, latent_steps=2, head_steps=2, **STRENGTHS)


def test_leo_is_its_two_loops_by_hand_and_three_penalties(x64):
  params, batch = toys.double((model(), episodes(1)))
  support, query = (
    jax.tree.map(lambda x: x[0], batch[part]) for part in ('support', 'query')
  )
  predict = fewshot.predict_leo(embed, WAYS, latent_steps=2, head_steps=2)

  @jax.jit
  def both(params):
    return LOSS(params, {}, batch, None), predict(params, batch, None)

  (found, aux), answer = both(params)
  logits, (start, end), encoding = jax.jit(by_hand)(params, support, query)
  np.testing.assert_allclose(answer[0], logits, rtol=1e-12)
  np.testing.assert_allclose(aux.outputs[0], logits, rtol=1e-12)
  centre, deviation = np.split(np.asarray(encoding), 2, axis=1)
  normal = (centre**2 + np.exp(deviation) ** 2 - 1 - 2 * deviation) / 2
  decoder = np.asarray(params['model']['decoder']['kernel'])
  cosines = np.corrcoef(np.concatenate([decoder, -decoder], 1))  # zero means
  expected = (
    cross_entropy(logits, query['label'])
    + 0.3 * normal.mean()
    + 0.2 * np.mean((end - start) ** 2)
    + 0.1 * np.mean((cosines - np.eye(LATENTS)) ** 2)
  )
  np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_no_parameter_starts_with_a_weak_type():
  # A second step would be compiled anew.
  leaves = jax.tree.leaves(fewshot.leo_init(KEY, WIDTH, LATENTS))
  assert not any(x.weak_type for x in leaves)


def test_meta_gradients_of_all_of_leo_agree_with_differences(x64):
  # With a key: through every draw. The encoder's penalty stops a gradient, so
  # it is no derivative of its value.
  params, batch = toys.double((model(), episodes(1)))
  loss = fewshot.leo_loss(
    embed, WAYS, latent_steps=1, head_steps=1, kl=0.3, encoder=0.0
  )
  grads = check_gradient(lambda p: loss(p, {}, batch, KEY)[0], params)
  assert all(np.any(x != 0) for x in jax.tree.leaves(grads))


def test_the_encoder_s_penalty_pulls_it_to_the_adapted_latents(x64):
  params, batch = toys.double((model(), episodes(1)))
  support = jax.tree.map(lambda x: x[0], batch['support'])

  def slope(strength):
    loss = fewshot.leo_loss(
      embed, WAYS, latent_steps=1, head_steps=0, encoder=strength
    )
    return jax.grad(lambda p: loss(p, {}, batch, None)[0])

  start = leo_start(embed, WAYS, 1)

  def penalty(params, end):
    begun = start(params, {}, support, None)['model']['latent']['start']
    return jnp.mean((end - begun) ** 2)

  @jax.jit
  def both(params):
    end = start(params, {}, support, None)['model']['latent']['z']
    found = jax.tree.map(jnp.subtract, slope(1.0)(params), slope(0.0)(params))
    return found, jax.grad(penalty)(params, end)

  found, expected = both(params)
  for name in ('encoder', 'relation', 'decoder'):
    jax.tree.map(
      lambda x, y: np.testing.assert_allclose(x, y, atol=1e-12),
      found['model'][name],
      expected['model'][name],
    )
  assert np.any(expected['model']['encoder']['kernel'] != 0)
  assert not np.any(expected['model']['decoder']['kernel'])


def test_draws_are_normal_and_their_divergence_is_that_of_samples():
  random = np.random.default_rng(0)
  centre, deviation = random.normal(size=(2, 3, 4)) * 0.5
  latent = {
    'centre': centre,
    'deviation': deviation,
    'bias': np.array([0, 0, -1e9]),  # the third class is absent
  }
  draws = centre + np.exp(deviation) * random.normal(size=(20_000, 3, 4))
  log_ratio = (
    -((draws - centre) ** 2) / (2 * np.exp(2 * deviation))
    - deviation
    + draws**2 / 2
  )
  found = divergence(jax.tree.map(jnp.asarray, latent))
  np.testing.assert_allclose(found, log_ratio[:, :2].mean(), rtol=0.02)
  kernel = jnp.eye(3)[:, :3] * jnp.asarray([[2.0], [3.0], [1.0]])
  assert correlation(kernel) == 0


def test_padding_and_absent_classes_change_nothing_in_leo(x64):
  params, batch = toys.double((model(), episodes(1)))
  batch['query']['label'] = jnp.asarray([[0, 1, 0, 1]])
  keep = np.asarray(batch['support']['label'][0]) < 2
  alone = {
    'support': jax.tree.map(lambda x: x[:, keep], batch['support']),
    'query': batch['query'],
  }
  padded = {
    **batch,
    'support': {**batch['support'], 'weight': keep[None] + 0.0},
  }
  run = lambda ways: jax.jit(
    fewshot.predict_leo(embed, ways, latent_steps=1, head_steps=1)
  )
  expected, found = run(2)(params, alone, None), run(3)(params, padded, None)
  np.testing.assert_allclose(found[..., :2], expected, rtol=1e-12)
  assert np.all(found[..., 2] < -1e8)
