"""Losses of heads, and where inner loops start."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from fmeta import fewshot, gradients, losses, meta, optim, tree, tuning
from fmeta.errors import UsageError
from fmeta.learner import finetune
from fmeta.testing import assert_close, check_gradient

KEY = jax.random.key(5)
WAYS = 3
CRITERION = losses.softmax_cross_entropy


def embed(params, model_state, batch, rng):
  """[B, 4]; a key drops features, as training mode does."""
  hidden = jnp.tanh(batch['x'] @ params['body']['layer_0']['kernel'])
  hidden = jnp.tanh(hidden @ params['body']['layer_1']['kernel'])
  if rng is not None:
    hidden = hidden * jax.random.bernoulli(rng, 0.9, hidden.shape)
  return hidden, model_state


def classify(params, model_state, batch, rng):
  hidden, _ = embed(params, model_state, batch, rng)
  head = params['head']
  return hidden @ head['kernel'] + head['bias'][None], model_state


def without_dropout_head(params, model_state, batch, rng):
  return classify(params, model_state, batch, None)


def model():
  body = toys.double(toys.three_kernels())['body']
  random = np.random.default_rng(1)
  head = {
    'kernel': jnp.asarray(random.normal(size=(4, WAYS))),
    'bias': jnp.asarray(random.normal(size=WAYS)),
  }
  return {'body': body, 'head': head}


def episodes(tasks=2, shots=2):
  """Balanced supports; every class is there."""
  parts = []
  for k in range(tasks):
    support = toys.batch_of(WAYS * shots, seed=k)
    support['label'] = jnp.tile(jnp.arange(WAYS), shots)
    parts.append({'support': support, 'query': toys.batch_of(4, seed=10 + k)})
  return toys.double(jax.tree.map(lambda *x: jnp.stack(x), *parts))


def one(episode, task):
  return jax.tree.map(lambda x: x[task], episode)


def plain(params, batch):
  return embed(params, {}, batch, None)[0]


def cross_entropy(logits, labels):
  return -jnp.take_along_axis(
    jax.nn.log_softmax(logits), labels[:, None], 1
  ).mean()


def value(loss_fn, params, batch, rng=None):
  return jax.jit(lambda p, b: loss_fn(p, {}, b, rng))(params, batch)


def prototypical(params, episode):
  """The objective of Snell et al., task by task."""
  episode, found = jax.tree.map(np.asarray, episode), []
  for k in range(episode['query']['label'].shape[0]):
    support, query = one(episode['support'], k), one(episode['query'], k)
    rows, asked = plain(params, support), plain(params, query)
    centres = jnp.stack([rows[support['label'] == c].mean(0) for c in range(3)])
    distance = ((asked[:, None] - centres[None]) ** 2).sum(-1)
    found.append(cross_entropy(-distance, query['label']))
  return jnp.mean(jnp.stack(found))


def test_a_prototypical_network_s_loss_and_gradient_are_the_papers(x64):
  params, batch = model(), episodes()
  loss = fewshot.head_loss(fewshot.prototypes, embed, WAYS)

  def ours(params):
    found, aux = loss(params, {}, batch, None)
    return found, aux

  (found, aux), grads = jax.jit(jax.value_and_grad(ours, has_aux=True))(params)
  expected, slopes = jax.jit(
    jax.value_and_grad(lambda p: prototypical(p, batch))
  )(params)
  np.testing.assert_allclose(found, expected, rtol=1e-12)
  assert_close(slopes, grads, 'gradient', 1e-12)
  assert aux.weight == 2 and aux.outputs.shape == (2, 4, WAYS)
  right = (aux.outputs.argmax(-1) == batch['query']['label']).mean()
  np.testing.assert_allclose(aux.metrics['accuracy'], right)
  predict = fewshot.predict_head(fewshot.prototypes, embed, WAYS)
  logits = jax.jit(predict)(params, batch, KEY)
  np.testing.assert_allclose(logits, aux.outputs, rtol=1e-12)


def test_a_key_means_training_mode_with_one_draw_per_part(x64):
  params, batch = model(), episodes(1)
  batch['query'] = batch['support']
  loss = fewshot.head_loss(fewshot.matching(50.0), embed, WAYS)
  # In evaluation mode a query meets itself; not so if each is drawn anew.
  still = value(loss, params, batch)[0]
  drawn = value(loss, params, batch, KEY)[0]
  assert still < drawn and drawn == value(loss, params, batch, KEY)[0]


def test_a_learned_head_is_part_of_the_outer_parameters(x64):
  batch, head = episodes(), fewshot.learned_ridge()
  loss = fewshot.head_loss(head, embed, WAYS, over=meta.in_chunks(1))
  hyper = toys.double(fewshot.ridge_init(0.5, 4.0))
  params = {'model': model(), 'hyper': hyper}
  grads = check_gradient(lambda p: loss(p, {}, batch, None)[0], params)
  assert grads['hyper']['log_strength'] != 0
  assert np.any(grads['model']['body']['layer_0']['kernel'] != 0)
  with pytest.raises(UsageError, match=r"\['body', 'head'\]; give"):
    loss(model(), {}, batch, None)


def inner(patterns, rate=0.1, how=gradients.plain, forward=classify):
  loss = losses.supervised(forward, CRITERION)
  moving = tuning.select(*patterns)
  return finetune(loss, optim.sgd(rate), tuning=moving, value_and_grad=how)


EVERYTHING = ('body/.*', 'head/.*')
START = fewshot.prototype_start(embed, WAYS)
OF_QUERY = losses.supervised(classify, CRITERION)


def proto_maml(num_steps, how=gradients.plain):
  loss = meta.episode_loss(inner(EVERYTHING, how=how), OF_QUERY, num_steps)
  return fewshot.starting_from(START, loss)


def test_proto_maml_s_head_begins_as_2c_and_minus_c_squared(x64):
  params, support = model(), one(episodes()['support'], 0)
  head = START(params, {}, support, None)['head']
  rows = plain(params, support)
  for k in range(WAYS):
    centre = rows[support['label'] == k].mean(0)
    np.testing.assert_allclose(head['kernel'][:, k], 2 * centre, rtol=1e-12)
    np.testing.assert_allclose(head['bias'][k], -(centre**2).sum(), rtol=1e-12)


def test_proto_maml_of_no_steps_is_a_prototypical_network(x64):
  params, batch = model(), episodes()
  found, aux = value(proto_maml(0), params, batch)
  np.testing.assert_allclose(found, prototypical(params, batch), rtol=1e-12)
  assert aux.weight == 2 and aux.outputs.shape == (2, 4, WAYS)


def test_proto_maml_differentiates_through_the_prototypes(x64):
  params, batch = model(), episodes()
  # A head in the outer parameters is replaced: it gets no gradient.
  del params['head']
  grads = check_gradient(lambda p: proto_maml(1)(p, {}, batch, None)[0], params)

  def cut(params, model_state, support, rng):
    begun = START(params, model_state, support, rng)
    return {**begun, 'head': jax.lax.stop_gradient(begun['head'])}

  loss = meta.episode_loss(inner(EVERYTHING), OF_QUERY, 1)
  without = jax.jit(
    jax.grad(lambda p: fewshot.starting_from(cut, loss)(p, {}, batch, None)[0])
  )(params)
  kernel = 'body/layer_1/kernel'
  gap = np.abs(tree.get(grads, kernel) - tree.get(without, kernel)).max()
  assert gap > 0.1 * np.abs(tree.get(grads, kernel)).max()


def test_a_class_without_support_rows_is_never_predicted_by_proto_maml(x64):
  params, batch = model(), episodes(1)
  weight = (batch['support']['label'] != 2).astype(np.float32)
  batch['support']['weight'] = weight
  batch['query']['label'] %= 2
  loss, predict = (
    proto_maml(2),
    fewshot.predict_from(
      START, meta.predict_episodes(inner(EVERYTHING), classify, 2)
    ),
  )
  found, aux = value(loss, params, batch)
  assert np.isfinite(found)
  probability = jax.nn.softmax(aux.outputs)
  assert not np.any(probability[..., 2])
  logits = jax.jit(predict)(params, batch, None)
  np.testing.assert_allclose(logits[..., :2], aux.outputs[..., :2], rtol=1e-10)


def test_proto_maml_takes_learned_rates_beside_the_model(x64):
  params, batch = model(), episodes()
  by_rate = lambda rates: finetune(
    losses.supervised(without_dropout_head, CRITERION),
    fewshot.step_rates(rates),
  )
  of_query = losses.supervised(without_dropout_head, CRITERION)
  rates = fewshot.step_rates_init(params, 1, 0.1)
  learned = fewshot.starting_from(
    fewshot.of_model(START), meta.episode_loss(by_rate, of_query, 1)
  )
  given = fewshot.starting_from(
    START, meta.episode_loss(by_rate(rates), of_query, 1)
  )

  @jax.jit
  def both(params):
    outer = {'model': params, 'hyper': rates}
    slope = jax.grad(lambda p: learned(p, {}, batch, None)[0])(outer)
    return slope, jax.grad(lambda p: given(p, {}, batch, None)[0])(params)

  found, expected = both(params)
  assert_close(expected, found['model'], 'Proto-MAML', 1e-12)
  assert all(np.all(x != 0) for x in jax.tree.leaves(found['hyper']))


SIZE = 2


def wide(params, model_state, batch, rng):
  """Linear; reads x and two numbers of context."""
  return batch['x'] @ params['head']['kernel'], model_state


CAVIA = fewshot.with_context(wide)
CONTEXT = inner(('context/.*',), 0.5, forward=CAVIA)


def cavia_by_hand(kernel, batch, rate=0.5, steps=2):
  found = []
  for k in range(2):
    support, query = one(batch['support'], k), one(batch['query'], k)

    def at(context, part):
      rows = jnp.tile(context[None], (len(part['x']), 1))
      logits = jnp.concatenate([part['x'], rows], 1) @ kernel
      return cross_entropy(logits, part['label'])

    context = jnp.zeros(SIZE)
    for _ in range(steps):
      context = context - rate * jax.grad(at)(context, support)
    found.append(at(context, query))
  return jnp.mean(jnp.stack(found))


def test_cavia_is_its_hand_written_loop(x64):
  random = np.random.default_rng(4)
  kernel = jnp.asarray(random.normal(size=(6 + SIZE, WAYS)))
  batch = episodes()
  loss = fewshot.starting_from(
    fewshot.context_start(SIZE),
    meta.episode_loss(CONTEXT, losses.supervised(CAVIA, CRITERION), 2),
  )
  found, grads = jax.jit(
    jax.value_and_grad(
      lambda p: loss({'head': {'kernel': p}}, {}, batch, None)[0]
    )
  )(kernel)
  expected, slopes = jax.jit(jax.value_and_grad(cavia_by_hand))(kernel, batch)
  np.testing.assert_allclose(found, expected, rtol=1e-12)
  assert_close(slopes, grads, 'gradient', 1e-12)


def test_only_the_context_moves_and_every_task_starts_at_zero(x64):
  params = {'head': {'kernel': jnp.ones((6 + SIZE, WAYS))}}
  # What is left of another task's context plays no part.
  params['context'] = {'vector': jnp.ones(SIZE)}
  begun = fewshot.context_start(SIZE)(params, {}, {}, None)
  np.testing.assert_array_equal(begun['context']['vector'], np.zeros(SIZE))
  state = CONTEXT.init(begun, KEY)
  assert tree.names(state.trainable) == ['context/vector']
  assert tree.names(state.frozen) == ['head/kernel']


def test_a_model_without_context_or_a_context_of_nothing_is_refused():
  with pytest.raises(UsageError, match='0 context parameters; give'):
    fewshot.context_start(0)
  with pytest.raises(UsageError, match='no parameter context/vector among'):
    CAVIA({'head': {}}, {}, toys.batch_of(), None)


@pytest.mark.parametrize(
  'pattern, moves', [('head/.*', 'head'), ('body/.*', 'body')]
)
def test_anil_and_boil_are_patterns(pattern, moves, x64):
  # ANIL: Raghu et al. 2020; BOIL: Oh et al. 2021. The loop by hand:
  params, batch = model(), episodes(1)
  support, query = one(batch['support'], 0), one(batch['query'], 0)

  def by_hand(params):
    adapted = dict(params)
    for _ in range(2):
      slope = jax.grad(
        lambda part: cross_entropy(
          classify({**adapted, moves: part}, {}, support, None)[0],
          support['label'],
        )
      )(adapted[moves])
      adapted[moves] = jax.tree.map(
        lambda p, g: p - 0.1 * g, adapted[moves], slope
      )
    return cross_entropy(classify(adapted, {}, query, None)[0], query['label'])

  still = without_dropout_head
  learner = inner((pattern,), forward=still)
  loss = meta.episode_loss(learner, losses.supervised(still, CRITERION), 2)
  found = jax.jit(jax.grad(lambda p: loss(p, {}, batch, None)[0]))(params)
  expected = jax.jit(jax.grad(by_hand))(params)
  assert_close(expected, found, pattern, 1e-12)


def shifted(batch, key):
  x = batch['x']
  return {**batch, 'x': x + 0.5 * jax.random.normal(key, x.shape, x.dtype)}


def without_dropout(params, model_state, batch, rng):
  return embed(params, model_state, batch, None)


def test_fine_tuning_on_the_augmented_support_is_its_loop_by_hand(x64):
  params, batch = {'body': model()['body']}, episodes(1)
  support, query = one(batch['support'], 0), one(batch['query'], 0)
  seen = []

  def augment(batch, key):
    seen.append(sorted(batch))
    return shifted(batch, jax.random.key(1))  # the same in every step

  loss = fewshot.support_loss(fewshot.prototypes, without_dropout, 3, augment)
  tuned = finetune(loss, optim.sgd(0.1))
  predict = fewshot.predict_fine_tuned(
    tuned, fewshot.prototypes, without_dropout, WAYS, 2
  )
  found = jax.jit(predict)(params, batch, None)[0]

  def logits(params, asked):
    head = START(params, {}, support, None)['head']
    return plain(params, asked) @ head['kernel'] + head['bias'][None]

  pseudo = shifted(support, jax.random.key(1))
  slope = jax.jit(
    jax.grad(lambda p: cross_entropy(logits(p, pseudo), support['label']))
  )
  for _ in range(2):
    params = jax.tree.map(lambda p, g: p - 0.1 * g, params, slope(params))
  # The linear head's logits lack -|q|^2.
  asked = (plain(params, query) ** 2).sum(-1)
  expected = logits(params, query) - asked[:, None]
  np.testing.assert_allclose(found, expected, rtol=1e-12)
  assert seen[0] == ['label', 'support', 'x']


def test_fine_tuning_for_no_steps_is_the_head_and_nothing_is_augmented(x64):
  params, batch = {'body': model()['body']}, episodes()

  def lost(batch, key):
    return {**batch, 'x': batch['x'] * np.nan}

  loss = fewshot.support_loss(fewshot.prototypes, without_dropout, WAYS, lost)
  tuned = finetune(loss, optim.sgd(0.1))
  predict = fewshot.predict_fine_tuned(
    tuned, fewshot.prototypes, embed, WAYS, 0
  )
  head = fewshot.predict_head(fewshot.prototypes, embed, WAYS)
  found, expected = jax.jit(
    lambda p: (predict(p, batch, None), head(p, batch, None))
  )(params)
  np.testing.assert_allclose(found, expected, rtol=1e-12)
  itself = one(batch['support'], 0)
  value, _ = loss(params, {}, itself, None)
  alone = {'support': itself, 'query': itself}
  expected = prototypical(params, jax.tree.map(lambda x: x[None], alone))
  np.testing.assert_allclose(value, expected, rtol=1e-12)
