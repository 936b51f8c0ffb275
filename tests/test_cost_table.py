"""Every tuning's step against the same step written by hand."""

import jax
import numpy as np
import pytest

from experiments.benchmarks import bert_by_hand, cost
from fmeta import models, tree
from fmeta.errors import UsageError

# Large enough that products are what a step costs, and one block to compile.
CONFIG = cost.Config(
  hidden_size=64,
  num_layers=2,
  intermediate_size=256,
  num_heads=2,
  vocab_size=50,
  batch_size=8,
  length=16,
  rank=4,
)
OFTEN = ('last block', 'dora', 'vera', 'ia3', 'bottleneck', 'prefix', 'prompt')


def rows():
  rare = [pytest.mark.oracle]
  return [
    pytest.param(name, marks=[] if name in OFTEN else rare)
    for name in cost.tunings(CONFIG)
  ]


@pytest.mark.parametrize('row', rows())
def test_a_step_costs_no_more_than_one_written_by_hand(row):
  found = cost.measure(row, CONFIG, cost.setting(CONFIG))
  assert found['flops ratio'] <= 1.02
  assert found['temp ratio'] <= 1.02
  # Two moments and a few counters.
  assert 2 <= found['slots ratio'] <= 2.02


@pytest.mark.parametrize('row', cost.tunings(CONFIG))
def test_the_model_written_by_hand_is_the_same_function(row):
  module, shapes, batch = cost.setting(CONFIG)
  random = np.random.default_rng(3)
  draw = lambda x: random.normal(0, 0.1, x.shape).astype(np.float32)
  params = jax.tree.map(draw, shapes)
  tuning = cost.tunings(CONFIG)[row]
  trainable, frozen = tuning.init(params, jax.random.key(0))
  # Away from the start, where most adapters do nothing.
  trainable = jax.tree.map(lambda x: x + draw(x), trainable)
  shape = batch['input_ids'].shape
  lengths = random.integers(1, shape[1] + 1, shape[0])
  given = {
    'input_ids': random.integers(0, CONFIG.vocab_size, shape),
    'attention_mask': (np.arange(shape[1]) < lengths[:, None]).astype(int),
  }
  with tuning.intercept(trainable, frozen) as adapted:
    ours, _ = models.forward(module)(adapted, {}, given, None)
  theirs = bert_by_hand.logits(
    {**cost.flat(frozen), **cost.flat(trainable)},
    given,
    module.config,
    cost.scale_of(row, CONFIG),
  )
  assert tree.size(trainable)
  np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5)


def test_an_unknown_row_is_refused():
  config = cost.Config(rows=('lara',))
  with pytest.raises(UsageError, match="no row 'lara'; possible: full"):
    cost.run(config, None)
