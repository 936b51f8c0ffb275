"""A task's factors become part of the kernels, and the next task's are born."""

import jax
import numpy as np
import pytest
import toys

import fmeta
from fmeta import UsageError, adapters, continual, optim, penalty, tree
from fmeta.continual.meta import boundaries_loss
from fmeta.learner import finetune
from fmeta.testing import assert_same

LOSS, PARAMS, BATCH, FORWARD = toys.problem(dropout=0.2)
KEY = jax.random.key(9)
MATRICES = 'body/.*/kernel'
HEAD = ('head/.*',)
LORA = adapters.lora(MATRICES, rank=2, also=HEAD)
B = 'body/layer_1/kernel.lora_b'
A = 'body/layer_1/kernel.lora_a'


def learner_of(tuning=LORA, optimizer=None, **options):
  optimizer = optimizer or fmeta.adamw_per_leaf(0.02)
  return finetune(LOSS, optimizer, tuning=tuning, **options)


def after_steps(learner, state, count=3):
  step = jax.jit(learner.step)
  for k in range(count):
    state, _ = step(state, toys.batch_of(seed=k), KEY)
  return state


def task(learner, state):
  """The state before and after a task's end."""
  state = after_steps(learner, state)
  return state, learner.end_task(state, FORWARD, [BATCH], KEY)


TUNINGS = {
  'lora': LORA,
  'lora_merged': adapters.lora_merged(MATRICES, rank=2),
  'lora_fa': adapters.lora_fa(MATRICES, rank=2, also=HEAD),
  'rslora': adapters.rslora(MATRICES, rank=2),
  'dora': adapters.dora(MATRICES, rank=2, also=HEAD),
  'pissa': adapters.pissa(MATRICES, rank=2),
  'vera': adapters.vera(MATRICES, rank=7),
  'ia3': adapters.ia3('body/layer_0/kernel', inputs=('head/kernel',)),
}


@pytest.mark.parametrize('name', TUNINGS)
def test_the_models_function_goes_on(name):
  learner = continual.fold(learner_of(TUNINGS[name]))
  start = learner.init(PARAMS, KEY)
  before, state = task(learner, start)
  for read in (learner.params, lambda s: run(learner, s)):
    jax.tree.map(
      lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=1e-6),
      read(before),
      read(state),
    )
  kernel = tree.get(state.frozen, 'body/layer_0/kernel')
  assert np.abs(kernel - tree.get(PARAMS, 'body/layer_0/kernel')).max() > 1e-3
  assert jax.tree.structure(state) == jax.tree.structure(start)


def run(learner, state):
  with learner.using(state) as params:
    return FORWARD(params, {}, BATCH, None)[0]


def test_each_task_has_factors_of_its_own():
  learner = continual.fold(learner_of())
  state, found = learner.init(PARAMS, KEY), []
  for _ in range(3):
    found.append(tree.get(state.trainable, A))
    assert not np.any(tree.get(state.trainable, B))
    before, state = task(learner, state)
    assert np.any(tree.get(before.trainable, B))
  assert all(np.any(found[i] != found[j]) for i, j in ((0, 1), (0, 2), (1, 2)))


def named(slots):
  return dict(zip(tree.names(slots), jax.tree.leaves(slots), strict=True))


def test_slots_of_the_head_go_on_and_those_of_factors_start_afresh():
  learner = continual.fold(learner_of())
  start = learner.init(PARAMS, KEY)
  before, state = task(learner, start)
  fresh, old, new = (named(x.opt_state) for x in (start, before, state))
  # Two moments and a count each.
  assert sum('lora_' in name for name in new) == 12
  assert sum('head/' in name for name in new) == 6
  for name in new:
    expected = fresh if 'lora_' in name else old
    np.testing.assert_array_equal(new[name], expected[name], name)
    assert np.any(old[name] != fresh[name])


def test_first_steps_of_a_task_are_those_of_a_fresh_optimizer():
  tuning = adapters.lora(MATRICES, rank=2)
  learner = continual.fold(learner_of(tuning, optim.adam(0.01)))
  state = task(learner, learner.init(PARAMS, KEY))[1]
  params = tree.combine(state.frozen, state.trainable)
  alone = learner_of(tuning, optim.adam(0.01))
  fresh = alone.init(params, KEY).replace(step=state.step)
  assert_same(
    after_steps(alone, fresh).trainable,
    after_steps(learner, state).trainable,
    'second task',
  )


def test_a_count_that_factors_share_with_the_head_is_refused_at_the_start():
  learner = continual.fold(learner_of(optimizer=optim.adam(0.01)))
  with pytest.raises(UsageError, match='keeps one .*count.*per_leaf'):
    learner.init(PARAMS, KEY)


def test_a_tuning_with_nothing_to_fold_is_refused():
  for tuning in (fmeta.full(), fmeta.select('head/.*')):
    with pytest.raises(UsageError, match='trains only parameters of the model'):
      continual.fold(learner_of(tuning)).init(PARAMS, KEY)


def test_a_penalty_on_factors_is_refused():
  hold = penalty.all_of(penalty.ewc(1.0), penalty.si(1.0))
  learner = continual.fold(learner_of(penalty=hold))
  with pytest.raises(UsageError, match="remembers 'body/.*lora_a', which is"):
    learner.init(PARAMS, KEY)


def test_penalties_consolidate_first_and_see_no_change():
  hold = penalty.ewc(3.0)
  inner = learner_of(penalty=hold)
  learner = continual.fold(inner)
  before, state = task(learner, learner.init(PARAMS, KEY))
  alone = inner.end_task(before, FORWARD, [BATCH], KEY)
  assert_same(alone.penalty_state, state.penalty_state, 'consolidated')

  def pull(state):
    params = learner.params(state)
    given = state.trainable, params, state.penalty_state, BATCH, None
    return float(hold.value(*given))

  # Of a square of rounding: the anchor is where the model is.
  assert pull(state) < 1e-10
  assert pull(after_steps(learner, state)) > 1e-4


def test_a_stream_inside_an_episode_is_refused():
  inner = continual.fold(learner_of(optimizer=optim.sgd(0.1)))
  loss = boundaries_loss(inner, LOSS, FORWARD, 1)
  tasks = jax.tree.map(lambda x: np.stack([x, x])[None], BATCH)
  batch = {'support': tasks, 'query': jax.tree.map(lambda x: x[None], BATCH)}
  with pytest.raises(UsageError, match="end changes 'body/layer_0/kernel'"):
    loss(PARAMS, {}, batch, KEY)


@pytest.mark.parametrize('outside', [True, False])
def test_a_memory_stays_whichever_wraps_the_other(outside):
  rows = {
    'x': jax.ShapeDtypeStruct((6,), np.float32),
    'label': jax.ShapeDtypeStruct((), np.int32),
  }
  held = fmeta.reservoir(5, rows)
  if outside:
    learner = fmeta.rehearse(continual.fold(learner_of()), held, 4)
  else:
    learner = continual.fold(fmeta.rehearse(learner_of(), held, 4))
  before, state = task(learner, learner.init(PARAMS, KEY))
  assert np.any(before.memory['rows']['x'])
  assert_same(before.memory, state.memory, 'memory')
  assert not np.any(tree.get(state.trainable, B))


def test_statistics_of_a_batch_norm_stay():
  module = toys.NormNet()
  forward = toys.forward_of(module)
  loss = fmeta.supervised(forward, fmeta.softmax_cross_entropy)
  params, model_state = toys.init_of(module)
  tuning = adapters.lora('body/layer_0/kernel', rank=2, also=('body/norm/.*',))
  learner = continual.fold(
    finetune(loss, fmeta.adamw_per_leaf(0.01), tuning=tuning)
  )
  start = learner.init(params, KEY, model_state)
  before = after_steps(learner, start)
  state = learner.end_task(before, forward, [BATCH], KEY)
  assert_same(before.model_state, state.model_state, 'statistics')
  moved = jax.tree.leaves(before.model_state), jax.tree.leaves(model_state)
  assert any(np.any(x != y) for x, y in zip(*moved, strict=True))
