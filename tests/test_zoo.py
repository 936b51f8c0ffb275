"""One row per optimiser: conformance, and the written table is true."""

import jax.numpy as jnp
import numpy as np
import pytest
import zoo

from fmeta import tuning
from fmeta.learner import finetune
from fmeta.testing import check_learner
from fmeta.types import Aux

# The claims that matter most (what is safe), and one of each way to be not.
MEASURED = [
  'sgd',
  'momentum',
  'sgd, clipped',
  'adaptive clip',
  'adamw',
  'adamw, eps_root',
  'nadam, eps_root',
  'radam',
  'adabelief, eps_root',
  'yogi',
  'adagrad',
  'rmsprop',
  'adan',
  'lion',
  'lamb',
  'schedule_free sgd',
]


def _draw(*shape):
  return jnp.asarray(np.random.default_rng(len(shape)).normal(size=shape))


LAYER = {'kernel': _draw(3, 4), 'bias': _draw(4)}
PARAMS = {'body': {'layer_0': LAYER}, 'head': {'kernel': _draw(4, 2)}}
BATCH = {'x': _draw(4, 3), 'y': _draw(4, 2)}


def _loss(params, model_state, batch, rng):
  layer = params['body']['layer_0']
  hidden = jnp.tanh(batch['x'] @ layer['kernel'] + layer['bias'][None])
  error = hidden @ params['head']['kernel'] - batch['y']
  return jnp.mean(error**2), Aux(model_state, {}, jnp.ones(()))


@pytest.mark.parametrize('name', [n for n in zoo.ROWS if n not in zoo.VARIANTS])
def test_optimiser_conforms(name):
  optimizer = zoo.ROWS[name].build(0.1)
  learner = finetune(_loss, optimizer, tuning=tuning.select('body/.*'))
  check_learner(learner, PARAMS, BATCH, num_steps=2)


def test_the_table_has_every_row_with_its_source_and_bytes():
  written = zoo.written()
  assert list(written) == [row.how for row in zoo.ROWS.values()]
  for row in zoo.ROWS.values():
    cells = written[row.how]
    assert cells[1:3] == [row.source, zoo.state_bytes(row)], row.how
    assert cells[6] == row.note
  assert zoo.TABLE.read_text().startswith(zoo.HEAD)


@pytest.mark.parametrize('name', MEASURED)
def test_the_table_says_what_is_measured(name):
  row = zoo.ROWS[name]
  assert zoo.written()[row.how][3:6] == zoo.safety(row)
