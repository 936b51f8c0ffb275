"""Plasticity: what renews units, and what shows that they are spent."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toys

from fmeta import losses, metrics, models, optim, testing, tree
from fmeta.continual import plasticity
from fmeta.errors import UsageError
from fmeta.learner import finetune
from fmeta.penalty import l2_sp

KEY = jax.random.key(11)
LAYERS = ('body/layer_0', 'body/layer_1', 'head')
HIDDEN = LAYERS[:-1]
BATCH = toys.batch_of(rows=16)
MLP = models.Mlp((8, 7), 3)
FORWARD = models.forward(MLP, ('x',))
PARAMS, _ = models.init(MLP, jax.random.key(1), BATCH, ('x',))
# Biases that a replacement changes.
PARAMS = jax.tree.map(lambda x: jnp.where(x == 0, 0.1, x), PARAMS)
START = plasticity.no_activity(PARAMS, HIDDEN)
WATCHED = plasticity.watched(FORWARD, HIDDEN)
LOSS = losses.supervised(WATCHED, losses.softmax_cross_entropy)
OPTIONS = {'rate': 0.0613, 'maturity': 4, 'decay': 0.98}


def renewing(inner=None, **options):
  inner = plasticity.adam_per_entry(0.05) if inner is None else inner
  optimizer = plasticity.continual_backprop(
    inner, LAYERS, KEY, **{**OPTIONS, **options}
  )
  return finetune(LOSS, optimizer)


def kernels(params):
  return [np.float64(tree.get(params, f'{x}/kernel')) for x in LAYERS]


def hidden(params, x):
  """Both hidden layers by numpy."""
  out = []
  for layer in HIDDEN:
    kernel, bias = (
      np.float64(tree.get(params, f'{layer}/{leaf}'))
      for leaf in ('kernel', 'bias')
    )
    x = np.maximum(x @ kernel + bias, 0)
    out.append(x)
  return out


# The activity that a model reports


def test_a_watched_model_reports_the_mean_activation_in_training_only():
  weight = np.where(np.arange(16) < 12, 1.0 + np.arange(16), 0.0)
  x = np.where(weight[:, None] > 0, BATCH['x'], np.nan)
  batch = {'x': jnp.asarray(x), 'weight': jnp.asarray(weight)}
  outputs, state = WATCHED(PARAMS, START, batch, KEY)
  plain, _ = FORWARD(PARAMS, {}, batch, KEY)
  np.testing.assert_array_equal(outputs, plain)
  for layer, h in zip(HIDDEN, hidden(PARAMS, np.float64(x)), strict=True):
    expected = np.average(np.abs(h[:12]), axis=0, weights=weight[:12])
    found = tree.get(state['activity'], f'{layer}/size')
    np.testing.assert_allclose(found, expected, rtol=1e-5)
  outputs, state = WATCHED(PARAMS, START, batch, None)
  np.testing.assert_array_equal(outputs, FORWARD(PARAMS, {}, batch, None)[0])
  assert state is START


def test_a_layer_that_is_never_called_is_refused():
  watched = plasticity.watched(FORWARD, ('body/layer_7',))
  with pytest.raises(UsageError, match="never calls a module 'body/layer_7'"):
    watched(PARAMS, {}, BATCH, KEY)


# Continual backprop


def reference(before, moved, x, units):
  """One test of both layers by numpy: (utility, age, due) and who goes."""
  chosen = []
  acts, weights = hidden(before, x), kernels(moved)
  for k, (utility, age, due) in enumerate(units):
    utility *= OPTIONS['decay']
    utility += (
      (1 - OPTIONS['decay'])
      * np.abs(acts[k]).mean(0)
      * np.abs(weights[k + 1]).sum(1)
    )
    age += 1
    able = np.flatnonzero(age > OPTIONS['maturity'])
    due += OPTIONS['rate'] * len(able)
    corrected = utility[able] / (1 - OPTIONS['decay'] ** age[able])
    gone = able[np.argsort(corrected)[: int(due)]]
    due -= len(gone)
    utility[gone], age[gone] = 0, 0
    chosen.append(gone)
  return chosen


@pytest.fixture(scope='module')
def path():
  """25 steps: state before, leaves after the plain step, state after."""
  learner = renewing()
  plain = finetune(LOSS, plasticity.adam_per_entry(0.05))

  @jax.jit
  def both(state):
    alone = state.replace(opt_state=state.opt_state.inner)
    return plain.step(alone, BATCH, KEY)[0], learner.step(state, BATCH, KEY)[0]

  state, steps = learner.init(PARAMS, KEY, START), []
  for _ in range(25):
    alone, after = both(state)
    steps.append((state, alone, after))
    state = after
  return steps


def test_utility_age_and_who_is_replaced_follow_numpy(path):
  units = [[np.zeros(n), np.zeros(n, int), np.zeros(())] for n in (8, 7)]
  replaced = []
  for before, alone, after in path:
    gone = reference(
      before.trainable, alone.trainable, np.float64(BATCH['x']), units
    )
    replaced.append(tuple(len(g) for g in gone))
    for layer, (utility, age, due) in zip(HIDDEN, units, strict=True):
      found = after.opt_state
      np.testing.assert_array_equal(found.age[layer], age)
      np.testing.assert_allclose(found.utility[layer], utility, rtol=2e-5)
      np.testing.assert_allclose(found.due[layer], due, atol=1e-5)
    for k, layer in enumerate(LAYERS):
      born = np.zeros(kernels(PARAMS)[k].shape, bool)
      if k > 0:
        born[gone[k - 1]] = True
      if k < 2:
        born[:, gone[k]] = True
      new, old = (
        tree.get(x.trainable, f'{layer}/kernel') for x in (after, alone)
      )
      same = np.asarray(new == old)
      assert same[~born].all()
      assert k == 2 or not same[:, gone[k]].any()
  # Both layers, at once and alone, and most steps nothing.
  assert {(1, 0), (0, 0)} <= set(replaced) and sum(map(sum, replaced)) > 8


def test_a_young_unit_is_not_less_useful_for_having_averaged_less():
  params = {
    'a': {'kernel': jnp.ones((3, 2))},
    'b': {'kernel': jnp.ones((2, 2))},
  }
  optimizer = plasticity.continual_backprop(
    optax.sgd(0.0), ('a', 'b'), KEY, rate=0.5, maturity=4, decay=0.98
  )
  # Averages of 0.2 over a long life, and of 0.15 / (1 - 0.98^5) = 1.6.
  state = optimizer.init(params)._replace(
    utility={'a': jnp.asarray([0.2, 0.15])},
    age={'a': jnp.asarray([1000, 5], jnp.int32)},
  )
  idle = plasticity.no_activity(params, ('a',))
  _, state = optimizer.update(params, state, params, model_state=idle)
  np.testing.assert_array_equal(state.age['a'], [0, 6])


def changed_units(alone, after):
  ages = after.opt_state.age
  return [np.flatnonzero(ages[layer] == 0) for layer in HIDDEN]


def test_a_new_unit_adds_nothing_whatever_its_incoming_weights(path):
  """The network is the one without the unit that went."""
  for _, alone, after in path:
    for layer, following, gone in zip(
      HIDDEN, LAYERS[1:], changed_units(alone, after), strict=True
    ):
      kernel = np.asarray(tree.get(after.trainable, f'{following}/kernel'))
      later = changed_units(alone, after)[1] if following != 'head' else []
      kept = np.setdiff1d(np.arange(kernel.shape[1]), later)
      assert (kernel[np.ix_(gone, kept)] == 0).all()
      bias = np.asarray(tree.get(after.trainable, f'{layer}/bias'))
      assert (bias[gone] == 0).all()
    without = jax.tree.map(np.array, alone.trainable)
    for following, gone in zip(
      LAYERS[1:], changed_units(alone, after), strict=True
    ):
      tree.get(without, f'{following}/kernel')[gone] = 0
    found = FORWARD(after.trainable, {}, BATCH, None)[0]
    expected = FORWARD(without, {}, BATCH, None)[0]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_incoming_weights_are_drawn_at_the_scale_of_a_fresh_layer():
  learner = renewing(rate=1.0, maturity=0)
  state = learner.init(PARAMS, KEY, START)
  step = jax.jit(learner.step)
  first = step(state, BATCH, KEY)[0]
  second = step(first, BATCH, KEY)[0]
  drawn = [kernels(s.trainable)[0] for s in (first, second)]
  assert np.abs(drawn[0] - drawn[1]).min() > 0  # another draw in each step
  # 96 draws of variance 1 / 6: four standard errors of a variance.
  assert abs(np.var(drawn) * 6 - 1) < 4 * np.sqrt(2 / 96)
  zeros = renewing(
    rate=1.0, maturity=0, kernel_init=lambda k, s, d: jnp.zeros(s)
  )
  state = jax.jit(zeros.step)(state, BATCH, KEY)[0]
  assert not kernels(state.trainable)[0].any()


def test_dead_units_go_first_and_the_network_stays_the_same():
  dead = jax.tree.map(jnp.array, PARAMS)
  dead['body']['layer_0']['bias'] = (
    dead['body']['layer_0']['bias'].at[3].set(-99)
  )
  learner = renewing(optax.sgd(0.0), rate=0.125, maturity=1)
  state = learner.init(dead, KEY, START)
  step = jax.jit(learner.step)
  state = step(step(state, BATCH, KEY)[0], BATCH, KEY)[0]
  ages = state.opt_state.age['body/layer_0']
  np.testing.assert_array_equal(ages, np.where(np.arange(8) == 3, 0, 2))
  assert not (state.trainable['body']['layer_0']['bias'] == -99).any()
  found, expected = (
    FORWARD(p, {}, BATCH, None)[0] for p in (state.trainable, dead)
  )
  np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7)


def test_slots_of_replaced_weights_start_anew_and_others_go_on(path):
  seen = 0
  for _, alone, after in path:
    gone = changed_units(alone, after)
    born = {
      'body/layer_0/kernel': (slice(None), gone[0]),
      'body/layer_0/bias': gone[0],
      'body/layer_1/kernel': None,
      'body/layer_1/bias': gone[1],
      'head/kernel': gone[1],
      'head/bias': np.zeros(0, int),
    }
    slots, plain = after.opt_state.inner[0], alone.opt_state[0]
    for name, index in born.items():
      shape = tree.get(PARAMS, name).shape
      mask = np.zeros(shape, bool)
      if index is None:
        mask[gone[0]], mask[:, gone[1]] = True, True
      else:
        mask[index] = True
      for kind in ('count', 'mu', 'nu'):
        new, old = (
          np.asarray(tree.get(getattr(x, kind), name)) for x in (slots, plain)
        )
        np.testing.assert_array_equal(new, np.where(mask, 0, old))
      seen += mask.sum()
  assert seen > 50


@pytest.mark.parametrize(
  'inner, expected',
  [
    # (1 - b1) / sqrt(1 - b2).
    (optax.adam(0.05), 0.1 / np.sqrt(0.001)),
    (plasticity.adam_per_entry(0.05), 1.0),
  ],
  ids=['shared', 'per_entry'],
)
def test_the_first_step_of_a_reborn_unit_late_in_a_run(inner, expected):
  learner = renewing(inner, rate=1 / 8, maturity=2)
  state, step = learner.init(PARAMS, KEY, START), jax.jit(learner.step)
  for _ in range(3):
    before, state = state, step(state, BATCH, KEY)[0]
  (unit,) = np.flatnonzero(state.opt_state.age['body/layer_0'] == 0)
  assert before.opt_state.age['body/layer_0'].min() == 2
  first, *rest = state.opt_state.inner
  if not isinstance(first.count, dict):
    first = first._replace(count=jnp.int32(20_000))
  state = state.replace(
    opt_state=state.opt_state._replace(inner=(first, *rest))
  )
  after = step(state, BATCH, KEY)[0]
  rows = [kernels(s.trainable)[1][unit] for s in (state, after)]
  lasting = np.asarray(after.opt_state.age['body/layer_1'] > 0)
  ratio = np.abs(rows[1] - rows[0])[lasting].max() / 0.05
  np.testing.assert_allclose(ratio, expected, rtol=2e-3)


def test_adam_per_entry_is_adam_while_all_are_of_one_age():
  ours, theirs = plasticity.adam_per_entry(0.01), optim.adam(0.01)
  states = [x.init(PARAMS) for x in (ours, theirs)]
  for seed in range(4):
    random = np.random.default_rng(seed)
    grads = jax.tree.map(
      lambda p, r=random: jnp.asarray(r.normal(size=p.shape), p.dtype), PARAMS
    )
    found, states[0] = ours.update(grads, states[0], PARAMS)
    expected, states[1] = theirs.update(grads, states[1], PARAMS)
    jax.tree.map(
      lambda x, y: np.testing.assert_allclose(x, y, rtol=3e-6, atol=1e-9),
      found,
      expected,
    )


def test_continual_backprop_is_a_learner_like_any_other():
  learner = renewing(rate=0.3, maturity=0)
  testing.check_learner(learner, PARAMS, BATCH, model_state=START)


def test_the_numbers_of_continual_backprop_may_be_traced():
  @jax.jit
  def ages(rate, maturity, decay):
    learner = renewing(rate=rate, maturity=maturity, decay=decay)
    state = learner.init(PARAMS, KEY, START)
    return learner.step(state, BATCH, KEY)[0].opt_state.age['body/layer_0']

  assert (np.asarray(ages(0.25, 0, 0.9)) == 0).sum() == 2
  assert (np.asarray(ages(0.25, 1, 0.9)) == 1).all()


def update_without(what):
  optimizer = plasticity.continual_backprop(optax.sgd(0.1), LAYERS, KEY)
  state = optimizer.init(PARAMS)
  if what == 'params':
    return optimizer.update(PARAMS, state)
  return optimizer.update(PARAMS, state, PARAMS, model_state={})


@pytest.mark.parametrize(
  'call, message',
  [
    (
      lambda: plasticity.continual_backprop(optax.sgd(1.0), ('head',), KEY),
      r"layers=\('head',\); give at least a hidden layer",
    ),
    (lambda: update_without('params'), 'needs `params`'),
    (lambda: update_without('activity'), 'plasticity.watched'),
    (
      lambda: plasticity.continual_backprop(
        optax.sgd(1.0), ('body/layer_0', 'head'), KEY
      ).init(PARAMS),
      r"'body/layer_0' has a kernel \(6, 8\), 'head' one \(7, 3\)",
    ),
    (
      lambda: plasticity.continual_backprop(
        optax.sgd(1.0), ('body/layer_9', 'head'), KEY
      ).init(PARAMS),
      "no trainable kernel of a layer 'body/layer_9'",
    ),
  ],
)
def test_what_continual_backprop_cannot_do_is_refused(call, message):
  with pytest.raises(UsageError, match=message):
    call()


# Shrink and perturb, L2 Init


def test_shrink_and_perturb_is_its_formula_and_moves_nothing_else():
  learner = finetune(LOSS, optim.adam(0.1))
  state = learner.init(PARAMS, KEY, START)
  fresh = jax.tree.map(lambda p: p + 1, PARAMS)
  found = jax.jit(plasticity.shrink_and_perturb)(state, fresh, 0.4, 0.1)
  jax.tree.map(
    lambda x, p: np.testing.assert_allclose(
      x, 0.4 * p + 0.1 * (p + 1), rtol=1e-6
    ),
    found.trainable,
    PARAMS,
  )
  same = found.replace(trainable=state.trainable)
  jax.tree.map(np.testing.assert_array_equal, same, state)
  with pytest.raises(UsageError, match='fresh leaves are'):
    plasticity.shrink_and_perturb(state, {'head': fresh['head']}, 0.4, 0.1)


def test_l2_init_is_l2_sp_of_twice_the_strength_from_the_random_start():
  strength = 0.3
  learner = finetune(LOSS, optim.sgd(0.5), penalty=l2_sp(2 * strength))
  state = learner.init(PARAMS, KEY, START)
  moved = learner.step(state, BATCH, KEY)[0]
  moved = learner.end_task(moved, WATCHED, [BATCH], KEY)

  def paper(p):
    gaps = jax.tree.map(lambda x, x0: jnp.sum((x - x0) ** 2), p, PARAMS)
    return strength * sum(jax.tree.leaves(gaps))

  plain = finetune(LOSS, optim.sgd(0.5))
  expected = jax.tree.map(
    jnp.add,
    plain.gradient(moved.replace(penalty_state={}), BATCH, KEY),
    jax.grad(paper)(moved.trainable),
  )
  found = learner.gradient(moved, BATCH, KEY)
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7),
    found,
    expected,
  )
  assert paper(moved.trainable) > 1e-3


# Metrics


def test_dormant_units_by_hand():
  # Mean sizes 0, 1, 2, 5: layer mean 2, scores 0, .5, 1, 2.5.
  activations = [[0.0, -1.0, 2.0, 4.0], [0.0, 1.0, -2.0, 6.0]]
  assert metrics.dormant_units(activations) == 0.25
  assert metrics.dormant_units(activations, 0.49) == 0.25
  assert metrics.dormant_units(activations, 0.5) == 0.5
  assert metrics.dormant_units(activations, 1.0) == 0.75
  assert metrics.dormant_units(np.zeros((3, 4))) == 1.0


def test_effective_rank_by_hand():
  rotation = np.linalg.qr(np.random.default_rng(0).normal(size=(5, 5)))[0]
  for values, expected in [
    ([1, 1, 1, 1], 4.0),
    ([7, 0, 0, 0], 1.0),
    # Shares 1/2, 1/4, 1/4: entropy 1.5 ln 2.
    ([2, 1, 1, 0], 2**1.5),
    ([0, 0, 0, 0], 0.0),
  ]:
    features = rotation[:, :4] * np.asarray(values)
    found = metrics.effective_rank(features)
    # The square root of a zero singular value's rounding is seen by log.
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_srank_counts_the_singular_values_that_hold_the_share():
  features = np.diag([60.0, 30.0, 9.5, 0.5])
  found = [metrics.srank(features, d) for d in (0.5, 0.4, 0.2, 0.01, 0.001)]
  assert found == [1, 1, 2, 3, 4]
  assert metrics.srank(features) == 3 and metrics.srank(features, 0) == 4
  assert metrics.srank(np.zeros((3, 2))) == 0


@pytest.mark.parametrize(
  'call, message',
  [
    (lambda: metrics.dormant_units(np.ones(3)), r'shape \(3,\)'),
    (lambda: metrics.dormant_units(np.ones((2, 2)), -1), 'tau=-1'),
    (lambda: metrics.effective_rank(np.ones((0, 2))), r'shape \(0, 2\)'),
    (lambda: metrics.srank(np.ones((2, 2)), 1), 'delta=1; give one in'),
  ],
)
def test_metrics_refuse_what_they_cannot_measure(call, message):
  with pytest.raises(UsageError, match=message):
    call()
