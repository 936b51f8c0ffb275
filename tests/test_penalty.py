import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from fmeta import adapters, fisher, optim, penalty, tree, tuning
from fmeta.errors import UsageError
from fmeta.learner import finetune

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
