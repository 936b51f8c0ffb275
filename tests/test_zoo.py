"""One row per optimiser: conformance, and the written table is true."""

import jax.numpy as jnp
import numpy as np
import pytest
import zoo

from fmeta import tuning
from fmeta.learner import finetune
from fmeta.testing import check_learner
from fmeta.types import Aux

# Measured in every run; the other rows with --oracles, as they take seconds.
MEASURED = (
  'sgd, clipped',
  'adamw',
  'adamw, eps_root',
  'rmsprop',
  'radam',
  'lamb',
  'schedule_free sgd',
)


def _rows(often):
  """All rows; what `often` leaves out runs with --oracles only."""
  rare = [pytest.mark.oracle]
  return [
    pytest.param(name, marks=[] if often(name, row) else rare)
    for name, row in zoo.ROWS.items()
  ]


def _is_ours(name, row):
  # The rest are optax's own inside a combinator that other rows test.
  return 'optax.' not in row.how and not name.endswith('eps_root')


def _draw(*shape):
  random = np.random.default_rng(len(shape))
  return jnp.asarray(random.normal(size=shape), jnp.float32)


PARAMS = {'body': {'kernel': _draw(3, 4)}, 'head': {'kernel': _draw(4, 2)}}
BATCH = {'x': _draw(4, 3), 'y': _draw(4, 2)}


def _loss(params, model_state, batch, rng):
  hidden = batch['x'] @ params['body']['kernel']
  error = hidden @ params['head']['kernel'] - batch['y']
  return jnp.mean(error**2), Aux(model_state, {}, jnp.ones(()))


def check(name):
  optimizer = zoo.ROWS[name].build(0.1)
  learner = finetune(_loss, optimizer, tuning=tuning.select('body/.*'))
  check_learner(learner, PARAMS, BATCH, num_steps=2)


@pytest.mark.parametrize(
  'name', _rows(lambda name, row: _is_ours(name, row) and name != 'adan')
)
def test_optimiser_conforms(name):
  check(name)


def test_adan_conforms(as_users):
  check('adan')


def test_the_table_has_every_row_with_its_source_and_bytes():
  written = zoo.written()
  assert list(written) == [row.how for row in zoo.ROWS.values()]
  for row in zoo.ROWS.values():
    cells = written[row.how]
    assert cells[1:3] == [row.source, zoo.state_bytes(row)], row.how
    assert cells[6] == row.note
  assert zoo.TABLE.read_text().startswith(zoo.HEAD)


@pytest.mark.parametrize('name', _rows(lambda name, row: name in MEASURED))
def test_the_table_says_what_is_measured(name):
  row = zoo.ROWS[name]
  assert zoo.written()[row.how][3:6] == zoo.safety(row)
