"""What continual learning must do exactly, where theory says what that is.

No data and no tuning: linear-Gaussian tasks, quadratics, closed forms.
"""

from itertools import combinations

import cones
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import streamed
import toys
from scipy import stats

from fmeta import continual, losses, memory, optim, penalty
from fmeta.continual.gem import project, project_on_one
from fmeta.learner import beside, finetune

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


# Memories

STREAM_KEY = jax.random.key(31)
NUMBERED = {
  'x': jax.ShapeDtypeStruct((), jnp.int32),
  'label': jax.ShapeDtypeStruct((), jnp.int32),
}


def _contents(make, labels, trials=3000):
  """bool [trials, rows]: what streams of these labels leave in a memory."""
  held, size = make(), len(labels)
  rows = {'x': jnp.arange(size), 'label': jnp.asarray(labels, jnp.int32)}

  def stream(key):
    # In three batches, so that early rows can be displaced.
    filled = held.init()
    for part in jnp.split(jnp.arange(size), 3):
      batch = {name: value[part] for name, value in rows.items()}
      filled = held.insert(filled, batch, jnp.ones(len(part)), key)
    return filled['rows']['x']

  keys = jax.random.split(STREAM_KEY, trials)
  chosen = np.asarray(jax.jit(jax.vmap(stream))(keys))
  return np.any(chosen[:, :, None] == np.arange(size), axis=1)


def _uniform_p_value(inside, capacity, order):
  """Of the counts of all `order`-subsets, if all contents were equally likely.

  With d the counts minus their mean and C their covariance in one trial,
  d' (trials C)^+ d is chi-square with rank(C) degrees of freedom.
  """
  size = inside.shape[1]
  groups = list(combinations(range(size), order))

  def indicators(sets):
    return np.stack([sets[:, list(group)].all(1) for group in groups], 1)

  possible = np.zeros((0, size), bool)
  for content in combinations(range(size), capacity):
    row = np.isin(np.arange(size), content)
    possible = np.concatenate([possible, row[None]])
  equal = indicators(possible).astype(float)
  covariance = np.cov(equal.T, bias=True)
  gap = indicators(inside).sum(0) - len(inside) * equal.mean(0)
  inverse = np.linalg.pinv(covariance, rcond=1e-9, hermitian=True)
  statistic = gap @ inverse @ gap / len(inside)
  return stats.chi2.sf(statistic, np.linalg.matrix_rank(covariance, 1e-9))


@pytest.mark.parametrize('order', [1, 2])
def test_reservoir_inclusion_is_uniform_for_rows_and_for_pairs(order):
  inside = _contents(lambda: memory.reservoir(4, NUMBERED), [0] * 9)
  assert np.all(inside.sum(1) == 4)
  assert 0.001 < _uniform_p_value(inside, 4, order) < 0.999


@pytest.mark.parametrize('order', [1, 2])
def test_class_balanced_inclusion_is_uniform_within_a_class(order):
  # Class 0 has 6 rows, class 1 has 3; each gets 3 of the 6 slots.
  labels = [0, 0, 1, 0, 0, 1, 0, 1, 0]
  inside = _contents(lambda: memory.class_balanced(6, NUMBERED), labels)
  common = inside[:, np.asarray(labels) == 0]
  assert np.all(common.sum(1) == 3) and np.all(inside.sum(1) == 6)
  assert 0.001 < _uniform_p_value(common, 3, order) < 0.999


def test_the_chi_square_sees_what_is_not_uniform():
  random = np.random.default_rng(0)
  contents = [random.permutation(9)[:4] for _ in range(3000)]
  fair = np.stack([np.isin(np.arange(9), c) for c in contents])
  assert 0.001 < _uniform_p_value(fair, 4, 1) < 0.999
  late = fair[fair[:, 8] | (random.random(3000) < 0.5)]
  assert _uniform_p_value(late, 4, 1) < 1e-6
  # Four neighbours on a circle: uniform row by row, but not in pairs.
  windows = np.isin(np.arange(9), np.arange(4))
  windows = np.stack([np.roll(windows, k) for k in random.integers(0, 9, 3000)])
  assert _uniform_p_value(windows, 4, 1) > 0.001
  assert _uniform_p_value(windows, 4, 2) < 1e-6


def test_a_memory_is_the_same_in_batches_and_row_by_row():
  labels = jnp.arange(30) ** 2 % 7
  for make, merge in (
    (memory.reservoir, memory.merge),
    (memory.class_balanced, memory.merge_balanced),
  ):
    held, found = make(8, NUMBERED), []
    insert = jax.jit(held.insert)
    canonical = jax.jit(lambda filled, merge=merge: merge([filled], 8))
    for size in (1, 6):
      filled = held.init()
      for start in range(0, 30, size):
        x = jnp.arange(start, start + size)
        rows = {'x': x, 'label': labels[x]}
        filled = insert(filled, rows, jnp.ones(size), STREAM_KEY)
      found.append(canonical(filled))
    jax.tree.map(np.testing.assert_array_equal, found[0], found[1])


def _remembered(params, rows=8):
  """A batch beside rows whose logits are the model's own."""
  past = toys.batch_of(rows, seed=5)
  outputs = toys.three_layers(params, {}, past, None)[0]
  batch = toys.batch_of(6)
  return beside(batch, {**past, 'outputs': outputs}, jnp.ones(rows))


def test_der_at_the_logits_it_remembers_has_exactly_the_plain_gradient():
  params, ce = toys.three_kernels(), losses.softmax_cross_entropy
  batch = _remembered(params)
  terms = [
    jax.grad(continual.der(toys.three_layers, ce, alpha), has_aux=True)
    for alpha in (0.0, 1e6)
  ]
  without, within = (grad(params, {}, batch, None)[0] for grad in terms)
  jax.tree.map(np.testing.assert_array_equal, without, within)
  # Not so a step away.
  moved = jax.tree.map(lambda x: x + 0.1, params)
  without, within = (grad(moved, {}, batch, None)[0] for grad in terms)
  gap = jax.tree.map(lambda x, y: float(jnp.abs(x - y).max()), without, within)
  assert all(x > 1 for x in jax.tree.leaves(gap))


def test_der_plus_plus_at_the_logits_it_remembers_adds_a_cross_entropy(x64):
  # A linear model: dCE/dW = x' (softmax(xW) - onehot) / rows.
  def linear(params, model_state, batch, rng):
    return batch['x'] @ params['w'], model_state

  random = np.random.default_rng(3)
  params = {'w': jnp.asarray(random.normal(size=(6, 3)))}
  own, past = toys.double((toys.batch_of(5), toys.batch_of(8, seed=2)))
  outputs = linear(params, {}, past, None)[0]
  batch = beside(own, {**past, 'outputs': outputs}, jnp.ones(8))
  loss_fn = continual.der_plus_plus(
    linear, losses.softmax_cross_entropy, alpha=1e6, beta=0.7
  )
  found = jax.grad(loss_fn, has_aux=True)(params, {}, batch, None)[0]['w']

  def by_hand(rows):
    x, label = np.asarray(rows['x']), np.asarray(rows['label'])
    scores = np.exp(x @ np.asarray(params['w']))
    probability = scores / scores.sum(1, keepdims=True)
    return x.T @ (probability - np.eye(3)[label]) / len(x)

  odd = jax.tree.map(lambda x: x[1::2], past)
  np.testing.assert_allclose(
    found, by_hand(own) + 0.7 * by_hand(odd), rtol=1e-12
  )


# Projections


@pytest.mark.parametrize('kind', cones.KINDS)
def test_the_dual_of_gem_meets_its_kkt_conditions_on_125_programs(kind, x64):
  # Eight kinds: one thousand programs of 2 to 20 tasks.
  rows, present, vectors = cones.draw(kind, 125)
  gram = rows @ rows.transpose(0, 2, 1)
  products = np.einsum('btp,bp->bt', rows, vectors)
  solve = jax.jit(jax.vmap(continual.nonnegative_qp))
  dual = np.asarray(solve(gram, products, present))
  assert np.all(dual >= 0) and not np.any(dual[~present])
  moved = vectors + np.einsum('bt,btp->bp', dual, rows)
  # <g~, g_k> / (|g| |g_k|): nonnegative, and zero where the dual is not.
  sizes = cones.lengths(rows) * cones.lengths(vectors)[:, None]
  slopes = np.einsum('btp,bp->bt', rows, moved) / sizes
  assert slopes.min() >= -1e-9
  assert np.abs(slopes[dual > 0]).max() <= 1e-9
  expected = [
    cones.nearest(cone, vector)
    for cone, vector in zip(rows, vectors, strict=True)
  ]
  # Rows that all but oppose each other to 1e-4 make a matrix of condition
  # 1e8, known to 1e-16: the projection itself moves by up to 1e-8 over 1e-4.
  atol = 1e-5 if kind == 'near opposites' else 1e-9
  np.testing.assert_allclose(moved, expected, rtol=0, atol=atol)


@pytest.mark.parametrize('opposed', [True, False])
def test_a_gem_is_gem_of_one_memory(opposed):
  loss, params, batch, _ = toys.problem(dropout=0.2)
  past = {'x': batch['x'], 'label': (batch['label'] + opposed) % 3}
  rows = {key: x[None] for key, x in past.items()}
  step = lambda taken: finetune(loss, optim.sgd(0.1), value_and_grad=taken)
  one, several = step(continual.a_gem()), step(continual.gem(margin=0.0))
  start = one.init(params, jax.random.key(0))
  key = jax.random.key(1)
  found, _ = jax.jit(one.step)(start, beside(batch, past, jnp.ones(8)), key)
  expected, _ = jax.jit(several.step)(
    start, beside(batch, rows, jnp.ones((1, 8))), key
  )
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7),
    found.trainable,
    expected.trainable,
  )
  alone, _ = jax.jit(finetune(loss, optim.sgd(0.1)).step)(start, batch, key)
  same = jax.tree.map(np.array_equal, found.trainable, alone.trainable)
  assert all(jax.tree.leaves(same)) != opposed


def test_a_reference_of_zero_changes_nothing():
  grads = {'a': jnp.asarray([1.0, -2.0]), 'b': jnp.asarray(3.0)}
  zero = jax.tree.map(jnp.zeros_like, grads)
  several = jax.tree.map(lambda x: jnp.stack([x, x]), zero)
  for found in (
    jax.jit(project_on_one)(grads, zero),
    jax.jit(project)(grads, several, jnp.asarray([True, False]), 0.5),
    # Its derivative has no NaN, either.
    jax.grad(
      lambda g: sum(
        jnp.vdot(x, y)
        for x, y in zip(
          jax.tree.leaves(project_on_one(g, zero)),
          jax.tree.leaves(grads),
          strict=True,
        )
      )
    )(grads),
  ):
    jax.tree.map(np.testing.assert_array_equal, found, grads)


def test_the_basis_of_ogd_is_orthonormal_and_full_rank_rows_alone_enter():
  _, params, batch, forward = toys.problem()
  twice = jax.tree.map(lambda x: jnp.concatenate([x, x[:3]]), batch)
  hold = continual.ogd(capacity=20, rows_per_task=11)
  state = hold.init(params, params)
  for seed in range(2):
    key = jax.random.key(seed)
    state = hold.consolidate(state, params, params, {}, forward, [twice], key)
  # Eight different examples, whatever how often they come.
  count = int(state['count'])
  assert count == 8
  gram = np.asarray(state['basis'], float) @ np.asarray(state['basis']).T
  expected = np.diag(np.arange(20) < count).astype(float)
  np.testing.assert_allclose(gram, expected, atol=1e-6)
