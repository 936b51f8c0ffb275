"""What continual learning must do exactly, where theory says what that is.

No data and no tuning: linear-Gaussian tasks, quadratics, closed forms.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import streamed
import toys

from fmeta import losses, optim, penalty
from fmeta.learner import finetune

# Penalties

INPUTS, OUTPUTS, ROWS = 4, 2, 8


def _linear_task(seed, curvature=None):
  """Rows whose Gram matrix X'X / n is diagonal, with noisy targets."""
  random = np.random.default_rng(seed)
  if curvature is None:
    curvature = random.uniform(0.5, 2.0, INPUTS)
  columns = np.linalg.qr(random.normal(size=(ROWS, INPUTS)))[0]
  return {
    'x': jnp.asarray(columns * np.sqrt(ROWS * np.asarray(curvature))),
    'target': jnp.asarray(random.normal(size=(ROWS, OUTPUTS))),
  }


def _curvature(task):
  """Diagonal of the Hessian of the mean half squares, [inputs, 1]."""
  gram = np.asarray(task['x']).T @ np.asarray(task['x']) / ROWS
  np.testing.assert_allclose(gram, np.diag(np.diag(gram)), atol=1e-14)
  return np.diag(gram)[:, None]


def _least_squares(*tasks):
  """Training on all rows at once."""
  x, y = (
    np.concatenate([np.asarray(task[key]) for task in tasks])
    for key in ('x', 'target')
  )
  return np.linalg.lstsq(x, y, rcond=None)[0]


def _gaussian_fisher(forward, params, moving, model_state, batches, rng):
  """Of unit-variance Gaussians: mean over rows of sum_k (d f_k / d p)^2."""
  (batch,) = batches
  slopes = jax.jacobian(lambda p: forward(p, model_state, batch, None)[0])(
    moving
  )
  return jax.tree.map(lambda s: (s**2).sum(1).mean(0), slopes)


def _trainer(learner, num_steps):
  """`(state, batch) -> state` after so many steps on one batch."""

  @jax.jit
  def train(state, batch):
    def body(state, _):
      return learner.step(state, batch, streamed.KEY)[0], None

    return jax.lax.scan(body, state, length=num_steps)[0]

  return train


def _minima(made, tasks, num_steps=400):
  """The kernel after each task, trained to convergence by the one step."""
  learner = finetune(streamed.half_squares(), optim.sgd(0.15), penalty=made)
  params = {'kernel': jnp.zeros((INPUTS, OUTPUTS))}
  state, minima = learner.init(params, streamed.KEY), []
  train = _trainer(learner, num_steps)
  for task in tasks:
    state = train(state, task)
    minima.append(np.asarray(state.trainable['kernel']))
    state = learner.end_task(state, streamed.linear, [task], streamed.KEY)
  return minima


def test_online_ewc_of_three_linear_tasks_is_joint_least_squares(x64):
  tasks = [_linear_task(seed) for seed in range(3)]
  found = _minima(penalty.online_ewc(1.0, _gaussian_fisher), tasks)
  for last, kernel in enumerate(found):
    joint = _least_squares(*tasks[: last + 1])
    np.testing.assert_allclose(kernel, joint, atol=1e-9)
  assert np.abs(found[2] - _least_squares(tasks[2])).max() > 0.1


def test_ewc_is_joint_least_squares_for_two_tasks_and_then_counts_twice(x64):
  # A term per task holds p_2 where term 1 has already pulled it, so task 1 is
  # in two terms of the third task's loss: Huszar's objection.
  tasks = [_linear_task(seed) for seed in range(3)]
  found = _minima(penalty.ewc(1.0, _gaussian_fisher), tasks)
  for last in (0, 1):
    joint = _least_squares(*tasks[: last + 1])
    np.testing.assert_allclose(found[last], joint, atol=1e-9)
  h = [_curvature(task) for task in tasks]
  own = _least_squares(tasks[2])
  third = (h[0] * found[0] + h[1] * found[1] + h[2] * own) / sum(h)
  np.testing.assert_allclose(found[2], third, atol=1e-9)
  assert np.abs(found[2] - _least_squares(*tasks)).max() > 1e-2


def test_ewc_of_three_tasks_without_a_common_direction_is_joint(x64):
  apart = [[2.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.7, 0.0], [0.0, 0.0, 0.0, 1.5]]
  tasks = [_linear_task(seed, curve) for seed, curve in enumerate(apart)]
  found = _minima(penalty.ewc(1.0, _gaussian_fisher), tasks)
  np.testing.assert_allclose(found[2], _least_squares(*tasks), atol=1e-9)


def test_l2_sp_rests_between_the_start_and_the_optimum(x64):
  task = _linear_task(0)
  h, start = _curvature(task), jnp.full((INPUTS, OUTPUTS), 0.3)
  learner = finetune(
    streamed.half_squares(), optim.sgd(0.15), penalty=penalty.l2_sp(0.8)
  )
  state = learner.init({'kernel': start}, streamed.KEY)
  state = _trainer(learner, 400)(state, task)
  rest = (h * _least_squares(task) + 0.8 * start) / (h + 0.8)
  np.testing.assert_allclose(state.trainable['kernel'], rest, atol=1e-12)


def test_mas_rests_where_curvature_and_importance_balance(x64):
  tasks = [_linear_task(seed) for seed in range(2)]
  first, found = _minima(penalty.mas(0.4), tasks)
  x = np.asarray(tasks[0]['x'])
  # E |d ||y||^2 / d W_ik| = E |2 y_k x_i| at the first task's optimum.
  omega = np.abs(2 * (x @ first)[:, None] * x[:, :, None]).mean(0)
  h = _curvature(tasks[1])
  own = _least_squares(tasks[1])
  rest = (h * own + 2 * 0.4 * omega * first) / (h + 2 * 0.4 * omega)
  np.testing.assert_allclose(found, rest, atol=1e-9)


def _path_and_drop(loss, params, batch, rate, num_steps):
  """The sum of SI's path integral and how far the loss fell."""
  learner = finetune(loss, optim.sgd(rate), penalty=penalty.si(1.0))
  state = learner.init(params, streamed.KEY)
  state = _trainer(learner, num_steps)(state, batch)
  path = sum(x.sum() for x in jax.tree.leaves(state.penalty_state['path']))
  ends = [loss(p, {}, batch, None)[0] for p in (params, state.trainable)]
  return float(path), float(ends[0] - ends[1])


PROBLEMS = {
  'quadratic': (
    streamed.half_squares(),
    {'kernel': np.ones((INPUTS, OUTPUTS))},
    lambda: _linear_task(0),
  ),
  'network': (
    losses.supervised(toys.three_layers, losses.softmax_cross_entropy),
    toys.three_kernels(),
    lambda: toys.batch_of(6),
  ),
}


@pytest.mark.parametrize('name', PROBLEMS)
def test_si_conserves_the_drop_of_the_loss_up_to_the_rate(name, x64):
  loss, params, batch = PROBLEMS[name]
  params, batch = toys.double((params, batch()))
  errors = []
  # The same way in more and smaller steps.
  for rate, num_steps in ((0.02, 100), (0.01, 200), (0.005, 400)):
    path, drop = _path_and_drop(loss, params, batch, rate, num_steps)
    errors.append(path - drop)
    assert drop > 0.1
    assert abs(path - drop) < 2 * rate * drop
  ratios = np.divide(errors[:-1], errors[1:])
  # First order: halving the rate halves the error, up to the next order.
  np.testing.assert_allclose(ratios, 2, rtol=0.05)


def test_si_of_a_quadratic_misses_the_drop_by_its_second_order(x64):
  # L(p) - L(p + u) = -g'u - u'Hu / 2 exactly, so one step tells all.
  loss, params, batch = PROBLEMS['quadratic']
  params, batch = toys.double((params, batch()))
  path, drop = _path_and_drop(loss, params, batch, 0.1, 1)
  slope = jax.grad(lambda p: loss(p, {}, batch, None)[0])(params)['kernel']
  second = 0.5 * 0.1**2 * (_curvature(batch) * slope**2).sum()
  np.testing.assert_allclose(path - drop, second, rtol=1e-10)


NORMED = toys.NormNet()
DROPPED = toys.Net(dropout=0.5)
CLASSES = np.ones((1, 3), bool)


def _consolidating(forward, model_state):
  """All that run the model at a task's end (online EWC as EWC), or later."""
  return {
    'ewc': penalty.ewc(1.0),
    'mas': penalty.mas(1.0),
    'lwf': penalty.lwf(forward, 1.0, CLASSES, model_state=model_state),
    'feature_distillation': penalty.feature_distillation(
      forward, 1.0, model_state
    ),
  }


@pytest.mark.parametrize('name', _consolidating(None, None))
def test_importance_passes_leave_batch_norm_alone(name):
  forward = toys.forward_of(NORMED)
  params, model_state = toys.init_of(NORMED)
  made = _consolidating(forward, model_state)[name]
  loss = losses.supervised(forward, losses.softmax_cross_entropy)
  learner = finetune(loss, optim.sgd(0.1), penalty=made)
  batch = toys.batch_of(8)
  state = learner.init(params, streamed.KEY, model_state)
  moved = jax.tree.map(lambda x: x + 0.1, (params, model_state))
  state = state.replace(trainable=moved[0], model_state=moved[1])
  ended = learner.end_task(state, forward, [batch], streamed.KEY)
  again = ended.replace(penalty_state=state.penalty_state)
  jax.tree.map(np.testing.assert_array_equal, again, state)
  # Rows do not see each other, as they would through a batch's statistics.
  rows = [jax.tree.map(lambda x, i=i: x[i : i + 1], batch) for i in range(8)]
  alone = learner.end_task(state, forward, rows, streamed.KEY)
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7),
    ended.penalty_state,
    alone.penalty_state,
  )
  changed = zip(
    jax.tree.leaves(ended.penalty_state),
    jax.tree.leaves(state.penalty_state),
    strict=True,
  )
  assert any(np.any(x != y) for x, y in changed)


@pytest.mark.parametrize('name', ['ewc', 'mas'])
def test_importance_passes_run_without_dropout(name):
  forward, still = toys.forward_of(DROPPED), toys.forward_of(toys.Net())
  params, _ = toys.init_of(DROPPED)
  made = _consolidating(forward, None)[name]
  start = made.init(params, params)
  ends = [
    made.consolidate(
      start, params, params, {}, model, [toys.batch_of(8)], jax.random.key(seed)
    )
    for model, seed in ((forward, 0), (forward, 1), (still, 0))
  ]
  for end in ends[1:]:
    jax.tree.map(np.testing.assert_array_equal, end, ends[0])
  assert penalty.max_importance(ends[0]) > 0


@pytest.mark.parametrize('name', ['lwf', 'feature_distillation'])
def test_distillation_rests_at_the_teacher_even_with_dropout(name, x64):
  forward = toys.forward_of(DROPPED)
  params, batch = toys.double((toys.init_of(DROPPED)[0], toys.batch_of(8)))
  made = _consolidating(forward, None)[name]
  state = made.consolidate(
    made.init(params, params), params, params, {}, forward, [batch], None
  )
  slope = jax.jit(
    jax.value_and_grad(lambda p: made.value(p, p, state, batch, streamed.KEY))
  )
  value, grads = slope(params)
  np.testing.assert_allclose(value, 0, atol=1e-15)
  for g in jax.tree.leaves(grads):
    np.testing.assert_allclose(g, 0, atol=1e-14)
  moved, grads = slope(jax.tree.map(lambda x: x + 0.2, params))
  assert moved > 1e-3
  assert any(np.any(g) for g in jax.tree.leaves(grads))
