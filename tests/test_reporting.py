import jax
import numpy as np
import pytest
import toys

import fmeta
from fmeta import data, optim, train, tree
from fmeta.testing import assert_close

KEY = jax.random.key(5)
LOSS, PARAMS, BATCH, FORWARD = toys.problem()


def _learner():
  return fmeta.finetune(LOSS, optim.adam(0.01), penalty=fmeta.ewc(3.0))


def _started(learner):
  state = learner.init(PARAMS, KEY)
  return learner.end_task(state, FORWARD, [BATCH], KEY)


def test_the_steps_are_those_of_the_learner():
  full, lean = _learner(), fmeta.reporting(_learner(), 'accuracy')
  one = two = _started(full)
  first, second = jax.jit(full.step), jax.jit(lean.step)
  for _ in range(3):
    one, whole = first(one, BATCH, KEY)
    two, part = second(two, BATCH, KEY)
  assert_close(one.trainable, two.trainable, 'three steps', 1e-6)
  assert set(part.metrics) == {'loss', 'accuracy'}
  assert_close(whole.metrics['loss'], part.metrics['loss'], 'loss', 1e-6)


def test_what_is_not_reported_is_not_computed():
  def flops(learner):
    def run(state, batch):
      state, aux = learner.step(state, batch, KEY)
      return state, aux.metrics

    compiled = jax.jit(run).lower(start, BATCH).compile()
    return compiled.cost_analysis()['flops']

  start = _started(_learner())
  # Two norms square and add each entry, the penalty's value does more.
  saved = flops(_learner()) - flops(fmeta.reporting(_learner()))
  assert saved >= 6 * tree.size(start.trainable)


def test_fit_records_what_is_reported():
  learner = fmeta.reporting(_learner(), 'accuracy')
  rows = jax.tree.map(np.asarray, dict(BATCH))
  stage = train.Stage('task', data.batches(rows, 4, 0), 2)
  fitted = train.fit(learner, _started(learner), [stage], KEY, quiet=True)
  assert {'loss', 'accuracy'} <= set(fitted.history[-1])
  assert not {'grad_norm', 'update_norm', 'penalty'} & set(fitted.history[-1])


def test_a_metric_that_there_is_not_is_refused():
  learner = fmeta.reporting(_learner(), 'acuracy')
  with pytest.raises(
    fmeta.UsageError, match="no metric 'acuracy'.*possible: accuracy, grad"
  ):
    jax.eval_shape(learner.step, learner.init(PARAMS, KEY), BATCH, KEY)
