"""GDumb, iCaRL and BiC: methods that live on what a memory holds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import toys

import fmeta
from fmeta import continual, losses, memory, optim, train
from fmeta.continual.bic import Bias, corrected
from fmeta.errors import UsageError

KEY = jax.random.key(8)
SPEC = {
  'x': jax.ShapeDtypeStruct((6,), jnp.float32),
  'label': jax.ShapeDtypeStruct((), jnp.int32),
}
PARAMS = toys.three_kernels()


def _collected(capacity=10):
  held = memory.class_balanced(capacity, SPEC)
  batches = [toys.batch_of(8, seed=k) for k in range(3)]
  batches[1]['weight'] = jnp.arange(8) % 2
  return continual.collect(held, held.init(), batches, KEY), batches


def test_collecting_is_inserting_batch_by_batch():
  held = memory.class_balanced(10, SPEC)
  found, batches = _collected()
  expected = held.init()
  insert = jax.jit(held.insert)
  for batch in batches:
    weight = batch.get('weight', jnp.ones(8))
    expected = insert(expected, batch, weight, KEY)
  jax.tree.map(np.testing.assert_array_equal, expected, found)
  assert found['seen'] == 20


def test_held_columns_are_the_rows_without_slots_or_outputs():
  spec = {**SPEC, 'outputs': jax.ShapeDtypeStruct((3,), jnp.float32)}
  held = memory.reservoir(12, spec)
  batch = {**toys.batch_of(5), 'outputs': jnp.zeros((5, 3))}
  filled = continual.collect(held, held.init(), [batch], KEY)
  columns = continual.held_columns(filled)
  assert sorted(columns) == ['label', 'x']
  np.testing.assert_array_equal(columns['x'], batch['x'])
  np.testing.assert_array_equal(columns['label'], batch['label'])


def test_gdumb_is_plain_training_on_what_is_held():
  filled, _ = _collected()
  loss_fn = losses.supervised(toys.three_layers, losses.softmax_cross_entropy)
  learner = fmeta.finetune(loss_fn, optim.sgd(0.1))
  stage = continual.gdumb(filled, 4, num_steps=5, seed=3)
  start = learner.init(PARAMS, KEY)
  fitted = train.fit(learner, start, [stage], KEY, quiet=True)
  step, state = jax.jit(learner.step), learner.init(PARAMS, KEY)
  rows = {
    row.tobytes(): label
    for row, label in zip(
      np.asarray(filled['rows']['x']),
      np.asarray(filled['rows']['label']),
      strict=True,
    )
  }
  for i in range(5):
    batch = stage.batches(i)
    assert [rows[x.tobytes()] for x in batch['x']] == batch['label'].tolist()
    state, _ = step(state, batch, KEY)
  jax.tree.map(
    np.testing.assert_array_equal, state.trainable, fitted.state.trainable
  )
  with pytest.raises(UsageError, match='holds 10 rows, fewer than the batch'):
    continual.gdumb(filled, 11, 5, 3)


def _sigmoid(z):
  return 1 / (1 + np.exp(-np.asarray(z, float)))


def _taught(seed=0, old=(True, False, False)):
  batch = toys.batch_of(8, seed=seed)
  random = np.random.default_rng(seed)
  teacher = jnp.asarray(random.normal(size=(8, 3)), jnp.float32)
  return {
    **batch,
    'teacher': teacher,
    'old': jnp.tile(jnp.asarray(old), (8, 1)),
  }


def test_icarl_s_loss_is_the_sum_of_the_paper():
  batch = _taught()
  loss_fn = jax.jit(continual.icarl_loss(toys.three_layers))
  found, aux = loss_fn(PARAMS, {}, batch, None)
  logits = np.asarray(toys.three_layers(PARAMS, {}, batch, None)[0], float)
  g, q = _sigmoid(logits), _sigmoid(batch['teacher'])
  total = 0.0
  for i, label in enumerate(np.asarray(batch['label'])):
    total += q[i, 0] * np.log(g[i, 0]) + (1 - q[i, 0]) * np.log(1 - g[i, 0])
    for y in (1, 2):
      total += np.log(g[i, y]) if y == label else np.log(1 - g[i, y])
  np.testing.assert_allclose(found, -total / 8, rtol=1e-6)
  right = np.mean(logits.argmax(1) == batch['label'])
  np.testing.assert_allclose(aux.metrics['accuracy'], right)
  # A class that may not be answered is left out.
  mask = jnp.tile(jnp.asarray([True, True, False]), (8, 1))
  grads = jax.grad(loss_fn, has_aux=True)(
    PARAMS, {}, {**batch, 'allowed': mask}, None
  )[0]
  head = np.asarray(grads['head']['kernel'])
  assert not np.any(head[:, 2]) and np.all(np.any(head[:, :2], axis=0))


def test_icarl_distils_nothing_where_the_network_is_its_own_teacher():
  batch = _taught(old=(True, True, True))
  batch['teacher'] = toys.three_layers(PARAMS, {}, batch, None)[0]
  loss_fn = continual.icarl_loss(toys.three_layers)
  grads, _ = jax.grad(loss_fn, has_aux=True)(PARAMS, {}, batch, None)
  # The sigmoid of the loss and that of the target are two programs.
  assert all(np.abs(g).max() < 1e-6 for g in jax.tree.leaves(grads))


def _features(x):
  return np.asarray(x, float) @ np.random.default_rng(1).normal(size=(6, 4))


def _unit(x):
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


def test_exemplars_of_two_tasks_and_their_nearest_mean(x64):
  """Against the algorithms of the paper, written out in numpy."""
  spec = {'x': jnp.zeros(6), 'label': jnp.zeros((), jnp.int32)}
  held = memory.class_balanced(6, spec).init()
  add = jax.jit(continual.add_exemplars, static_argnums=(4, 5))
  sets = {}
  for task, classes in enumerate([(0, 1), (2,)]):
    random = np.random.default_rng(task)
    x, label = random.normal(size=(12, 6)), random.choice(classes, 12)
    weight = (np.arange(12) < 11).astype(float)
    held = add(held, {'x': x, 'label': label}, weight, _features(x), 3, 3)
    # Reduce, then construct: m = 6 / (classes so far).
    m = 6 // (max(classes) + 1)
    sets = {y: rows[:m] for y, rows in sets.items()}
    for y in classes:
      mine = x[:11][label[:11] == y]
      phi = _unit(_features(mine))
      chosen = []
      for k in range(1, m + 1):
        total = phi[chosen].sum(0)
        gaps = np.linalg.norm(phi.mean(0) - (phi + total) / k, axis=1)
        gaps[chosen] = np.inf
        chosen.append(int(gaps.argmin()))
      sets[y] = mine[chosen]
    found = continual.held_columns(held)
    for y, rows in sets.items():
      mine = found['x'][found['label'] == y]
      assert {r.tobytes() for r in mine} == {r.tobytes() for r in rows}
  queries = np.random.default_rng(9).normal(size=(20, 6))
  scores = continual.nearest_exemplars(
    held,
    jnp.asarray(_features(held['rows']['x'])),
    jnp.asarray(_features(queries)),
    3,
  )
  means = [_unit(_unit(_features(sets[y])).mean(0)) for y in range(3)]
  distance = np.linalg.norm(_unit(_features(queries))[:, None] - means, axis=-1)
  np.testing.assert_array_equal(np.argmax(scores, 1), distance.argmin(1))
  assert len(set(distance.argmin(1))) == 3


def test_a_task_of_icarl_has_exemplars_and_the_teachers_logits():
  filled, _ = _collected(4)
  task = {k: np.asarray(v) for k, v in toys.batch_of(5, seed=7).items()}
  teach = lambda columns: columns['x'][:, :3]
  columns = continual.icarl_columns(task, filled, teach, np.asarray([1, 0, 1]))
  assert len(columns['x']) == 9
  np.testing.assert_array_equal(columns['x'][:5], task['x'])
  np.testing.assert_array_equal(columns['x'][5:], filled['rows']['x'])
  np.testing.assert_array_equal(columns['label'][5:], filled['rows']['label'])
  np.testing.assert_array_equal(columns['teacher'], columns['x'][:, :3])
  np.testing.assert_array_equal(columns['old'], [[True, False, True]] * 9)
  with pytest.raises(UsageError, match="no column 'label'"):
    continual.icarl_columns({'x': task['x']}, filled, teach, np.ones(3))


NEW = jnp.asarray([False, False, False, True, True])


def _biased(rows=60):
  random = np.random.default_rng(6)
  label = random.integers(0, 5, rows)
  logits = random.normal(size=(rows, 5)) + 1.5 * np.eye(5)[label]
  logits[:, 3:] = 2.0 * logits[:, 3:] + 1.0
  weight = (random.random(rows) < 0.8).astype(float)
  return logits, label, weight


def _mean_cross_entropy(numbers, logits, label, weight):
  out = logits.copy()
  out[:, 3:] = numbers[0] * out[:, 3:] + numbers[1]
  top = out.max(1)
  log_sum = top + np.log(np.exp(out - top[:, None]).sum(1))
  each = log_sum - out[np.arange(len(label)), label]
  return np.average(each, weights=weight)


# With large logits a whole step of Newton overshoots.
@pytest.mark.parametrize('scale', [1.0, 30.0])
def test_the_bias_is_the_minimum_that_scipy_finds(scale, x64):
  logits, label, weight = _biased()
  given = scale * logits, label, weight
  found = jax.jit(continual.fit_bias)(given[0], label, NEW, weight)
  best = scipy.optimize.minimize(
    _mean_cross_entropy,
    [1.0, 0.0],
    args=given,
    method='Nelder-Mead',
    options={'xatol': 1e-9, 'fatol': 1e-15, 'maxiter': 4000},
  )
  # A simplex knows the minimum to the square root of the loss's rounding.
  np.testing.assert_allclose(found, best.x, rtol=1e-6)
  start = _mean_cross_entropy([1.0, 0.0], *given)
  assert _mean_cross_entropy(found, *given) <= best.fun + 1e-12 < start


def test_without_rows_there_is_no_correction():
  found = continual.fit_bias(
    jnp.ones((4, 5)), jnp.zeros(4, jnp.int32), NEW, jnp.zeros(4)
  )
  np.testing.assert_array_equal(found, [1.0, 0.0])


def test_separable_rows_give_a_finite_bias():
  label = jnp.asarray([0, 3, 1, 4])
  found = continual.fit_bias(4 * jax.nn.one_hot(label, 5), label, NEW)
  assert np.all(np.isfinite(found)) and found.alpha > 1


def test_the_corrected_forward_moves_new_classes_only():
  new = jnp.asarray([False, True, True])
  bias = Bias(jnp.asarray(0.5), jnp.asarray(-2.0))
  params = continual.with_bias(PARAMS, bias, new)
  forward = continual.bias_corrected(toys.three_layers)
  batch = toys.batch_of(4)
  plain = np.asarray(toys.three_layers(PARAMS, {}, batch, None)[0])
  found, _ = jax.jit(lambda p: forward(p, {}, batch, None))(params)
  np.testing.assert_allclose(found[:, 0], plain[:, 0], rtol=1e-6)
  np.testing.assert_allclose(found[:, 1:], plain[:, 1:] / 2 - 2, rtol=1e-6)
  np.testing.assert_array_equal(
    corrected(jnp.asarray(plain), new, Bias(jnp.ones(()), jnp.zeros(()))), plain
  )
  with pytest.raises(UsageError, match="parameters have no 'bic'"):
    forward(PARAMS, {}, batch, None)
