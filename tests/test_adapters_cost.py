"""A frozen weight gets no gradient, whatever adapter stands beside it."""

import re

import jax
import numpy as np
import pytest
from test_prompts import ATTENTION, BATCH, KEY, MODULE, PARAMS, PREFIX, PROMPT

from fmeta import adapters, losses, models, optim, tuning
from fmeta.learner import finetune

TUNINGS = {
  'ia3': adapters.ia3(
    ATTENTION, inputs=(r'body/layer_\d/mlp/down/kernel',), also=('head/.*',)
  ),
  'bottleneck': adapters.bottleneck(
    r'body/layer_\d/(attention/output|mlp/down)/kernel',
    width=2,
    also=('head/.*',),
  ),
  'prefix': PREFIX,
  'prompt': PROMPT,
}
ROWS = jax.tree.map(lambda x: np.resize(x, (5, *x.shape[1:])), BATCH)


def products(what):
  """Shapes of all matrix products in the lowered step."""
  loss_fn = losses.supervised(
    models.forward(MODULE), losses.softmax_cross_entropy
  )
  learner = finetune(loss_fn, optim.adamw(1e-3, clip_norm=1.0), tuning=what)
  state = jax.eval_shape(learner.init, PARAMS, KEY)
  text = jax.jit(learner.step).lower(state, ROWS, KEY).as_text()
  return set(re.findall(r'dot_general .*-> tensor<([\dx]*)xf32>', text))


# With 20 tokens only a gradient of a kernel has these shapes.
FULL = {'8x8', '8x12', '12x8'}


@pytest.mark.parametrize('name', TUNINGS)
def test_no_gradient_of_a_frozen_weight_is_formed(name):
  assert not FULL & products(TUNINGS[name])


def test_full_tuning_forms_the_gradients_that_are_looked_for():
  assert FULL <= products(tuning.full())
