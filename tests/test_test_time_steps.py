"""The inner loop of a test is another one than that of training."""

import importlib

import jax
import numpy as np
import pytest
from test_meta import _episodes, _inner

from fmeta import meta

START = np.array([1.0, -2.0, 0.5])


def test_rate_and_steps_of_a_test_are_its_own(x64):
  def forward(params, model_state, batch, rng):
    return params['t'], model_state

  episodes = _episodes(2)
  predict = meta.predict_episodes(_inner(rate=0.2), forward, 5)
  found = jax.jit(predict)({'t': START}, episodes, None)
  for k in range(2):
    form, centre = (np.asarray(episodes['support'][key][k]) for key in 'Ac')
    power = np.linalg.matrix_power(np.eye(3) - 0.2 * form, 5)
    expected = centre + power @ (START - centre)
    np.testing.assert_allclose(found[k], expected, rtol=1e-12)


# Inner steps of training and of testing, as the papers or their code have it.
STEPS = {
  'maml': (1, 3),
  'fomaml': (1, 3),
  'anil': (1, 3),
  'boil': (1, 3),
  't_net': (1, 3),
  'meta_curvature': (1, 3),
  'proto_maml': (1, 3),
  'meta_sgd': (1, 1),
  'imaml': (16, 16),
  'reptile': (5, 50),
}


@pytest.mark.parametrize('name', STEPS)
def test_the_experiments_adapt_for_as_many_steps_as_stated(name):
  module = importlib.import_module(f'experiments.fewshot.omniglot.{name}')
  config = module.Config()
  assert (config.inner_steps, config.test_steps) == STEPS[name]
