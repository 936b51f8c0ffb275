import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from fmeta import adapters, fisher, losses, optim, penalty, tree, tuning
from fmeta.errors import UsageError
from fmeta.learner import finetune
from fmeta.testing import check_gradient

KEY = jax.random.key(7)


def _random_like(params, seed):
  random = np.random.default_rng(seed)
  return jax.tree.map(
    lambda x: jnp.asarray(random.normal(size=x.shape), x.dtype), params
  )


def _task(curvature):
  """An importance that ignores the data: any diagonal can be remembered."""
  return lambda forward, params, moving, state, batches, rng: curvature


def test_no_penalty_is_zero_and_leaves_gradients_alone():
  nothing = penalty.no_penalty()
  assert nothing.init({}, {}) == {}
  assert nothing.value({}, {}, {}, {}, None) == 0
  assert nothing.direct({'p': 1}, {}) == {'p': 1}
  assert nothing.consolidate({'s': 1}, {}, {}, {}, None, [], KEY) == {'s': 1}


@pytest.mark.parametrize('num_tasks', [1, 2, 3])
def test_ewc_is_the_sum_of_the_quadratics_of_all_tasks(num_tasks, x64):
  params = toys.double({'a': jnp.ones((2, 3)), 'b': jnp.zeros(4)})
  optima = [_random_like(params, k) for k in range(num_tasks)]
  fishers = [
    jax.tree.map(jnp.square, _random_like(params, 10 + k))
    for k in range(num_tasks)
  ]
  fishers[0]['b'] = jnp.zeros_like(fishers[0]['b'])  # a dead parameter
  state = penalty.ewc(3.0).init(params, params)
  assert penalty.max_importance(state) == 0
  for optimum, curvature in zip(optima, fishers, strict=True):
    ewc = penalty.ewc(3.0, _task(curvature))
    state = ewc.consolidate(state, optimum, optimum, {}, None, [], KEY)

  def by_hand(p):
    return 1.5 * sum(
      jnp.sum(f[key] * (p[key] - o[key]) ** 2)
      for f, o in zip(fishers, optima, strict=True)
      for key in p
    )

  point = _random_like(params, 99)
  found = jax.grad(lambda p: ewc.value(p, p, state, {}, None))(point)
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-12, atol=1e-14),
    found,
    jax.grad(by_hand)(point),
  )
  largest = max(f.max() for f in jax.tree.leaves(sum_trees(fishers)))
  assert penalty.max_importance(state) == largest
  assert jax.tree.structure(state) == jax.tree.structure(
    ewc.init(params, params)
  )


def sum_trees(trees):
  return jax.tree.map(lambda *x: sum(x), *trees)


def test_l2_sp_pulls_to_the_start_by_its_multipliers():
  params = {
    'body': {'k': jnp.asarray([1.0])},
    'head': {'k': jnp.asarray([2.0])},
  }
  pull = penalty.l2_sp(4.0, (('head/.*', 0.0), ('.*', 0.5)))
  state = pull.init(params, params)
  moved = jax.tree.map(lambda x: x + 3.0, params)
  value, grads = jax.value_and_grad(
    lambda p: pull.value(p, p, state, {}, None)
  )(moved)
  assert value == 4.0 / 2 * 0.5 * 9
  assert grads['body']['k'] == 4.0 * 0.5 * 3 and grads['head']['k'] == 0


def test_a_multiplier_may_name_a_frozen_parameter_but_no_unknown_one():
  _, params, _, _ = toys.problem()
  trainable, _ = tuning.select('body/.*').init(params, KEY)
  for pattern in ('head/.*', 'haed/.*'):
    pull = penalty.l2_sp(1.0, ((pattern, 0.0), ('.*', 1.0)))
    state = pull.init(trainable, params)
    if pattern == 'head/.*':
      assert pull.value(trainable, params, state, {}, None) == 0
    else:
      with pytest.raises(UsageError, match="'haed/.*'"):
        pull.value(trainable, params, state, {}, None)


@pytest.mark.parametrize('make', [penalty.l2_sp, penalty.ewc])
def test_equal_weights_are_penalised_alike_whatever_the_factors(make):
  _, params, _, _ = toys.problem()
  lora = adapters.lora('body/.*/kernel', rank=2)
  trainable, frozen = lora.init(params, KEY)
  trainable = _random_like(trainable, 1)
  pull = make(1.0)
  merged = lora.merge(trainable, frozen)
  state = pull.init(trainable, params)
  if 'importance' in state:
    state['importance'] = jax.tree.map(jnp.ones_like, state['importance'])
  rescaled = tree.map_with_name(
    lambda name, x: 2 * x if name.endswith('_a') else 0.5 * x, trainable
  )
  value = pull.value(trainable, merged, state, {}, None)
  other = pull.value(rescaled, lora.merge(rescaled, frozen), state, {}, None)
  assert value > 0
  np.testing.assert_allclose(value, other, rtol=1e-6)
  assert tree.names(state['anchor']) == [
    'body/layer_0/kernel',
    'body/layer_1/kernel',
  ]


def test_a_name_with_a_dot_is_a_parameter_like_any_other():
  params = {'conv': {'w.1': jnp.ones(2), 'w.2': jnp.zeros(2)}}
  trainable = {'conv': {'w.1': params['conv']['w.1']}}
  assert tree.names(penalty.moving_leaves(trainable, params)) == ['conv/w.1']


def test_the_anchor_is_a_copy_that_outlives_donation():
  _, params, _, _ = toys.problem()
  for pull in (penalty.l2_sp(1.0), penalty.ewc(1.0)):
    state = pull.init(params, params)
    for x, y in zip(
      jax.tree.leaves(state['anchor']), jax.tree.leaves(params), strict=True
    ):
      assert x.unsafe_buffer_pointer() != y.unsafe_buffer_pointer()


def test_the_step_adds_the_penalty_to_the_data_gradient():
  loss_fn, params, batch, _ = toys.problem()
  pull = penalty.l2_sp(2.0)
  plain = finetune(loss_fn, optim.sgd(0.1))
  held = finetune(loss_fn, optim.sgd(0.1), penalty=pull)
  start = held.init(params, KEY)
  moved = start.replace(
    trainable=jax.tree.map(lambda x: x + 1.0, start.trainable)
  )
  found, aux = jax.jit(held.step)(moved, batch, KEY)
  free, free_aux = jax.jit(plain.step)(
    moved.replace(penalty_state={}), batch, KEY
  )
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y - 0.1 * 2.0, atol=1e-6),
    found.trainable,
    free.trainable,
  )
  np.testing.assert_allclose(
    aux.metrics['penalty'], tree.size(params), rtol=1e-5
  )
  assert aux.metrics['loss'] == free_aux.metrics['loss']


def test_end_task_consolidates_what_moves_and_nothing_else():
  loss_fn, params, batch, forward = toys.problem()
  learner = finetune(
    loss_fn,
    optim.sgd(0.1),
    tuning=tuning.select('head/.*'),
    penalty=penalty.ewc(1.0, fisher.empirical_fisher),
  )
  state, _ = jax.jit(learner.step)(learner.init(params, KEY), batch, KEY)
  ended = learner.end_task(state, forward, [batch], KEY)
  assert tree.names(ended.penalty_state['importance']) == [
    'head/bias',
    'head/kernel',
  ]
  jax.tree.map(
    np.testing.assert_array_equal,
    ended.penalty_state['anchor'],
    state.trainable,
  )
  assert penalty.max_importance(ended.penalty_state) > 0
  unchanged = ended.replace(penalty_state=state.penalty_state)
  jax.tree.map(np.testing.assert_array_equal, unchanged, state)


def test_projections_and_path_integrals_see_the_right_gradients():
  loss_fn, params, batch, _ = toys.problem()
  seen = {}

  def observe(state, trainable, grads, updates):
    seen.update(old=trainable, grads=grads, updates=updates)
    return state

  watching = penalty.no_penalty()._replace(
    direct=lambda grads, state: jax.tree.map(lambda g: 0.5 * g, grads),
    observe=observe,
  )
  learner = finetune(loss_fn, optim.sgd(0.1), penalty=watching)

  @jax.jit
  def step(params):
    after, _ = learner.step(learner.init(params, KEY), batch, KEY)
    return after, dict(seen)

  after, saw = step(params)
  jax.tree.map(np.testing.assert_array_equal, saw['old'], params)
  jax.tree.map(
    lambda p, q, g, u: (
      np.testing.assert_allclose(u, -0.05 * g, rtol=1e-6),
      np.testing.assert_allclose(q, p + u, rtol=1e-6),
    ),
    params,
    after.trainable,
    saw['grads'],
    saw['updates'],
  )


FORWARD = toys.three_layers
PARAMS = toys.three_kernels()
BATCH = toys.batch_of(6)
DATA = losses.supervised(FORWARD, losses.softmax_cross_entropy)
TUNINGS = {
  'full': tuning.full(),
  'select': tuning.select('body/layer_1/.*', 'head/.*'),
  # The model is no linen module, which `lora` would enter.
  'lora': adapters.lora_merged('body/.*/kernel', rank=2, also=('head/.*',)),
}


def _features(params, model_state, batch, rng):
  hidden = jnp.tanh(batch['x'] @ params['body']['layer_0']['kernel'])
  hidden = jnp.tanh(hidden @ params['body']['layer_1']['kernel'])
  # The head's logits as well, so that no leaf is left out.
  return jnp.concatenate(
    [hidden, hidden @ params['head']['kernel']], 1
  ), model_state


# strength -> penalty; what a task's end has to have told it.
LEARNING = {
  'ewc': penalty.ewc,
  'online_ewc': lambda s: penalty.online_ewc(s, gamma=0.9),
  'si': penalty.si,
  'mas': penalty.mas,
  'rwalk': lambda s: penalty.rwalk(s, every=2),
  'lwf': lambda s: penalty.lwf(FORWARD, s, np.ones((1, 3), bool)),
  'feature_distillation': lambda s: penalty.feature_distillation(_features, s),
  'all_of': lambda s: penalty.all_of(penalty.si(s), penalty.ewc(s)),
}


def _after_a_task(learner, steps=3):
  state, step = learner.init(PARAMS, KEY), jax.jit(learner.step)
  for _ in range(steps):
    before = state
    state, _ = step(state, BATCH, KEY)
  return before, learner.end_task(state, FORWARD, [BATCH], KEY)


@pytest.mark.parametrize('how', TUNINGS)
@pytest.mark.parametrize('name', LEARNING)
def test_nothing_holds_before_a_task_ends_then_all_but_the_anchor(name, how):
  made, moves = LEARNING[name](1.0), TUNINGS[how]
  learner = finetune(DATA, optim.sgd(0.3), tuning=moves, penalty=made)
  before, after = _after_a_task(learner)

  @jax.jit
  def slope(trainable, state):
    def value(trainable):
      params = moves.merge(trainable, state.frozen)
      return made.value(trainable, params, state.penalty_state, BATCH, KEY)

    return jax.value_and_grad(value)(trainable)

  moved = jax.tree.map(lambda x: x + 0.3, after.trainable)
  for value, grads in (
    slope(moved, before),
    slope(after.trainable, after),
  ):
    # In the step the anchor may have been rounded otherwise.
    np.testing.assert_allclose(value, 0, atol=1e-9)
    for g in jax.tree.leaves(grads):
      np.testing.assert_allclose(g, 0, atol=2e-6)
  assert slope(moved, before)[0] == 0
  value, grads = slope(moved, after)
  assert value > 1e-4
  assert all(np.any(g) for g in jax.tree.leaves(grads))


@pytest.mark.parametrize('name', LEARNING)
def test_strengths_may_be_vmapped(name):
  _, start = _after_a_task(
    finetune(DATA, optim.sgd(0.3), penalty=LEARNING[name](1.0))
  )
  start = start.replace(trainable=jax.tree.map(lambda x: x + 0.1, PARAMS))

  def step(strength):
    learner = finetune(DATA, optim.sgd(0.1), penalty=LEARNING[name](strength))
    state, aux = learner.step(start, BATCH, KEY)
    return state.trainable, aux.metrics['penalty']

  strengths = jnp.asarray([0.0, 1.0, 2.0])
  found, values = jax.jit(jax.vmap(step))(strengths)
  np.testing.assert_allclose(values, values[1] * strengths, rtol=1e-5)
  # The step is linear in the penalty's gradient.
  assert values[1] > 0
  for x in jax.tree.leaves(found):
    assert np.any(x[1] != x[0])
    np.testing.assert_allclose(x[2] - x[0], 2 * (x[1] - x[0]), atol=1e-6)


@pytest.mark.parametrize('name', LEARNING)
def test_three_tasks_take_one_trace_and_share_no_buffer(name):
  learner = finetune(DATA, optim.adamw(0.01), penalty=LEARNING[name](1.0))
  traces = []

  def step(state, batch):
    traces.append(state)
    return learner.step(state, batch, KEY)[0]

  step = jax.jit(step, donate_argnums=0)
  state = jax.tree.map(jnp.copy, learner.init(PARAMS, KEY))
  for seed in range(3):
    state = step(state, toys.batch_of(6, seed=seed))
    held = jax.tree.map(np.asarray, (state.trainable, state.model_state))
    state = learner.end_task(state, FORWARD, [BATCH], KEY)
    jax.tree.map(
      np.testing.assert_array_equal, held, (state.trainable, state.model_state)
    )
    owners = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(state)]
    assert len(set(owners)) == len(owners)
  assert len(traces) == 1


@pytest.mark.parametrize('name', ['online_ewc', 'mas', 'lwf'])
def test_what_moves_many_parameters_at_once_is_refused(name):
  moves = adapters.subspace('body/.*/kernel', dim=4)
  learner = finetune(
    DATA, optim.sgd(0.1), tuning=moves, penalty=LEARNING[name](1.0)
  )
  with pytest.raises(UsageError, match='moves many parameters at once'):
    learner.init(PARAMS, KEY)


def test_the_largest_importance_of_several_is_the_largest_of_any():
  low, high = ({'importance': {'p': jnp.asarray([x, 0.5])}} for x in (1.0, 3.0))
  assert penalty.max_importance((low, (high, {}))) == 3.0
  assert penalty.max_importance(()) == 0


@pytest.mark.parametrize('name', ['mas', 'rwalk', 'lwf'])
def test_a_gradient_passes_through_a_tasks_end(name, x64):
  # What an outer loop needs that learns a start and a strength for a stream.
  start = {'model': PARAMS, 'strength': jnp.asarray(0.3)}
  start, first, second = toys.double((start, BATCH, toys.batch_of(6, seed=1)))

  def after_two_tasks(outer):
    learner = finetune(
      DATA, optim.sgd(0.3), penalty=LEARNING[name](outer['strength'])
    )
    state = learner.init(outer['model'], KEY)
    for batch in (first, second):
      for _ in range(2):
        state, _ = learner.step(state, batch, KEY)
      state = learner.end_task(state, FORWARD, [batch], KEY)
    return DATA(state.trainable, {}, first, None)[0]

  grads = check_gradient(after_two_tasks, start)
  assert abs(grads['strength']) > 1e-6
