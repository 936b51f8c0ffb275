"""DualPrompt: a general prefix, and an expert one by task or by key."""

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

TASKS, GENERAL, EXPERT, STRENGTH = 3, 2, 3, 0.7
TUNING = prompts.dual_prompt_tuning(
  general=(prompted.FIRST,),
  expert=(prompted.SECOND,),
  tasks=TASKS,
  general_length=GENERAL,
  expert_length=EXPERT,
  also=('head/.*',),
)
GROWN, TRAINABLE = prompted.grown(TUNING)
KEYS = 'body/layer_1/attention/key/kernel.expert_keys'
GROWN = siblings.grow(GROWN, {KEYS: prompted.near_queries([0, 1, 2])})
RUN = jax.jit(prompts.dual_prompt_forward(FORWARD, QUERY))
LOSS = prompts.dual_prompt_loss(
  FORWARD, QUERY, losses.softmax_cross_entropy, STRENGTH
)
SLOPE = jax.jit(jax.value_and_grad(LOSS, has_aux=True))
NUMBERED = {**BATCH, 'task': np.array([0, 2, 2, 0], np.int32)}


def after(tasks):
  """The model state after so many tasks."""
  told = {'task': max(tasks - 1, 0), 'seen': tasks}
  return {'prompts': {k: jnp.asarray(x, jnp.int32) for k, x in told.items()}}


def of_kernel(layer, part):
  return f'body/layer_{layer}/attention/{part}/kernel'


def with_experts(experts):
  """Each row alone, with the general prefix and that of expert `experts[k]`."""
  leaves = {}
  for part in ('key', 'value'):
    first, second = of_kernel(0, part), of_kernel(1, part)
    general = np.asarray(tree.get(GROWN, first + '.prefix'))
    leaves[first + '.prefix'] = np.broadcast_to(general, (ROWS, *general.shape))
    expert = np.asarray(tree.get(GROWN, second + '.expert_prefix'))
    leaves[second + '.prefix'] = expert[experts]
  return prompted.alone(leaves)


def test_the_prompts_move_and_the_model_does_not():
  shapes = {n: tree.get(TRAINABLE, n).shape for n in tree.names(TRAINABLE)}
  assert shapes == {
    of_kernel(0, 'key') + '.prefix': (GENERAL, 8),
    of_kernel(0, 'value') + '.prefix': (GENERAL, 8),
    of_kernel(1, 'key') + '.expert_prefix': (TASKS, EXPERT, 8),
    of_kernel(1, 'value') + '.expert_prefix': (TASKS, EXPERT, 8),
    KEYS: (TASKS, 8),
    'head/kernel': (8, 3),
    'head/bias': (3,),
  }


def test_in_training_a_row_has_the_expert_of_its_task():
  found, state = RUN(GROWN, prompts.no_tasks(), NUMBERED, prompted.KEY)
  np.testing.assert_allclose(
    found, with_experts(NUMBERED['task']), rtol=1e-5, atol=1e-6
  )
  assert state['prompts'] == {'task': 2, 'seen': 3}


def test_in_evaluation_a_row_has_the_expert_of_the_nearest_key():
  nearest = prompted.cosine(ASKED, tree.get(GROWN, KEYS)).argmax(1)
  assert len(set(nearest)) > 1
  # It says another task, and nobody listens.
  lying = {**BATCH, 'task': (nearest + 1).astype(np.int32) % TASKS}
  found, state = RUN(GROWN, after(TASKS), lying, None)
  np.testing.assert_allclose(found, with_experts(nearest), rtol=1e-5, atol=1e-6)
  testing.assert_same(after(TASKS), state, 'model state')


def test_experts_of_later_tasks_are_not_asked():
  match = prompted.cosine(ASKED, tree.get(GROWN, KEYS))
  nearest = match[:, :2].argmax(1)
  assert np.any(nearest != match.argmax(1))
  found, _ = RUN(GROWN, after(2), BATCH, None)
  np.testing.assert_allclose(found, with_experts(nearest), rtol=1e-5, atol=1e-6)


def test_the_loss_adds_the_distance_to_the_key_of_the_task():
  (loss, aux), grads = SLOPE(GROWN, after(0), NUMBERED, prompted.KEY)
  task = NUMBERED['task']
  keys = np.asarray(tree.get(GROWN, KEYS), np.float64)
  match = prompted.cosine(ASKED, keys)[np.arange(ROWS), task]
  plain = prompted.cross_entropy(with_experts(task), BATCH['label'])
  expected = np.mean(plain + STRENGTH * (1 - match))
  np.testing.assert_allclose(loss, expected, rtol=1e-5)
  np.testing.assert_allclose(aux.metrics['matching'], 1 - match.mean(), 1e-5)
  slope = np.zeros_like(keys)
  for query, k in zip(ASKED, task, strict=True):
    slope[k] -= STRENGTH / ROWS * prompted.slope_of_cosine(query, keys[k])
  np.testing.assert_allclose(tree.get(grads, KEYS), slope, rtol=1e-5, atol=1e-7)


def test_experts_and_keys_of_other_tasks_get_no_gradient():
  _, grads = SLOPE(GROWN, after(0), NUMBERED, prompted.KEY)
  for name in tree.names(TRAINABLE):
    size = np.abs(np.asarray(tree.get(grads, name)))
    if name.endswith(prompts.DUAL_PROMPT):
      np.testing.assert_array_equal(
        size.reshape(TASKS, -1).max(1) > 0, [True, False, True]
      )
    else:
      assert size.max() > 0


def test_the_order_of_a_batch_does_not_matter():
  order = np.array([2, 0, 3, 1])
  found = np.asarray(RUN(GROWN, after(TASKS), BATCH, None)[0])
  np.testing.assert_allclose(
    RUN(GROWN, after(TASKS), prompted.shuffled(BATCH, order), None)[0],
    found[order],
    rtol=1e-6,
    atol=1e-6,
  )


def test_padding_stays_unseen():
  other = BATCH['input_ids'] + 3 * (1 - BATCH['attention_mask'])
  np.testing.assert_allclose(
    RUN(GROWN, after(3), {**BATCH, 'input_ids': other}, None)[0],
    RUN(GROWN, after(3), BATCH, None)[0],
    rtol=1e-6,
  )


def test_prompts_of_length_zero_are_the_frozen_model():
  none = prompts.dual_prompt_tuning(
    general=(prompted.FIRST,),
    expert=(prompted.SECOND,),
    tasks=TASKS,
    general_length=0,
    expert_length=0,
  )
  params, _ = prompted.grown(none)
  np.testing.assert_array_equal(
    RUN(params, after(1), BATCH, None)[0],
    prompted.RUN(PARAMS, {}, BATCH, None)[0],
  )


def learner_of(optimizer):
  learner = finetune(LOSS, optimizer, tuning=TUNING)
  return prompts.counting_tasks(learner, TASKS)


def run_tasks(learner, tasks, steps=3):
  """The states at the start and after each task, on one trace."""
  traces = []

  @jax.jit
  def step(state):
    traces.append(state)
    return learner.step(state, BATCH, prompted.KEY)[0]

  states = [learner.init(PARAMS, prompted.KEY)]
  for _ in range(tasks):
    state = states[-1]
    for _ in range(steps):
      state = step(state)
    states.append(learner.end_task(state, None, (), prompted.KEY))
  assert len(traces) == 1
  return states


def rows_that_move(before, after, suffixes):
  """bool [tasks]: which rows of any such leaf, or of its slots, differ."""
  moved = np.zeros(TASKS, bool)
  for old, new in (
    (before.trainable, after.trainable),
    (before.opt_state, after.opt_state),
  ):
    for name, x, y in zip(
      tree.names(old), jax.tree.leaves(old), jax.tree.leaves(new), strict=True
    ):
      if name.endswith(suffixes):
        same = np.asarray(x == y).reshape(TASKS, -1).all(1)
        moved |= ~same
  return moved.tolist()


def test_adam_leaves_other_tasks_bitwise_alone():
  optimizer = prompts.of_this_task(adam_per_entry(0.05), prompts.DUAL_PROMPT)
  states = run_tasks(learner_of(optimizer), TASKS)
  for task in range(TASKS):
    moved = rows_that_move(states[task], states[task + 1], prompts.DUAL_PROMPT)
    assert moved == [k == task for k in range(TASKS)]
  # Without it momentum moves the first task's on, though it has no gradient.
  states = run_tasks(learner_of(optim.adam(0.05)), 2)
  moved = rows_that_move(states[1], states[2], prompts.DUAL_PROMPT)
  assert moved == [True, True, False]


def test_a_late_task_moves_as_under_a_new_optimiser():
  optimizer = prompts.of_this_task(adam_per_entry(0.05), prompts.DUAL_PROMPT)
  learner = learner_of(optimizer)
  late = run_tasks(learner, 2)[2]

  fresh = learner.init(learner.params(late), prompted.KEY)
  fresh = fresh.replace(memory=late.memory)
  step = jax.jit(lambda state: learner.step(state, BATCH, prompted.KEY)[0])
  found, expected = step(late).trainable, step(fresh).trainable
  for name in tree.names(TRAINABLE):
    if name.endswith(prompts.DUAL_PROMPT):
      before = tree.get(late.trainable, name)[2]
      after = tree.get(found, name)[2]
      np.testing.assert_array_equal(after, tree.get(expected, name)[2])
      assert np.any(before != after)


def test_dual_prompt_is_a_learner():
  # Not Adam: on this BERT plain `adapters.prefix` under it is not bitwise
  # the same in a scan and in a loop (a last bit). continual_zoo has Adam.
  optimizer = prompts.of_this_task(optim.sgd(1e-2), prompts.DUAL_PROMPT)
  testing.check_learner(learner_of(optimizer), PARAMS, BATCH)


def test_a_task_beyond_the_last_is_loud():
  (loss, aux), _ = SLOPE(
    GROWN,
    after(0),
    {**BATCH, 'task': np.full(ROWS, TASKS, np.int32)},
    prompted.KEY,
  )
  assert np.isnan(loss) and np.all(np.isnan(aux.outputs))
  learner = learner_of(optim.sgd(0.1))
  state = learner.init(PARAMS, prompted.KEY)
  for _ in range(TASKS):
    state = learner.end_task(state, None, (), prompted.KEY)
  with pytest.raises(UsageError, match='task 3 ends.* told of 3'):
    learner.end_task(state, None, (), prompted.KEY)


def test_bad_requests_are_refused():
  lengths = {'general_length': 1, 'expert_length': 1}
  twice = prompts.dual_prompt_tuning(
    general=(prompted.BOTH,), expert=(prompted.SECOND,), tasks=2, **lengths
  )
  with pytest.raises(UsageError, match='`general` and `expert`'):
    twice.init(PARAMS, prompted.KEY)
  with pytest.raises(UsageError, match='prompts for 0 tasks'):
    prompts.dual_prompt_tuning(
      general=(), expert=(prompted.SECOND,), tasks=0, **lengths
    )
  with pytest.raises(UsageError, match="no 'task'"):
    RUN(GROWN, after(0), BATCH, prompted.KEY)
  with pytest.raises(UsageError, match="model state has no 'prompts'"):
    RUN(GROWN, {}, BATCH, None)
  with pytest.raises(UsageError, match='says its .task. already'):
    learner = learner_of(optim.sgd(0.1))
    learner.step(learner.init(PARAMS, prompted.KEY), NUMBERED, prompted.KEY)


def test_there_may_be_no_general_prompt():
  tuning = prompts.dual_prompt_tuning(
    general=(),
    expert=(prompted.SECOND,),
    tasks=2,
    general_length=0,
    expert_length=1,
  )
  params, trainable = prompted.grown(tuning)
  assert not siblings.collect(trainable, '.prefix')
  assert np.all(np.isfinite(RUN(params, after(1), BATCH, None)[0]))
