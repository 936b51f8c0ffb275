"""One row per method: the conformance suite on all of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from fmeta import (
  adapters,
  gradients,
  losses,
  memory,
  optim,
  penalty,
  surgical,
  tuning,
)
from fmeta.learner import beside, finetune, rehearse
from fmeta.meta import episode_loss, reptile_loss
from fmeta.testing import check_learner

LOSS, PARAMS, BATCH, FORWARD = toys.problem(dropout=0.2)
ROW = {
  'x': jax.ShapeDtypeStruct((6,), jnp.float32),
  'label': jax.ShapeDtypeStruct((), jnp.int32),
}
MATRICES = r'body/.*/kernel'
CLIPPED = optim.adamw(0.01)
SGD = optim.sgd(0.1)
SURGERY = tuning.select('body/layer_1/.*', 'head/.*')
LORA = adapters.lora(MATRICES, rank=2, also=('head/.*',))
# What a gradient with respect to it needs: no clipping, no zero square root.
SMOOTH = optim.adam(0.01, eps_root=1e-8)


def read_memory(params, model_state, batch, rng):
  loss, aux = LOSS(params, model_state, batch, rng)
  past = {key: batch[f'memory_{key}'] for key in ('x', 'label', 'weight')}
  return loss + LOSS(params, model_state, past, rng)[0], aux


ROWS = {
  'full sgd': finetune(LOSS, SGD),
  'full adamw': finetune(LOSS, CLIPPED),
  'momentum': finetune(LOSS, optim.sgd(0.1, momentum=0.9, clip_norm=0.5)),
  'schedule': finetune(LOSS, optim.adamw(optim.warmup_linear(0.01, 10))),
  'select': finetune(LOSS, CLIPPED, tuning=SURGERY),
  'auto_surgical': finetune(
    LOSS,
    CLIPPED,
    tuning=surgical.auto_surgical(LOSS, PARAMS, [BATCH], also=('head/.*',)),
  ),
  'lora': finetune(LOSS, CLIPPED, tuning=LORA),
  'lora_merged': finetune(
    LOSS, CLIPPED, tuning=adapters.lora_merged(MATRICES, rank=2)
  ),
  'l2_sp': finetune(LOSS, CLIPPED, penalty=penalty.l2_sp(0.1)),
  'ewc': finetune(LOSS, SGD, tuning=LORA, penalty=penalty.ewc(1.0)),
  'first_order': finetune(LOSS, SGD, value_and_grad=gradients.first_order()),
  'accumulate': finetune(LOSS, CLIPPED, value_and_grad=gradients.accumulate(2)),
  'rehearse': rehearse(
    finetune(LOSS, CLIPPED, tuning=SURGERY), memory.reservoir(16, ROW), 4
  ),
  'rehearse beside': rehearse(
    finetune(read_memory, SGD), memory.reservoir(16, ROW), 4, mix=beside
  ),
}
# Compiling for eight devices is slow: those whose data flow is special.
ON_A_MESH = ('full adamw', 'lora', 'accumulate', 'rehearse')
# Differentiable at every point, so the meta-gradient is checked as well.
META_ROWS = {
  'full sgd': finetune(LOSS, SGD),
  'select l2_sp': finetune(
    LOSS, SMOOTH, tuning=SURGERY, penalty=penalty.l2_sp(0.1)
  ),
  'lora ewc': finetune(LOSS, SGD, tuning=LORA, penalty=penalty.ewc(1.0)),
  'accumulate': finetune(LOSS, SMOOTH, value_and_grad=gradients.accumulate(2)),
  'rehearse': rehearse(finetune(LOSS, SGD), memory.reservoir(16, ROW), 4),
}


def mesh():
  return jax.make_mesh(
    (8,), ('data',), axis_types=(jax.sharding.AxisType.Auto,)
  )


@pytest.mark.parametrize('name', ROWS)
def test_learner_conforms(name):
  on = mesh() if name in ON_A_MESH else None
  check_learner(ROWS[name], PARAMS, BATCH, mesh=on)


@pytest.mark.parametrize('name', META_ROWS)
def test_meta_gradient_of_the_method_is_exact(name):
  from fmeta.testing import check_meta_gradient

  check_meta_gradient(META_ROWS[name], PARAMS, BATCH, LOSS)


def episodes(tasks):
  parts = [
    {
      'support': toys.batch_of(4, seed=k),
      'query': toys.batch_of(5, seed=100 + k),
    }
    for k in range(tasks)
  ]
  return jax.tree.map(lambda *x: jnp.stack(x), *parts)


INNER = finetune(LOSS, SGD, tuning=SURGERY)
OUTER_ROWS = {
  'maml': finetune(episode_loss(INNER, LOSS, 2), CLIPPED),
  'reptile': finetune(reptile_loss(INNER, 2), CLIPPED),
  'maml of maml, select': finetune(
    episode_loss(INNER, LOSS, 1), SGD, tuning=tuning.select('body/.*')
  ),
}


@pytest.mark.parametrize('name', OUTER_ROWS)
def test_meta_learner_conforms(name):
  # The same suite: a meta-learner is a learner.
  on = mesh() if name == 'maml' else None
  check_learner(OUTER_ROWS[name], PARAMS, episodes(8), mesh=on)


@pytest.mark.parametrize('spelling', ['keyword', 'positional', 'attribute'])
def test_learner_with_batch_norm_conforms(spelling):
  module = toys.NormNet(spelling)
  loss_fn = losses.supervised(
    toys.forward_of(module), losses.softmax_cross_entropy
  )
  params, model_state = toys.init_of(module)
  learner = finetune(loss_fn, SGD, tuning=tuning.select('head/.*'))
  check_learner(learner, params, BATCH, model_state=model_state)


@pytest.mark.parametrize('name', ['full sgd', 'select', 'lora', 'ewc'])
def test_each_step_changes_what_it_should(name):
  learner = ROWS[name]
  state = learner.init(PARAMS, jax.random.key(0))
  after, aux = jax.jit(learner.step)(state, BATCH, jax.random.key(1))
  moved = jax.tree.map(
    lambda x, y: bool(np.any(x != y)), state.trainable, after.trainable
  )
  stuck = [
    path
    for path, leaf in jax.tree_util.tree_leaves_with_path(moved)
    # B = 0 gives A no gradient, so A does not move in the first step.
    if not leaf and 'lora_a' not in str(path)
  ]
  assert not stuck
  assert aux.metrics['grad_norm'] > 0 and aux.metrics['update_norm'] > 0
