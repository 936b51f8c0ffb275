"""Learning along a stream while it runs: La-MAML, MER.

Each against its algorithm written out in numpy.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
from row_streams import KEY, LOSS, PARAMS

from fmeta import tree
from fmeta.continual import meta as online
from fmeta.errors import UsageError
from fmeta.learner import SAMPLE
from fmeta.memory import reservoir
from fmeta.testing import check_learner
from fmeta.types import Aux

# La-MAML.


def regression(params, model_state, batch, rng):
  """Half the weighted squared error of a linear model."""
  errors = batch['x'] @ params['w'] - batch['y']
  # Memories weigh in float32, which would round thirds.
  weight = batch.get('weight', jnp.ones_like(errors)).astype(errors.dtype)
  share = weight / jnp.maximum(weight.sum(), 1)
  value = 0.5 * jnp.sum(share * errors**2)
  return value, Aux(model_state, {}, weight.sum(), errors)


SPEC = {
  'x': jax.ShapeDtypeStruct((2,), 'float64'),
  'y': jax.ShapeDtypeStruct((), 'float64'),
}


def rows(num, seed):
  random = np.random.default_rng(seed)
  return {'x': random.normal(size=(num, 2)), 'y': random.normal(size=num)}


def la_maml_by_hand(w, a, new, asked, rate_of_rates):
  """One update of algorithm 1, derivatives carried along by hand."""
  at, by_w, by_a = w, np.eye(2), np.zeros((2, 2))
  for x, y in zip(new['x'], new['y'], strict=True):
    error, shrink = x @ at - y, np.eye(2) - np.diag(a) @ np.outer(x, x)
    by_w, by_a = shrink @ by_w, shrink @ by_a - np.diag(x * error)
    at = at - a * x * error
  slope = asked['x'].T @ (asked['x'] @ at - asked['y']) / len(asked['y'])
  a = a - rate_of_rates * by_a.T @ slope
  return w - np.maximum(a, 0) * (by_w.T @ slope), a


def test_la_maml_is_its_algorithm_and_its_memory_is_in_the_loss(x64):
  # As many rows as the memory holds: which are drawn needs no chance.
  learner = online.la_maml(regression, reservoir(3, SPEC), 3, 0.7)
  w, a = np.array([1.0, -0.5]), np.array([0.2, -0.05])
  params = {'model': {'w': jnp.asarray(w)}, 'hyper': {'w': jnp.asarray(a)}}
  state, step = learner.init(params, KEY), jax.jit(learner.step)
  first, second = rows(3, 0), rows(3, 1)
  held = {key: np.concatenate([second[key], first[key]]) for key in first}
  for new, asked in ((first, first), (second, held)):
    state, aux = step(state, jax.tree.map(jnp.asarray, new), KEY)
    w, a = la_maml_by_hand(w, a, new, asked, 0.7)
    found = state.trainable
    np.testing.assert_allclose(found['model']['w'], w, rtol=1e-12)
    np.testing.assert_allclose(found['hyper']['w'], a, rtol=1e-12)
    assert aux.outputs.shape == (3,)
  assert state.memory['seen'] == 6 and step._cache_size() == 1


def test_weights_move_at_the_new_rates_and_negative_ones_hold_still(x64):
  optimizer = online.rates_first(0.5)
  values = lambda *x: {'w': jnp.asarray(x)}
  params = {'model': values(1.0, 1.0, 1.0), 'hyper': values(0.1, 0.1, -0.1)}
  grads = {'model': values(2.0, 2.0, 2.0), 'hyper': values(0.1, 0.4, -0.4)}
  updates, _ = optimizer.update(grads, optimizer.init(params), params)
  np.testing.assert_allclose(updates['hyper']['w'], [-0.05, -0.2, 0.2])
  # Rates 0.05, -0.1 (its weight holds still) and 0.1 (it is back).
  np.testing.assert_allclose(
    updates['model']['w'], [-0.1, 0.0, -0.2], atol=1e-15
  )


def test_rates_that_belong_to_no_weights_are_refused():
  optimizer = online.rates_first(0.1)
  good = online.la_maml_init(PARAMS, 0.1)
  assert tree.names(good['hyper']) == tree.names(good['model'])
  np.testing.assert_allclose(good['hyper']['head']['kernel'], 0.1, rtol=1e-6)
  optimizer.init(good)
  wrong = {'head': good['hyper']['head']}
  for params in (PARAMS, {**good, 'hyper': wrong}):
    with pytest.raises(UsageError, match='no weights with a rate each'):
      optimizer.init(params)


@pytest.mark.usefixtures('optimised')
@pytest.mark.parametrize('way', ['la_maml', 'mer'])
def test_online_meta_learners_are_learners(way):
  spec = {'x': jnp.zeros(6), 'label': jnp.zeros((), jnp.int32)}
  memory = reservoir(4, spec)
  if way == 'la_maml':
    learner = online.la_maml(LOSS, memory, 2, 0.1)
    check_learner(learner, online.la_maml_init(PARAMS, 0.1), toys.batch_of(2))
    return
  learner = online.mer(
    LOSS, memory, num_batches=2, size=3, rate=0.1, within=0.5, across=0.5
  )
  check_learner(learner, PARAMS, toys.batch_of(1))


# MER.


def test_mer_is_its_algorithm(x64):
  held = rows(4, 0)
  keys = jax.random.fold_in(jax.random.fold_in(KEY, 0), SAMPLE)
  first = jax.random.bits(jax.random.split(keys, 2)[0])

  def sample(memory, size, rng):
    # Two draws, told apart by their keys as those of a memory are.
    is_first = jax.random.bits(rng) == first
    order = jnp.where(is_first, jnp.asarray([0, 1]), jnp.asarray([3, 2]))
    taken = {key: jnp.asarray(value)[order] for key, value in held.items()}
    return taken, jnp.ones(size)

  memory = reservoir(4, SPEC)._replace(sample=sample)
  learner = online.mer(
    regression, memory, num_batches=2, size=3, rate=0.2, within=0.6, across=0.3
  )
  new, start = rows(1, 1), np.array([0.4, -1.0])
  state = learner.init({'w': jnp.asarray(start)}, KEY)
  state, _ = jax.jit(learner.step)(state, jax.tree.map(jnp.asarray, new), KEY)
  w = start
  for order in ([0, 1], [3, 2]):
    at = w
    batch = {key: np.concatenate([held[key][order], new[key]]) for key in held}
    for x, y in zip(batch['x'], batch['y'], strict=True):
      at = at - 0.2 * x * (x @ at - y)
    w = w + 0.6 * (at - w)
  expected = start + 0.3 * (w - start)
  np.testing.assert_allclose(state.trainable['w'], expected, rtol=1e-12)
  assert state.memory['seen'] == 1


def drawn_to(params, model_state, batch, rng):
  """Weighted rows pull towards their centres; one of zeros pulls to zero."""
  weight = batch['weight'].astype(batch['c'].dtype)
  gaps = 0.5 * ((params['t'][None] - batch['c']) ** 2).sum(-1)
  value = jnp.sum(weight * gaps) / jnp.maximum(weight.sum(), 1)
  return value, Aux(model_state, {}, weight.sum())


def test_mer_begins_with_the_new_row_alone(x64):
  memory = reservoir(4, {'c': jax.ShapeDtypeStruct((2,), 'float64')})
  learner = online.mer(
    drawn_to,
    memory,
    num_batches=1,
    size=3,
    rate=0.2,
    within=1.0,
    across=1.0,
  )
  centre, start = np.array([2.0, 1.0]), np.array([0.4, -1.0])
  state = learner.init({'t': jnp.asarray(start)}, KEY)
  state, _ = jax.jit(learner.step)(state, {'c': jnp.asarray(centre[None])}, KEY)
  expected = start + 0.2 * (centre - start)
  np.testing.assert_allclose(state.trainable['t'], expected, rtol=1e-12)


def test_mer_refuses_what_is_no_stream_of_rows():
  options = {'rate': 0.1, 'within': 0.5, 'across': 0.5}
  memory = reservoir(4, {'x': jnp.zeros(6), 'label': jnp.zeros((), jnp.int32)})
  for batches, size in ((0, 2), (1, 1)):
    with pytest.raises(UsageError, match='at least 1 batch of 2 rows'):
      online.mer(LOSS, memory, num_batches=batches, size=size, **options)
  learner = online.mer(LOSS, memory, num_batches=1, size=2, **options)
  state = learner.init(PARAMS, KEY)
  with pytest.raises(UsageError, match='one row at a time, not 2'):
    learner.step(state, toys.batch_of(2), KEY)
  batch = {**toys.batch_of(1), 'task': jnp.zeros(1)}
  with pytest.raises(UsageError, match="does not hold 'task'"):
    learner.step(state, batch, KEY)
