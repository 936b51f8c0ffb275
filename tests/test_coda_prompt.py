"""CODA-Prompt: a prefix is a sum of components that a query weighs."""

import jax
import jax.numpy as jnp
import numpy as np
import prompted
import pytest
from prompted import ASKED, BATCH, FORWARD, PARAMS, QUERY, ROWS

from fmeta import losses, optim, testing, tree
from fmeta.adapters import siblings
from fmeta.continual import prompts
from fmeta.continual.plasticity import adam_per_entry
from fmeta.errors import UsageError
from fmeta.learner import finetune

TASKS, EACH, LENGTH, STRENGTH = 3, 2, 2, 0.7
TUNING = prompts.coda_prompt_tuning(
  prompted.BOTH, tasks=TASKS, per_task=EACH, length=LENGTH, also=('head/.*',)
)
BORN, TRAINABLE = prompted.grown(TUNING)
OWN = [n for n in tree.names(TRAINABLE) if n.endswith(prompts.CODA_PROMPT)]


def random_components():
  """Components that are neither orthonormal nor small."""
  random = np.random.default_rng(4)
  leaves = {
    name: jnp.asarray(random.normal(size=tree.get(BORN, name).shape), 'float32')
    for name in OWN
  }
  return siblings.grow(BORN, leaves)


GROWN = random_components()
TUNED = prompts.coda_prompt_forward(FORWARD, QUERY)
RUN = jax.jit(TUNED)
LOSS = losses.supervised(TUNED, losses.softmax_cross_entropy)
PENALTY = prompts.coda_prompt_penalty(STRENGTH)


def held_value(params, task):
  batch = {'task': jnp.full(ROWS, task)}
  return PENALTY.value(params, params, {}, batch, None)


PENALTY_SLOPE = jax.jit(jax.value_and_grad(held_value))


def at_task(task):
  return {**BATCH, 'task': np.full(ROWS, task, np.int32)}


def after(tasks):
  """The model state after so many tasks."""
  told = {'task': max(tasks - 1, 0), 'seen': tasks}
  return {'prompts': {k: jnp.asarray(x, jnp.int32) for k, x in told.items()}}


def of_kernel(layer, part):
  return f'body/layer_{layer}/attention/{part}/kernel'


def flat(params, name, tasks):
  """The components [tasks EACH, ...] of a leaf, in float64."""
  leaf = np.asarray(tree.get(params, name), np.float64)[:tasks]
  return leaf.reshape(-1, *leaf.shape[2:])


def by_hand(params, tasks):
  """Each row alone with sum_m cos(q A_m, K_m) P_m over those tasks."""
  leaves = {}
  for layer in (0, 1):
    keys = flat(params, of_kernel(layer, 'key') + '.component_keys', tasks)
    seen = flat(params, of_kernel(layer, 'key') + '.component_attention', tasks)
    alpha = np.stack(
      [
        [
          prompted.cosine(query[None] * a, k[None])[0, 0]
          for a, k in zip(seen[:, None], keys, strict=True)
        ]
        for query in ASKED
      ]
    )
    for part in ('key', 'value'):
      name = of_kernel(layer, part)
      whole = flat(params, name + '.components', tasks)
      leaves[name + '.prefix'] = np.float32(
        np.einsum('bm,mph->bph', alpha, whole)
      )
  return prompted.alone(leaves)


def test_components_move_and_the_model_does_not():
  shapes = {n: tree.get(TRAINABLE, n).shape for n in tree.names(TRAINABLE)}
  wide, asked = (TASKS, EACH, LENGTH, 8), (TASKS, EACH, 8)
  expected = {'head/kernel': (8, 3), 'head/bias': (3,)}
  for layer in (0, 1):
    expected[of_kernel(layer, 'key') + '.components'] = wide
    expected[of_kernel(layer, 'value') + '.components'] = wide
    expected[of_kernel(layer, 'key') + '.component_keys'] = asked
    expected[of_kernel(layer, 'key') + '.component_attention'] = asked
  assert shapes == expected


def test_all_components_start_orthonormal():
  unlike = []
  for layer in (0, 1):
    both = [
      flat(BORN, of_kernel(layer, part) + '.components', TASKS).reshape(6, -1)
      for part in ('key', 'value')
    ]
    names = ('.component_keys', '.component_attention')
    for rows in (
      np.concatenate(both, axis=1),
      *(flat(BORN, of_kernel(layer, 'key') + n, TASKS) for n in names),
    ):
      np.testing.assert_allclose(rows @ rows.T, np.eye(6), atol=1e-6)
      unlike.append(rows[:, :8])
  assert all(
    np.abs(a - b).max() > 0.1 for k, a in enumerate(unlike) for b in unlike[:k]
  )


@pytest.mark.parametrize('tasks', [1, 2, 3])
def test_a_prefix_is_the_weighted_sum_of_the_components_so_far(tasks):
  found, _ = RUN(GROWN, after(tasks), BATCH, None)
  expected = by_hand(GROWN, tasks)
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
  trained, state = RUN(GROWN, after(0), at_task(tasks - 1), prompted.KEY)
  np.testing.assert_allclose(trained, expected, rtol=1e-5, atol=1e-6)
  testing.assert_same(after(tasks), state, 'model state')


def test_a_task_that_comes_again_is_the_one_at_hand_and_none_is_forgotten():
  found, state = RUN(GROWN, after(3), at_task(0), prompted.KEY)
  np.testing.assert_allclose(found, by_hand(GROWN, 1), rtol=1e-5, atol=1e-6)
  assert state['prompts'] == {'task': 0, 'seen': 3}


def test_components_of_later_tasks_do_not_count():
  later = {name: tree.get(GROWN, name).at[2:].set(1e3) for name in OWN}
  other = siblings.grow(GROWN, later)
  for state, batch, rng in (
    (after(2), BATCH, None),
    (after(0), at_task(1), prompted.KEY),
  ):
    np.testing.assert_array_equal(
      RUN(GROWN, state, batch, rng)[0], RUN(other, state, batch, rng)[0]
    )


def test_only_components_of_the_task_get_a_gradient():
  slope = jax.jit(jax.grad(LOSS, has_aux=True))
  for task in range(TASKS):
    grads, _ = slope(GROWN, after(0), at_task(task), prompted.KEY)
    _, held = PENALTY_SLOPE(GROWN, task)
    for name in OWN:
      for found in (grads, held):
        size = np.abs(tree.get(found, name)).reshape(TASKS, -1).max(1)
        np.testing.assert_array_equal(size > 0, np.arange(TASKS) == task)


def test_the_penalty_is_the_distance_to_orthonormal_ones():
  for task in range(TASKS):
    value, grads = PENALTY_SLOPE(GROWN, task)
    new = slice(task * EACH, (task + 1) * EACH)
    expected = 0.0
    for layer in (0, 1):
      key, own = of_kernel(layer, 'key'), of_kernel(layer, 'value')
      halves = [
        flat(GROWN, name + '.components', task + 1).reshape(
          (task + 1) * EACH, -1
        )
        for name in (key, own)
      ]
      groups = {
        '.components': np.concatenate(halves, axis=1),
        '.component_keys': flat(GROWN, key + '.component_keys', task + 1),
        '.component_attention': flat(
          GROWN, key + '.component_attention', task + 1
        ),
      }
      for suffix, rows in groups.items():
        away = rows @ rows.T - np.eye(len(rows))
        expected += STRENGTH * np.sum(away**2)
        # d|BB' - I|^2 / dB = 4 (BB' - I) B
        slope = (4 * STRENGTH * away @ rows)[new]
        found = flat(grads, key + suffix, TASKS)[new].reshape(EACH, -1)
        width = found.shape[1]
        np.testing.assert_allclose(
          found, slope[:, :width], rtol=1e-5, atol=1e-4
        )
        if suffix == '.components':
          found = flat(grads, own + suffix, TASKS)[new].reshape(EACH, -1)
          np.testing.assert_allclose(
            found, slope[:, width:], rtol=1e-5, atol=1e-4
          )
    np.testing.assert_allclose(value, expected, rtol=1e-5)


def test_the_penalty_is_zero_at_the_start():
  assert PENALTY_SLOPE(BORN, 2)[0] < 1e-10


def test_padding_stays_unseen_and_order_does_not_matter():
  found = np.asarray(RUN(GROWN, after(3), BATCH, None)[0])
  other = BATCH['input_ids'] + 3 * (1 - BATCH['attention_mask'])
  np.testing.assert_allclose(
    RUN(GROWN, after(3), {**BATCH, 'input_ids': other}, None)[0],
    found,
    rtol=1e-6,
  )
  order = np.array([2, 0, 3, 1])
  np.testing.assert_allclose(
    RUN(GROWN, after(3), prompted.shuffled(BATCH, order), None)[0],
    found[order],
    rtol=1e-6,
    atol=1e-6,
  )


def test_components_of_length_zero_are_the_frozen_model():
  none = prompts.coda_prompt_tuning(
    prompted.BOTH, tasks=TASKS, per_task=EACH, length=0
  )
  params, _ = prompted.grown(none)
  np.testing.assert_array_equal(
    RUN(params, after(1), BATCH, None)[0],
    prompted.RUN(PARAMS, {}, BATCH, None)[0],
  )


def test_a_query_of_zeros_has_no_prefix_and_a_finite_gradient():
  run = prompts.coda_prompt_forward(FORWARD, prompts.given_query)
  loss = losses.supervised(run, losses.softmax_cross_entropy)
  batch = {**at_task(0), 'query': np.zeros((ROWS, 8), np.float32)}
  slope = jax.jit(jax.value_and_grad(loss, has_aux=True))
  (_, aux), grads = slope(GROWN, after(0), batch, prompted.KEY)
  zeros = np.zeros((ROWS, LENGTH, 8), np.float32)
  leaves = {
    of_kernel(layer, part) + '.prefix': zeros
    for layer in (0, 1)
    for part in ('key', 'value')
  }
  expected = prompted.alone(leaves)
  np.testing.assert_allclose(aux.outputs, expected, rtol=1e-5, atol=1e-6)
  assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(grads))


def learner_of(optimizer):
  learner = finetune(LOSS, optimizer, tuning=TUNING, penalty=PENALTY)
  return prompts.counting_tasks(learner, TASKS)


ADAM = prompts.of_this_task(adam_per_entry(0.05), prompts.CODA_PROMPT)


def rows_of(state):
  """Every [tasks, ...] leaf and slot of the components."""
  both = {'trainable': state.trainable, 'slots': state.opt_state}
  return {
    name: np.asarray(x)
    for name, x in zip(tree.names(both), jax.tree.leaves(both), strict=True)
    if name.endswith(prompts.CODA_PROMPT)
  }


def test_adam_leaves_other_tasks_bitwise_alone_on_one_trace():
  learner, traces = learner_of(ADAM), []

  @jax.jit
  def step(state):
    traces.append(state)
    return learner.step(state, BATCH, prompted.KEY)[0]

  state = learner.init(PARAMS, prompted.KEY)
  for task in range(TASKS):
    before = rows_of(state)
    for _ in range(3):
      state = step(state)
    state = learner.end_task(state, None, (), prompted.KEY)
    for name, now in rows_of(state).items():
      for k in range(TASKS):
        same = np.array_equal(now[k], before[name][k])
        assert same == (k != task), (name, task, k)
  assert len(traces) == 1
  testing.assert_same(after(TASKS), state.model_state, 'model state')


def test_coda_prompt_is_a_learner():
  # Not Adam: on this BERT plain `adapters.prefix` under it is not bitwise
  # the same in a scan and in a loop (a last bit). continual_zoo has Adam.
  optimizer = prompts.of_this_task(optim.sgd(1e-2), prompts.CODA_PROMPT)
  testing.check_learner(learner_of(optimizer), PARAMS, BATCH)


def test_the_gradient_through_steps_is_that_of_differences():
  # A computed query would move with the model and have no gradient.
  run = prompts.coda_prompt_forward(FORWARD, prompts.given_query)
  loss = losses.supervised(run, losses.softmax_cross_entropy)
  tuning = prompts.coda_prompt_tuning(
    prompted.SECOND, tasks=2, per_task=1, length=1, also=('head/.*',)
  )
  learner = prompts.counting_tasks(
    finetune(loss, optim.sgd(0.05), tuning=tuning, penalty=PENALTY), 2
  )
  params, outer = prompted.grown(tuning)

  def init(own, rng):
    still = jax.tree.map(lambda x: x.astype('float64'), params)
    return learner.init(tree.combine(still, own), rng)

  whole = learner._replace(init=init)
  batch = {**BATCH, 'query': ASKED}
  grads = testing.check_meta_gradient(whole, outer, batch, loss)
  for name in tree.names(outer):
    assert np.abs(tree.get(grads, name)[0]).max() > 0, name


def test_bad_requests_are_refused():
  with pytest.raises(UsageError, match='at least 1, 1 and 0'):
    prompts.coda_prompt_tuning(prompted.BOTH, tasks=1, per_task=0, length=1)
  with pytest.raises(UsageError, match='no leaf `....components`'):
    RUN(PARAMS, after(1), BATCH, None)
  with pytest.raises(UsageError, match="no 'task'"):
    RUN(GROWN, after(1), BATCH, prompted.KEY)
  with pytest.raises(UsageError, match="model state has no 'prompts'"):
    RUN(GROWN, {}, BATCH, None)
  with pytest.raises(UsageError, match="model state has no 'prompts'"):
    ADAM.update(TRAINABLE, ADAM.init(TRAINABLE), TRAINABLE)
  with pytest.raises(UsageError, match=r'\[in, out\]'):
    what = prompts.coda_prompt_tuning(
      'body/layer_0/attention/(key|value)/bias',
      tasks=1,
      per_task=1,
      length=1,
    )
    what.init(PARAMS, prompted.KEY)
