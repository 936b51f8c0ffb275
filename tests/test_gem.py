"""Gradients that no past task's gradient opposes."""

import cones
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from fmeta import UsageError, continual, gradients, losses, memory, optim
from fmeta.continual.gem import project, project_on_one
from fmeta.learner import finetune, rehearse
from fmeta.memory import beside
from fmeta.testing import assert_same

KEY = jax.random.key(5)
LOSS, PARAMS, BATCH, FORWARD = toys.problem()
TASKS = [toys.batch_of(5, seed=k) for k in range(3)]


def past_of(tasks, present=None):
  rows = jax.tree.map(lambda *x: jnp.stack(x), *tasks)
  present = np.ones(len(tasks)) if present is None else np.asarray(present)
  weight = np.repeat(present[:, None], 5, 1).astype(np.float32)
  return rows, jnp.asarray(weight)


def flat(leaves):
  return np.concatenate(
    [np.asarray(x, float).ravel() for x in jax.tree.leaves(leaves)]
  )


def gradient(taken, batch, loss=LOSS, model_state=None):
  learner = finetune(loss, optim.sgd(1.0), value_and_grad=taken)
  state = learner.init(PARAMS, KEY, model_state)
  return jax.jit(learner.gradient)(state, batch, KEY)


def plain_gradient(batch):
  return jax.grad(lambda p: LOSS(p, {}, batch, None)[0])(PARAMS)


def norm(x):
  return np.linalg.norm(x, axis=-1, keepdims=True)


# What float32 leaves of a violation, over |g| |g_k|, where it is more than a
# few roundings. Rows of low rank or that nearly oppose each other leave the
# square root of one: the matrix of inner products knows no better.
LEFT = {'low rank': 1e-3, 'near duplicates': 1e-5, 'near opposites': 1e-3}


@pytest.mark.parametrize('kind', cones.KINDS)
def test_float32_meets_the_constraints(kind):
  drawn = cones.draw(kind, 50)
  rows, present, vectors = (np.asarray(x, np.float32) for x in drawn)
  found = jax.jit(jax.vmap(project))(vectors, rows, present > 0)
  sizes = cones.lengths(drawn[0]) * norm(drawn[2])
  slopes = np.einsum('btp,bp->bt', rows.astype(float), found) / sizes
  before = np.einsum('btp,bp->bt', rows.astype(float), vectors) / sizes
  assert before.min() < -0.1
  assert slopes.min() >= -LEFT.get(kind, 5e-7)
  if kind in cones.WELL_CONDITIONED:
    expected = [
      cones.nearest(*pair) for pair in zip(rows, vectors, strict=True)
    ]
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_the_margin_bounds_the_dual_and_keeps_the_constraints(x64):
  rows, present, vectors = cones.draw('random', 20)
  solve = jax.jit(jax.vmap(project, (0, 0, 0, None)))
  found = np.asarray(solve(vectors, rows, present, 0.5))
  assert np.einsum('btp,bp->bt', rows, found).min() >= -1e-9
  opposed = np.any(np.einsum('btp,bp->bt', rows, vectors) < 0, axis=1)
  assert opposed.sum() >= 15
  for moved, cone, vector, wrong in zip(
    found, rows, vectors, opposed, strict=True
  ):
    expected = cones.nearest(cone, vector, 0.5) if wrong else vector
    np.testing.assert_allclose(moved, expected, atol=1e-9)


def test_gradients_that_oppose_no_one_are_bitwise_unchanged():
  grads = {'a': jnp.asarray([1.0, -0.0, 3e-30]), 'b': jnp.asarray([[2.0]])}
  agreeing = jax.tree.map(lambda x: jnp.stack([x, 0 * x]), grads)
  both = jnp.asarray([True, True])
  assert_same(grads, jax.jit(project)(grads, agreeing, both, 0.5), 'gem')
  assert_same(grads, jax.jit(project_on_one)(grads, grads), 'a_gem')
  # An absent task opposes no one, whatever its rows give.
  absent = jax.tree.map(lambda x: jnp.stack([x, jnp.nan * x]), grads)
  present = jnp.asarray([True, False])
  assert_same(grads, jax.jit(project)(grads, absent, present, 0.5), 'absent')


def test_a_vector_orthogonal_to_rows_of_low_rank_stays_but_for_rounding():
  rows, present, vectors = cones.draw('low rank', 50)
  for k, (cone, vector) in enumerate(zip(rows, vectors, strict=True)):
    span = np.linalg.svd(cone)[2][:4]
    vectors[k] = vector - span.T @ (span @ vector)
  args = vectors.astype(np.float32), rows.astype(np.float32), present
  found = jax.jit(jax.vmap(project))(*args)
  np.testing.assert_allclose(found, args[0], rtol=0, atol=1e-6)


def test_narrow_leaves_are_multiplied_in_float32_and_keep_their_dtype():
  grads = {'a': jnp.ones(4096, jnp.bfloat16)}
  against = {'a': -jnp.ones(4096, jnp.bfloat16).at[0].set(-3.0)}
  found = project_on_one(grads, against)['a']
  assert found.dtype == jnp.bfloat16
  share = 4092 / 4104  # in bfloat16 it would be 1
  expected = np.array([1 - share, 1 + 3 * share])[[1] + [0] * 4095]
  # bfloat16 rounds to half of 2^-7: .0039.
  np.testing.assert_allclose(found.astype(float), expected, rtol=4e-3)


@pytest.mark.parametrize('margin', [0.0, 0.5])
def test_the_step_projects_on_the_gradients_of_the_tasks_rows(margin):
  own = plain_gradient(BATCH)
  tasks = [{**t, 'label': (t['label'] + 1) % 3} for t in TASKS]
  expected = cones.nearest(
    np.stack([flat(plain_gradient(t)) for t in tasks[:2]]), flat(own), margin
  )
  assert np.linalg.norm(expected - flat(own)) > 0.1
  # The third task is yet to come; its rows are zero.
  tasks[2] = jax.tree.map(jnp.zeros_like, tasks[2])
  batch = beside(BATCH, *past_of(tasks, [1, 1, 0]))
  found = gradient(continual.gem(margin), batch)
  np.testing.assert_allclose(flat(found), expected, atol=2e-6)


def test_value_outputs_and_statistics_are_those_of_the_own_rows():
  module = toys.NormNet()
  loss = losses.supervised(
    toys.forward_of(module), losses.softmax_cross_entropy
  )
  params, model_state = toys.init_of(module)
  valued = {}
  for name, taken, batch in [
    ('plain', gradients.plain, BATCH),
    ('gem', continual.gem(), beside(BATCH, *past_of(TASKS))),
    ('a_gem', continual.a_gem(), beside(BATCH, TASKS[0], jnp.ones(5))),
  ]:
    fun = lambda p, frozen, *rest: loss(p, *rest)
    valued[name], _ = jax.jit(taken(fun))(params, {}, model_state, batch, KEY)
  assert_same(valued['plain'], valued['gem'], 'gem')
  assert_same(valued['plain'], valued['a_gem'], 'a_gem')


def test_tasks_side_by_side_and_microbatches_give_the_same_gradient():
  tasks = [toys.batch_of(6, seed=k) for k in range(3)]
  rows = jax.tree.map(lambda *x: jnp.stack(x), *tasks)
  # One row is not there, so that microbatches have unequal weights.
  batch = beside(BATCH, rows, jnp.ones((3, 6)).at[1, 5].set(0))
  expected = gradient(continual.gem(), batch)
  assert np.any(flat(expected) != flat(plain_gradient(BATCH)))
  for taken in (
    continual.gem(lanes=2),
    continual.gem(value_and_grad=gradients.accumulate(2)),
  ):
    np.testing.assert_allclose(
      flat(gradient(taken, batch)), flat(expected), atol=1e-6
    )


def test_the_loss_of_no_rows_may_be_anything():
  def loss(params, model_state, batch, rng):
    value, aux = LOSS(params, model_state, batch, rng)
    nobody = batch.get('weight', jnp.ones(1)).sum() == 0
    return value - 10 * nobody * LOSS(params, {}, BATCH, rng)[0], aux

  rows, weight = past_of(TASKS, [0, 0, 0])
  expected = gradient(gradients.plain, BATCH, loss)
  found = gradient(continual.gem(), beside(BATCH, rows, weight), loss)
  assert_same(expected, found, 'gem')
  one = beside(BATCH, TASKS[0], jnp.zeros(5))
  assert_same(expected, gradient(continual.a_gem(), one, loss), 'a_gem')


@pytest.mark.parametrize(
  'taken, weight',
  [
    (continual.gem(), None),
    (continual.gem(), jnp.ones(5)),
    (continual.a_gem(), None),
    (continual.a_gem(), jnp.ones((3, 5))),
  ],
)
def test_a_batch_without_such_a_memory_is_refused(taken, weight):
  batch = BATCH if weight is None else beside(BATCH, TASKS[0], weight)
  said = 'absent' if weight is None else r'of shape \('
  with pytest.raises(UsageError, match=f"'memory_weight' is {said}"):
    gradient(taken, batch)


SPEC = {
  'x': jax.ShapeDtypeStruct((6,), jnp.float32),
  'label': jax.ShapeDtypeStruct((), jnp.int32),
}


def test_a_sample_is_of_each_past_task_and_of_no_other():
  held = continual.task_by_task(memory.per_task(4, 6, SPEC))
  state = held.init()
  for k, count in enumerate([8, 4, 5]):  # the third task is going on
    rows = {'x': jnp.full((count, 6), k + 1.0), 'label': jnp.arange(count)}
    state = held.insert(state, rows, jnp.ones(count), KEY)
    state = held.end_task(state) if k < 2 else state
  rows, valid = held.sample(state, 5, KEY)
  assert rows['x'].shape == (4, 5, 6)
  np.testing.assert_array_equal(valid.sum(1), [5, 4, 0, 0])
  assert np.all(rows['x'][0] == 1) and np.all(rows['x'][1][valid[1] > 0] == 2)
  for labels, there in zip(rows['label'][:2], valid[:2], strict=True):
    assert len(set(np.asarray(labels)[there > 0])) == there.sum()


def test_no_loss_of_a_past_task_rises_over_a_stream():
  # Room for every row of three steps.
  held = continual.task_by_task(memory.per_task(3, 15, SPEC))
  # The same inputs and other labels: each task opposes the ones before.
  tasks = [{**TASKS[0], 'label': (TASKS[0]['label'] + k) % 3} for k in range(3)]

  def rises(taken, rate=1e-3):
    inner = finetune(LOSS, optim.sgd(rate), value_and_grad=taken)
    learner = rehearse(inner, held, 15, mix=beside)
    state, step = learner.init(PARAMS, KEY), jax.jit(learner.step)
    value = jax.jit(lambda p, task: LOSS(p, {}, task, None)[0])
    risen = []
    for k, task in enumerate(tasks):
      for _ in range(3):
        before = state.trainable
        state, _ = step(state, task, KEY)
        risen += [
          value(state.trainable, old) - value(before, old) for old in tasks[:k]
        ]
      state = learner.end_task(state, FORWARD, [], KEY)
    return max(risen) / rate

  # To first order; the rest is of the order of the rate.
  assert rises(continual.gem(margin=0.0)) < 2e-3
  ignoring = lambda fun: (
    lambda *at: gradients.plain(fun)(
      *at[:3], {k: at[3][k] for k in ('x', 'label')}, at[4]
    )
  )
  assert rises(ignoring) > 0.1
