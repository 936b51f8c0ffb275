"""Learning to learn along a stream: OML, ANML, a boundary in an episode.

Gradients through a stream against central differences in float64; every method
against its equations written out in numpy.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
from row_streams import (
  CLASSES,
  FORWARD,
  KEY,
  LOSS,
  PARAMS,
  RATE,
  ROWS,
  streams,
  value_and_grad,
)

from fmeta import losses, models, optim, penalty, through, tree, tuning
from fmeta.continual import meta as online
from fmeta.errors import UsageError
from fmeta.learner import finetune
from fmeta.meta import episode_loss, predict_episodes
from fmeta.penalty import moving_leaves
from fmeta.testing import assert_close, check_gradient
from fmeta.types import Aux

# The loop of single rows.


def pulled(params, model_state, batch, rng):
  """Each row pulls towards its own centre."""
  gaps = params['t'][None] - batch['c']
  return 0.5 * (gaps**2).sum(-1).mean(), Aux(model_state, {}, jnp.ones(()))


def test_a_stream_is_learned_row_by_row_in_its_order(x64):
  centres = np.array([[1.0, 0.0], [0.0, 4.0], [-2.0, 1.0], [5.0, 5.0]])
  part = {'c': jnp.asarray(centres[None])}
  start = np.array([3.0, -3.0])
  for size, pulls in (
    (1, centres),
    (2, [centres[:2].mean(0), centres[2:].mean(0)]),
  ):
    inner = finetune(pulled, optim.sgd(0.5))
    loss = episode_loss(inner, pulled, len(pulls), batch_size=size)
    episode = {'support': part, 'query': {'c': jnp.zeros((1, 1, 2))}}
    value, grads = value_and_grad(loss, {'t': jnp.asarray(start)}, episode)
    t = start
    for centre in pulls:
      t = t + 0.5 * (centre - t)
    np.testing.assert_allclose(value, 0.5 * (t @ t), rtol=1e-12)
    expected = 0.5 ** len(pulls) * t
    np.testing.assert_allclose(grads['t'], expected, rtol=1e-12)


def test_predictions_after_a_stream_are_those_of_its_last_state(x64):
  params, batch = toys.double(PARAMS), streams(1)
  inner = finetune(LOSS, optim.sgd(RATE))
  predict = predict_episodes(inner, FORWARD, ROWS, batch_size=1)
  state, step = inner.init(params, KEY), jax.jit(inner.step)
  for k in range(ROWS):
    row = jax.tree.map(lambda x: x[0, k][None], batch['support'])  # noqa: B023
    state, _ = step(state, row, KEY)
  query = jax.tree.map(lambda x: x[0], batch['query'])
  expected, _ = FORWARD(state.trainable, {}, query, None)
  found = jax.jit(predict)(params, batch, None)[0]
  np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_a_stream_of_no_rows_at_a_time_is_refused():
  for make in (episode_loss, predict_episodes):
    with pytest.raises(UsageError, match='batch_size 0 has no rows'):
      make(finetune(LOSS, optim.sgd(0.1)), LOSS, 2, batch_size=0)


# OML.


def test_only_the_classes_of_the_stream_start_anew():
  params = {**PARAMS, 'head': jax.tree.map(lambda x: x + 1, PARAMS['head'])}
  support = {
    'label': jnp.asarray([4, 1, 1, 2]),
    'weight': jnp.asarray([1.0, 1.0, 1.0, 0.0]),  # class 2 is padding
  }
  start = online.fresh_classes()
  begun = start(params, {}, support, KEY)
  assert begun['body'] is params['body']
  changed = (begun['head']['kernel'] != params['head']['kernel']).all(0)
  kept = (begun['head']['kernel'] == params['head']['kernel']).all(0)
  np.testing.assert_array_equal(np.flatnonzero(changed), [1, 4])
  np.testing.assert_array_equal(np.flatnonzero(kept), [0, 2, 3, 5])
  bias = np.where(np.isin(np.arange(6), [1, 4]), 0, params['head']['bias'])
  np.testing.assert_array_equal(begun['head']['bias'], bias)
  # Another episode draws another head; evaluation always the same.
  other = start(params, {}, support, jax.random.key(5))
  assert (other['head']['kernel'] != begun['head']['kernel'])[:, 1].all()
  for _ in range(2):
    tested = start(params, {}, support, None)['head']['kernel']
    again = start(params, {}, support, None)['head']['kernel']
    np.testing.assert_array_equal(tested, again)


def test_a_head_without_bias_or_by_another_name_starts_anew():
  kernel = jnp.ones((4, 3))
  start = online.fresh_classes(jax.nn.initializers.zeros, head='top')
  begun = start(
    {'top': {'kernel': kernel}}, {}, {'label': jnp.asarray([2])}, None
  )
  np.testing.assert_array_equal(begun['top']['kernel'].sum(0), [4, 4, 0])
  with pytest.raises(UsageError, match="no 'head' with a kernel among"):
    online.fresh_classes()({'top': {'kernel': kernel}}, {}, {}, None)


def zeros_oml(num_steps=ROWS, **options):
  """OML whose fresh columns are zero, so that they can be written by hand."""
  start = online.fresh_classes(jax.nn.initializers.zeros)
  return online.oml_loss(LOSS, RATE, num_steps, start=start, **options)


def by_hand(params, batch):
  """OML's equations in numpy: a softmax head on tanh features."""
  params = jax.tree.map(np.asarray, params)
  layer, head = params['body']['layer_0'], params['head']
  values = []
  for k in range(len(batch['support']['label'])):
    support, query = (
      {key: np.asarray(x[k]) for key, x in batch[part].items()}
      for part in ('support', 'query')
    )
    read = lambda x: np.tanh(x @ layer['kernel'] + layer['bias'])
    w, b = np.array(head['kernel']), np.array(head['bias'])
    seen = np.unique(support['label'])
    w[:, seen], b[seen] = 0, 0
    for x, label in zip(support['x'], support['label'], strict=True):
      logits = read(x) @ w + b
      slope = np.exp(logits - logits.max())
      slope = slope / slope.sum() - np.eye(CLASSES)[label]
      w, b = w - RATE * np.outer(read(x), slope), b - RATE * slope
    logits = read(query['x']) @ w + b
    normal = np.log(np.exp(logits).sum(-1))
    right = np.take_along_axis(logits, query['label'][:, None], 1)[:, 0]
    values.append((normal - right).mean())
  return np.mean(values)


def test_oml_is_its_equations(x64):
  params, batch = toys.double(PARAMS), streams()
  loss = zeros_oml()
  value = jax.jit(lambda params: loss(params, {}, batch, KEY)[0])(params)
  np.testing.assert_allclose(value, by_hand(params, batch), rtol=1e-12)


def test_the_gradient_of_oml_agrees_with_central_differences(x64):
  batch = streams(1)
  loss = online.oml_loss(LOSS, RATE, ROWS)  # random columns, one draw per key
  grads = check_gradient(
    lambda params: loss(params, {}, batch, KEY)[0], toys.double(PARAMS)
  )
  # What the stream's classes knew before the episode is gone, exactly.
  stream = np.isin(np.arange(CLASSES), np.asarray(batch['support']['label']))
  kernel = np.asarray(grads['head']['kernel'])
  assert not kernel[:, stream].any() and kernel[:, ~stream].any(0).all()
  assert np.any(grads['body']['layer_0']['kernel'] != 0)


@pytest.mark.parametrize('way', [through.plain, through.mixed])
def test_features_read_once_are_the_whole_model_in_every_step(way, x64):
  params, batch = toys.double(PARAMS), streams()

  def embed(params, model_state, batch, rng):
    layer = params['body']['layer_0']
    return jnp.tanh(batch['x'] @ layer['kernel'] + layer['bias'][None]), {}

  def linear(params, model_state, batch, rng):
    head = params['head']
    return batch['z'] @ head['kernel'] + head['bias'][None], model_state

  of_head = losses.supervised(linear, losses.softmax_cross_entropy)
  fast = online.oml_loss(of_head, RATE, ROWS, through=way)
  found = value_and_grad(online.on_features(embed, fast, 'z'), params, batch)
  whole = value_and_grad(online.oml_loss(LOSS, RATE, ROWS), params, batch)
  assert_close(whole, found, 'features once', 1e-12)


def test_a_stream_is_passed_once(x64):
  with pytest.raises(
    UsageError, match='4 rows is not one pass of 3 steps of 1'
  ):
    online.oml_loss(LOSS, RATE, 3)(PARAMS, {}, streams(), KEY)
  with pytest.raises(
    UsageError, match='4 rows is not one pass of 4 steps of 2'
  ):
    online.oml_loss(LOSS, RATE, 4, batch_size=2)(PARAMS, {}, streams(), KEY)


# ANML.


class Wide(nn.Module):
  """tanh of a dense layer."""

  width: int = 4

  @nn.compact
  def __call__(self, x, *, deterministic=True):
    return nn.tanh(nn.Dense(self.width, name='layer_0')(x))


GATED = online.Gated(Wide(), Wide(), CLASSES)


def gated():
  """The loss, the parameters and the forward pass of a gated network."""
  forward = models.forward(GATED, ('x',))
  params, _ = models.init(GATED, jax.random.key(0), toys.batch_of(2), ('x',))
  return (
    losses.supervised(forward, losses.softmax_cross_entropy),
    params,
    forward,
  )


def test_a_gate_multiplies_the_features(x64):
  _, params, forward = gated()
  params = jax.tree.map(np.asarray, toys.double(params))
  x = np.random.default_rng(0).normal(size=(3, 6))
  read = lambda layer: np.tanh(x @ layer['kernel'] + layer['bias'])
  gate = 1 / (1 + np.exp(-read(params['gate']['layer_0'])))
  features = read(params['body']['layer_0']) * gate
  head = params['head']
  expected = features @ head['kernel'] + head['bias']
  found, _ = forward(params, {}, {'x': x}, None)
  np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-14)


def test_a_gate_of_another_width_is_refused():
  module = online.Gated(Wide(4), Wide(1), CLASSES)
  with pytest.raises(
    UsageError, match=r'a gate of shape \(2, 1\) for features'
  ):
    models.init(module, jax.random.key(0), toys.batch_of(2), ('x',))


def test_the_stream_never_moves_the_gate_and_the_outer_loop_does(x64):
  loss_fn, params, _ = gated()
  params, batch = toys.double(params), streams(1)
  loss = online.anml_loss(loss_fn, RATE, ROWS)
  grads = check_gradient(lambda params: loss(params, {}, batch, KEY)[0], params)
  for part in ('body', 'gate'):
    assert np.any(grads[part]['layer_0']['kernel'] != 0)
  # The same episode by an inner learner that names what is fast.
  begun = online.fresh_classes()(
    params,
    {},
    jax.tree.map(lambda x: x[0], batch['support']),
    jax.random.fold_in(KEY, 0),
  )
  inner = finetune(
    loss_fn, optim.sgd(RATE), tuning=tuning.select('body/.*', 'head/.*')
  )
  state = inner.init(begun, KEY)
  assert set(state.frozen) == {'gate'}
  step = jax.jit(inner.step)
  for k in range(ROWS):
    row = jax.tree.map(lambda x: x[0, k][None], batch['support'])  # noqa: B023
    state, _ = step(state, row, KEY)
  query = jax.tree.map(lambda x: x[0], batch['query'])
  expected, _ = loss_fn(inner.params(state), {}, query, None)
  found = jax.jit(lambda params: loss(params, {}, batch, KEY)[0])(params)
  np.testing.assert_allclose(found, expected, rtol=1e-12)


# Two tasks and a boundary inside one episode.


def two_tasks():
  """One episode: two tasks of three rows, and rows of both as queries."""
  label = np.array([[[0, 1, 0], [2, 3, 2]]], np.int32)
  x = np.random.default_rng(2).normal(size=(1, 2, 3, 6))
  query = {
    'x': x[0].reshape(1, 6, 6)[:, ::-1],
    'label': label.reshape(1, 6)[:, ::-1],
  }
  episodes = {'support': {'x': x, 'label': label}, 'query': query}
  return jax.tree.map(jnp.asarray, episodes)


def anchored_anew(strength):
  """Decay towards where the task began."""

  def consolidate(state, trainable, params, *given):
    return {'anchor': moving_leaves(trainable, params)}

  return penalty.l2_sp(strength)._replace(consolidate=consolidate)


PENALTIES = {'ewc': penalty.ewc, 'l2-sp from each boundary': anchored_anew}


def of_penalty(name):
  """`hyper -> learner`: a rate per leaf and a strength, all learned."""

  def inner(hyper):
    rates = hyper['rates']
    own = tuple((name, tree.get(rates, name)) for name in tree.names(rates))
    optimizer = optim.sgd(1.0, multipliers=own)
    held = PENALTIES[name](hyper['strength'])
    return finetune(LOSS, optimizer, penalty=held)

  return inner


def outer_params():
  model = toys.double(PARAMS)
  rates = jax.tree.map(lambda x: jnp.asarray(RATE, 'float64'), model)
  strength = jnp.asarray(0.8, 'float64')
  return {'model': model, 'hyper': {'rates': rates, 'strength': strength}}


@pytest.mark.parametrize(
  ('name', 'way'),
  [
    ('ewc', through.plain),
    ('l2-sp from each boundary', through.plain),
    ('l2-sp from each boundary', through.mixed),
  ],
)
def test_start_rates_and_strength_agree_with_central_differences(
  name, way, x64
):
  """Issue 5, must show 6: through a stream with a boundary inside."""
  loss = online.boundaries_loss(
    of_penalty(name), LOSS, FORWARD, 3, batch_size=1, through=way
  )
  batch = two_tasks()
  grads = check_gradient(
    lambda params: loss(params, {}, batch, KEY)[0], outer_params()
  )
  # The tolerance is relative to the whole gradient, so every part has to weigh
  # enough in it to be seen.
  sizes = jax.tree.map(lambda g: float(np.linalg.norm(g)), grads)
  least = min(jax.tree.leaves(sizes))
  assert least > 1e-3 * np.linalg.norm(jax.tree.leaves(sizes)), sizes


@pytest.mark.parametrize('name', PENALTIES)
def test_a_boundary_inside_the_trace_is_the_boundary_of_a_stream(name, x64):
  params, batch = outer_params(), two_tasks()
  learner = of_penalty(name)(params['hyper'])
  state = learner.init(params['model'], KEY)
  support = jax.tree.map(lambda x: x[0], batch['support'])
  step = jax.jit(learner.step)
  for task in range(2):
    rows_of = jax.tree.map(lambda x: x[task], support)  # noqa: B023
    for k in range(3):
      row = jax.tree.map(lambda x: x[k : k + 1], rows_of)  # noqa: B023
      state, _ = step(state, row, KEY)
    state = learner.end_task(state, FORWARD, [rows_of], KEY)
  query = jax.tree.map(lambda x: x[0], batch['query'])
  expected, _ = LOSS(state.trainable, {}, query, None)
  loss = online.boundaries_loss(
    of_penalty(name), LOSS, FORWARD, 3, batch_size=1
  )
  found, aux = jax.jit(lambda params: loss(params, {}, batch, KEY))(params)
  np.testing.assert_allclose(found, expected, rtol=1e-12)
  assert aux.outputs.shape == (1, 6, CLASSES) and aux.weight == 1


def test_one_task_without_a_penalty_is_an_episode(x64):
  params, batch = toys.double(PARAMS), streams()
  inner = finetune(LOSS, optim.sgd(RATE))
  alone = episode_loss(inner, LOSS, ROWS, batch_size=1)
  tasks = {
    **batch,
    'support': jax.tree.map(lambda x: x[:, None], batch['support']),
  }
  stream = online.boundaries_loss(inner, LOSS, FORWARD, ROWS, batch_size=1)
  expected = value_and_grad(alone, params, batch)
  assert_close(
    expected, value_and_grad(stream, params, tasks), 'one task', 1e-12
  )


def test_a_learned_strength_is_worth_learning(x64):
  """Outer steps on the strength alone lower the loss after the stream."""
  loss = online.boundaries_loss(
    of_penalty('ewc'), LOSS, FORWARD, 3, batch_size=1
  )
  outer = finetune(loss, optim.sgd(5.0), tuning=tuning.select('hyper/strength'))
  state, step = outer.init(outer_params(), KEY), jax.jit(outer.step)
  found = []
  for _ in range(3):
    state, aux = step(state, two_tasks(), KEY)
    found.append(float(aux.metrics['loss']))
  assert found[2] < found[1] < found[0]
