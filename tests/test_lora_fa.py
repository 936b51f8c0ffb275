"""LoRA-FA is LoRA whose A rests."""

import jax
import numpy as np
import pytest
import toys

from fmeta import UsageError, adapters, optim, tree
from fmeta.learner import finetune
from fmeta.testing import assert_same

LOSS, PARAMS, BATCH, _ = toys.problem()
KEY = jax.random.key(2)
OPTIONS = {'rank': 2, 'alpha': 3.0, 'also': ('head/.*',)}
MATRICES = 'body/.*/kernel'


def after(tuning):
  """The start, and two steps from factors away from zero."""
  params = adapters.lora_init(PARAMS, KEY, (MATRICES,), 2)
  away = jax.tree.map(lambda x: x + 0.1, params)
  learner = finetune(LOSS, optim.sgd(0.1), tuning=tuning)
  start = learner.init(away, KEY)
  step = jax.jit(learner.step)
  return learner, start, step(start, BATCH, KEY)[0]


def test_a_step_is_loras_but_for_a():
  whole, _, expected = after(adapters.lora(MATRICES, **OPTIONS))
  learner, start, found = after(adapters.lora_fa(MATRICES, **OPTIONS))
  assert_same(start.frozen, found.frozen, 'A and the kernels')
  a, rest = tree.partition(
    expected.trainable, lambda name: name.endswith('lora_a')
  )
  assert_same(rest, found.trainable, 'B and the head')
  assert tree.names(a) and not set(tree.names(a)) & set(tree.names(rest))
  moved = tree.get(expected.trainable, 'body/layer_0/kernel.lora_a')
  still = tree.get(found.frozen, 'body/layer_0/kernel.lora_a')
  assert np.any(moved != still)
  # With A where LoRA moved it, the merged models are the same.
  both = tree.combine(found.frozen, a)
  assert_same(
    whole.params(expected),
    learner.params(found.replace(frozen=both)),
    'merged',
  )


def test_a_table_is_refused():
  params = {**PARAMS, 'words': {'embedding': np.ones((7, 6), np.float32)}}
  with pytest.raises(UsageError, match="words/embedding.lora_a' is born zero"):
    adapters.lora_fa('words/embedding', rank=2).init(params, KEY)
