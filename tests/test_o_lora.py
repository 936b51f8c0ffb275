"""O-LoRA: each task's factors orthogonal to those before."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_methods as methods
import toys

import fmeta
from fmeta import (
  UsageError,
  adapters,
  continual,
  models,
  optim,
  penalty,
  train,
  tree,
)
from fmeta.learner import finetune
from fmeta.testing import assert_same

LOSS, PARAMS, BATCH, FORWARD = toys.problem(dropout=0.2)
KEY = jax.random.key(6)
MATRICES = 'body/.*/kernel'
LORA = adapters.lora(MATRICES, rank=2, also=('head/.*',))
KERNELS = ('body/layer_0/kernel', 'body/layer_1/kernel')


def learner_of(hold, tuning=LORA):
  inner = finetune(
    LOSS, fmeta.adamw_per_leaf(0.02), tuning=tuning, penalty=hold
  )
  return continual.fold(inner)


def factors(random, sizes=(6, 5), rank=2):
  leaves = {
    f'layer_{k}': {
      'kernel.lora_a': jnp.asarray(random.normal(size=(size, rank))),
      'kernel.lora_b': jnp.asarray(random.normal(size=(rank, 3))),
    }
    for k, size in enumerate(sizes)
  }
  return {'body': leaves}


def a_of(trainable, kernel):
  return np.asarray(tree.get(trainable, f'{kernel}.lora_a'))


def remembering(hold, tasks):
  state = hold.init(tasks[0], {})
  for each in tasks:
    state = hold.consolidate(state, each, {}, {}, FORWARD, [], KEY)
  return state


def slopes(hold, now, state):
  return jax.value_and_grad(
    lambda leaves: hold.value(leaves, {}, state, BATCH, None)
  )(now)


def test_value_and_gradient_are_those_of_the_papers_equation(x64):
  random = np.random.default_rng(0)
  *past, now = (factors(random) for _ in range(3))
  state = remembering(continual.o_lora(1.0, 4), past)

  # The strength may be traced.
  value, grads = jax.jit(
    lambda strength: slopes(continual.o_lora(strength, 4), now, state)
  )(0.7)
  total = 0.0
  for kernel in KERNELS:
    new, slope = a_of(now, kernel), 0.0
    for each in past:
      old = a_of(each, kernel)
      total += 0.7 * sum(
        float(old[:, j] @ new[:, k]) ** 2 for j in range(2) for k in range(2)
      )
      slope = slope + 2 * 0.7 * old @ (old.T @ new)
    np.testing.assert_allclose(a_of(grads, kernel), slope, rtol=1e-12)
    assert not np.any(tree.get(grads, f'{kernel}.lora_b'))
  np.testing.assert_allclose(value, total, rtol=1e-12)


def test_orthogonal_factors_cost_nothing_and_have_no_gradient():
  hold = continual.o_lora(5.0, 2)
  now = factors(np.random.default_rng(0))
  # Other rows, so that products are exactly zero.
  rows = lambda keep: (
    lambda x: jnp.where(keep(jnp.arange(len(x)))[:, None], x, 0)
  )
  old = jax.tree.map(rows(lambda i: i % 2 == 0), now)
  new = jax.tree.map(rows(lambda i: i % 2 == 1), now)
  state = remembering(hold, [old])
  value, grads = slopes(hold, new, state)
  assert value == 0 and not any(np.any(g) for g in jax.tree.leaves(grads))
  assert slopes(hold, now, state)[0] > 0


def test_one_task_is_plain_lora_bitwise():
  learner = learner_of(continual.o_lora(10.0, 3))
  plain = learner_of(penalty.no_penalty())
  states = [each.init(PARAMS, KEY) for each in (learner, plain)]
  for _ in range(3):
    states = [
      jax.jit(each.step)(state, BATCH, KEY)[0]
      for each, state in zip((learner, plain), states, strict=True)
    ]
  left = [state.replace(penalty_state={}) for state in states]
  assert_same(left[1], left[0], 'in the task')
  ended = [
    each.end_task(state, FORWARD, [], KEY).replace(penalty_state={})
    for each, state in zip((learner, plain), states, strict=True)
  ]
  assert_same(ended[1], ended[0], 'at its end')


def overlap(strength):
  """Of the second task's factors with the first's, and the second loss."""
  learner = learner_of(continual.o_lora(strength, 2))
  state, step = learner.init(PARAMS, KEY), jax.jit(learner.step)
  for k in range(2):
    for _ in range(30):
      state, aux = step(state, toys.batch_of(seed=k), KEY)
    if k == 0:
      past = state.trainable
      state = learner.end_task(state, FORWARD, [], KEY)
      held = state.penalty_state
  for kernel in KERNELS:
    np.testing.assert_array_equal(held['past'][kernel][0], a_of(past, kernel))
    assert not np.any(held['past'][kernel][1])
  products = [a_of(past, k).T @ a_of(state.trainable, k) for k in KERNELS]
  return sum(float((p**2).sum()) for p in products)


def test_the_second_task_learns_beside_the_first():
  assert overlap(30.0) < 0.02 * overlap(0.0)


def test_the_kernel_of_a_convolution_is_the_matrix_of_its_leading_axes():
  random = np.random.default_rng(0)
  leaf = jnp.asarray(random.normal(size=(3, 3, 2, 4)), jnp.float32)
  trainable = {'conv': {'kernel.lora_a': leaf}}
  hold = continual.o_lora(1.0, 1)
  state = remembering(hold, [trainable])
  matrix = np.asarray(leaf).reshape(18, 4)
  np.testing.assert_allclose(
    slopes(hold, trainable, state)[0],
    np.sum((matrix.T @ matrix) ** 2),
    rtol=1e-5,  # a sum of 16 squares of sums of 18 in float32
  )


def test_more_tasks_than_places_are_refused_and_nan_where_nothing_can_raise():
  hold = continual.o_lora(1.0, num_tasks=1)
  now = factors(np.random.default_rng(0))
  full = remembering(hold, [now])
  with pytest.raises(UsageError, match='o_lora has room for num_tasks=1'):
    hold.consolidate(full, now, {}, {}, FORWARD, [], KEY)
  over = jax.jit(lambda s: hold.consolidate(s, now, {}, {}, FORWARD, [], KEY))
  assert np.isnan(slopes(hold, now, over(full))[0])


def test_bad_requests_are_refused():
  with pytest.raises(UsageError, match='num_tasks=0'):
    continual.o_lora(1.0, 0)
  for tuning in (fmeta.full(), adapters.lora_fa(MATRICES, rank=2)):
    learner = finetune(
      LOSS, optim.sgd(0.1), tuning=tuning, penalty=continual.o_lora(1.0, 2)
    )
    with pytest.raises(UsageError, match='none of them moves.*tuning=lora'):
      learner.init(PARAMS, KEY)


def test_one_program_serves_all_tasks_of_a_text_model_beside_another_penalty():
  tuning = adapters.lora(
    'body/.*/(query|value)/kernel', rank=2, also=('head/.*',)
  )
  hold = penalty.all_of(continual.o_lora(1.0, 3), penalty.l2_sp(0.1))
  learner = continual.fold(
    finetune(
      methods.OF_TEXT, fmeta.adamw_per_leaf(0.01), tuning=tuning, penalty=hold
    )
  )
  params, _ = models.init(methods.BERT, KEY, methods.TEXT)
  stages = [
    train.Stage(f't{k}', lambda i: methods.TEXT, 4, ends_task=True)
    for k in range(3)
  ]
  fitted = train.fit(
    learner,
    learner.init(params, KEY),
    stages,
    KEY,
    forward=models.forward(methods.BERT),
    steps_per_dispatch=4,
    quiet=True,
  )
  assert fitted.traces == 1
  penalties = [record['penalty'] for record in fitted.history]
  assert penalties[0] == 0 and min(penalties[4:]) > 0
  past, tasks = (fitted.state.penalty_state[0][k] for k in ('past', 'tasks'))
  assert tasks == 3 and all(np.all(np.any(x, (1, 2))) for x in past.values())
