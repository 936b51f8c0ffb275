"""What a learner may do before a task's first step and after its last."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

import fmeta
from fmeta import optim, train
from fmeta.errors import UsageError
from fmeta.testing import assert_same

LOSS, PARAMS, _, FORWARD = toys.problem(dropout=0.2)
KEY = jax.random.key(3)
STEPS = 6


def batch(index):
  rng = np.random.default_rng(index)
  label = rng.integers(0, 3, 6).astype(np.int32)
  return {'x': rng.normal(size=(6, 6)).astype(np.float32), 'label': label}


def renewing():
  """Ends a task by adding the head to the frozen body's first bias, and begins
  one with the head at the mean of what it is prepared with."""
  learner = fmeta.finetune(
    LOSS, optim.adam(1e-2), tuning=fmeta.select('head/.*')
  )

  def begin_task(state, forward, batches, rng):
    del forward
    mean = jnp.mean(jnp.stack([jnp.mean(b['x']) for b in batches]))
    noise = jax.random.normal(rng, ())
    trainable = jax.tree.map(lambda x: x + mean + noise, state.trainable)
    fresh = jax.tree.map(jnp.zeros_like, state.opt_state)
    return state.replace(trainable=trainable, opt_state=fresh)

  def end_task(state, forward, batches, rng):
    del forward, batches, rng
    names = fmeta.tree.names(state.frozen)
    total = sum(jnp.sum(x) for x in jax.tree.leaves(state.trainable))
    frozen = fmeta.tree.map_with_name(
      lambda name, x: x + 0.01 * total if name == names[0] else x, state.frozen
    )
    return state.replace(frozen=frozen)

  return learner._replace(begin_task=begin_task, end_task=end_task)


def stages(count=3):
  prepare = [batch(100), batch(101)]
  return [
    train.Stage(f't{k}', batch, STEPS, ends_task=True, prepare=prepare)
    for k in range(count)
  ]


def fit(learner, stream, start=None, **options):
  start = learner.init(PARAMS, KEY) if start is None else start
  return train.fit(
    learner, start, stream, KEY, forward=FORWARD, quiet=True, **options
  )


def by_hand(learner, stream):
  state, step = learner.init(PARAMS, KEY), jax.jit(learner.step)
  for stage in stream:
    key = jax.random.fold_in(jax.random.fold_in(KEY, state.step), 6)
    state = learner.begin_task(state, FORWARD, stage.prepare, key)
    for i in range(stage.num_steps):
      state, _ = step(state, stage.batches(i), KEY)
    key = jax.random.fold_in(jax.random.fold_in(KEY, state.step), 4)
    state = learner.end_task(state, FORWARD, stage.remember, key)
  return state


@pytest.mark.usefixtures('optimised')
def test_fit_keeps_all_that_a_boundary_changes():
  learner = renewing()
  found = fit(learner, stages()).state
  assert_same(found, by_hand(learner, stages()), 'boundary')


def test_one_program_serves_all_tasks_though_frozen_leaves_change():
  assert fit(renewing(), stages(5), steps_per_dispatch=STEPS).traces == 1


@pytest.mark.parametrize('cut', (STEPS, STEPS + 2, 2 * STEPS))
@pytest.mark.usefixtures('optimised')
def test_resume_loads_frozen_leaves_that_a_boundary_changed(cut, tmp_path):
  learner, whole = renewing(), fit(renewing(), stages())

  class Stop(Exception):
    pass

  def until(stage):
    def batches(i):
      if (int(stage.name[1:]) * STEPS + i) == cut:
        raise Stop
      return stage.batches(i)

    return stage._replace(batches=batches)

  options = {'workdir': tmp_path / 'run', 'checkpoint_every': 2}
  options |= {'steps_per_dispatch': 2}
  with pytest.raises(Stop):
    fit(learner, [until(stage) for stage in stages()], **options)
  found = fit(learner, stages(), resume=True, **options)
  assert_same(found.state, whole.state, f'cut at {cut}')


def test_frozen_leaves_no_boundary_changed_must_be_the_same(tmp_path):
  options = {'workdir': tmp_path / 'run', 'checkpoint_every': 2}
  fit(renewing(), stages(), **options)
  changed = fmeta.tree.names(renewing().init(PARAMS, KEY).frozen)
  other = fmeta.tree.map_with_name(
    lambda name, x: x + 1 if name == changed[-1] else x, PARAMS
  )
  assert changed[-1] != changed[0]
  with pytest.raises(UsageError, match='other frozen parameters'):
    start = renewing().init(other, KEY)
    fit(renewing(), stages(), start, resume=True, **options)


def test_stages_without_anything_to_prepare_do_not_begin():
  learner = renewing()._replace(begin_task=lambda *given: 1 / 0)
  fit(learner, [stages(1)[0]._replace(prepare=())])


def test_another_shape_is_refused_by_name():
  def end_task(state, *given):
    longer = jax.tree.map(lambda x: jnp.stack([x, x]), state.trainable)
    return state.replace(trainable=longer)

  learner = renewing()._replace(end_task=end_task)
  with pytest.raises(UsageError, match='trainable.*went from.*keep the shapes'):
    fit(learner, stages(1))


def test_preparing_needs_a_forward():
  with pytest.raises(UsageError, match='prepare with'):
    start = renewing().init(PARAMS, KEY)
    train.fit(renewing(), start, stages(1), KEY, quiet=True)
