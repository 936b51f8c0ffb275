"""What `fit` does at a task's end."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from fmeta import memory, optim, train
from fmeta.learner import finetune, rehearse

KEY = jax.random.key(3)
LOSS, PARAMS, BATCH, _ = toys.problem()
ROW = {
  'x': jax.ShapeDtypeStruct((6,), jnp.float32),
  'label': jax.ShapeDtypeStruct((), jnp.int32),
}


def _counting():
  """A memory that counts its tasks."""
  held = memory.reservoir(4, ROW)

  def init():
    return {'tasks': jnp.zeros((), jnp.int32), 'held': held.init()}

  def insert(state, rows, weight, rng):
    return {**state, 'held': held.insert(state['held'], rows, weight, rng)}

  return held._replace(
    init=init,
    insert=insert,
    sample=lambda state, size, rng: held.sample(state['held'], size, rng),
    end_task=lambda state: {**state, 'tasks': state['tasks'] + 1},
  )


@pytest.mark.parametrize(('ends', 'tasks'), [(True, 2), (False, 0)])
def test_a_memory_hears_of_a_tasks_end_when_the_stage_says_so(ends, tasks):
  learner = rehearse(finetune(LOSS, optim.sgd(0.1)), _counting(), 2)
  stage = train.Stage('task', lambda i: BATCH, 2, ends_task=ends)
  start = learner.init(PARAMS, KEY)
  fitted = train.fit(
    learner, start, [stage, stage._replace(name='next')], KEY, quiet=True
  )
  assert fitted.state.memory['tasks'] == tasks
  assert fitted.state.memory['held']['seen'] == 2 * 2 * 8
  untouched = dataclasses.replace(fitted.state, memory={})
  again = train.fit(
    learner,
    start,
    [stage._replace(ends_task=not ends), stage._replace(name='next')],
    KEY,
    quiet=True,
  )
  jax.tree.map(
    np.testing.assert_array_equal,
    (untouched.trainable, untouched.opt_state),
    (again.state.trainable, again.state.opt_state),
  )
