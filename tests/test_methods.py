"""One row per method: the conformance suite on all of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from fmeta import (
  adapters,
  averaging,
  continual,
  gradients,
  losses,
  memory,
  mixing,
  mixout,
  models,
  optim,
  penalty,
  regularise,
  sharpness,
  surgical,
  tree,
  tuning,
)
from fmeta.data.augment import augmented
from fmeta.learner import finetune, rehearse
from fmeta.memory import beside
from fmeta.meta import episode_loss, reptile_loss
from fmeta.per_leaf import adamw_per_leaf
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
ADAPTED = 'body/layer_0/kernel'
IA3 = adapters.ia3(ADAPTED, inputs=('head/kernel',))
BOTTLENECK = adapters.bottleneck(ADAPTED, width=2, also=('head/.*',))
SUBSPACE = adapters.subspace(
  MATRICES, dim=4, groups=('.*/layer_0/.*', '.*'), also=('head/.*',)
)
# What runs adapters by itself; `models.forward` does.
ENTERING = losses.supervised(
  adapters.entering(FORWARD), losses.softmax_cross_entropy
)
# What a gradient with respect to it needs: no zero square root.
SMOOTH = optim.adamw(0.01, eps_root=1e-8)
PISSA = adapters.pissa(MATRICES, rank=2)


def read_memory(params, model_state, batch, rng):
  loss, aux = LOSS(params, model_state, batch, rng)
  past = {key: batch[f'memory_{key}'] for key in ('x', 'label', 'weight')}
  return loss + LOSS(params, model_state, past, rng)[0], aux


ANCHORED = mixout.anchored(SURGERY)
# Mixout's weights, at the worst point near them.
PERTURBED = mixout.mixout(0.5, sharpness.sharpness_aware(0.05))
# These draw for themselves; a second source would only take time to compile.
STILL = toys.problem()[0]
MIXED = mixing.mixup(STILL, 0.4, 3, inputs=('x',))


CE = losses.softmax_cross_entropy
# Two halves of one sample, and logits of an earlier step.
DER_PLUS_PLUS = continual.der_plus_plus(FORWARD, CE, 0.3, 0.7)


def remembers_logits(dtype):
  spec = {**ROW, 'outputs': jax.ShapeDtypeStruct((3,), dtype)}
  held = memory.reservoir(16, spec)
  return rehearse(finetune(DER_PLUS_PLUS, SGD), held, 4, mix=beside)


ICARL = continual.icarl_loss(FORWARD)


def jitter(batch, key):
  x = batch['x']
  return {**batch, 'x': x + 0.1 * jax.random.normal(key, x.shape, x.dtype)}


ONE_HEAD = np.ones((1, 3), bool)
# Before a task has ended most hold nothing; test_penalty.py goes on from there.
LEARNING = {
  'si': penalty.si(1.0),
  'mas': penalty.mas(1.0),
  'online_ewc': penalty.online_ewc(1.0, gamma=0.9),
  'ewc_kfac': penalty.ewc_kfac(1.0, 3),
  'rwalk': penalty.rwalk(1.0, every=2),
  'lwf': penalty.lwf(FORWARD, 1.0, ONE_HEAD),
  'feature_distillation': penalty.feature_distillation(FORWARD, 1.0),
  'all_of': penalty.all_of(penalty.l2_sp(0.1), penalty.si(1.0)),
}


def remembering(memory, tasks=2):
  """The memory after some tasks."""

  def init():
    held = memory.init()
    for k in range(tasks):
      # The batch's inputs with other labels, which its gradient opposes.
      rows = {**BATCH, 'label': (BATCH['label'] + 1 + k) % 3}
      held = memory.insert(held, rows, jnp.ones(8), jax.random.key(k))
      held = memory.end_task(held)
    return held

  return memory._replace(init=init)


def after_a_task(hold):
  """The penalty as the end of a task leaves it."""

  def init(trainable, params):
    given = trainable, params, {}, FORWARD, [toys.batch_of(5, seed=40)]
    return hold.consolidate(
      hold.init(trainable, params), *given, jax.random.key(4)
    )

  return hold._replace(init=init)


GEM = rehearse(
  finetune(LOSS, SGD, value_and_grad=continual.gem()),
  remembering(continual.task_by_task(memory.per_task(3, 8, ROW))),
  8,
  mix=beside,
)
LOW_RANK = {'also': ('head/.*',), 'rank': 2}
O_LORA = finetune(
  LOSS,
  adamw_per_leaf(0.01),
  tuning=adapters.lora(MATRICES, **LOW_RANK),
  penalty=after_a_task(continual.o_lora(1.0, 3)),
)
INF_LORA = continual.inf_lora(
  finetune(
    LOSS,
    adamw_per_leaf(0.01),
    tuning=adapters.lora_fa(MATRICES, **LOW_RANK),
  ),
  3,
  epsilon=0.3,
)


def in_second_task(learner):
  """The learner, which starts as one task has left it and the next begun."""
  first, second = ([toys.batch_of(5, seed=k)] for k in (40, 41))

  def init(params, rng, model_state=None):
    state = learner.init(params, rng, model_state)
    state = learner.begin_task(state, FORWARD, first, rng)
    state = learner.end_task(state, FORWARD, first, rng)
    return learner.begin_task(state, FORWARD, second, rng)

  return learner._replace(init=init)


GPM = after_a_task(continual.gpm(MATRICES, energy=0.7))

ROWS = {
  'full sgd': finetune(LOSS, SGD),
  'full adamw': finetune(LOSS, CLIPPED),
  'momentum': finetune(LOSS, optim.sgd(0.1, momentum=0.9, clip_norm=0.5)),
  'schedule': finetune(LOSS, optim.adamw(optim.warmup_linear(0.01, 10))),
  'select': finetune(LOSS, CLIPPED, tuning=SURGERY),
  'adamw_per_leaf': finetune(LOSS, adamw_per_leaf(0.01), tuning=SURGERY),
  'auto_surgical': finetune(
    LOSS,
    CLIPPED,
    tuning=surgical.auto_surgical(LOSS, PARAMS, [BATCH], also=('head/.*',)),
  ),
  'lora': finetune(LOSS, CLIPPED, tuning=LORA),
  'lora_merged': finetune(
    LOSS, CLIPPED, tuning=adapters.lora_merged(MATRICES, rank=2)
  ),
  'ia3': finetune(LOSS, SGD, tuning=IA3),
  'bottleneck': finetune(ENTERING, SGD, tuning=BOTTLENECK),
  'subspace': finetune(LOSS, SGD, tuning=SUBSPACE),
  'dora': finetune(LOSS, CLIPPED, tuning=adapters.dora(MATRICES, rank=2)),
  'pissa': finetune(LOSS, CLIPPED, tuning=PISSA),
  'vera': finetune(LOSS, CLIPPED, tuning=adapters.vera(MATRICES, rank=7)),
  'l2_sp': finetune(LOSS, CLIPPED, penalty=penalty.l2_sp(0.1)),
  'ewc': finetune(LOSS, SGD, tuning=LORA, penalty=penalty.ewc(1.0)),
  'first_order': finetune(LOSS, SGD, value_and_grad=gradients.first_order()),
  'accumulate': finetune(LOSS, CLIPPED, value_and_grad=gradients.accumulate(2)),
  'augmented': finetune(augmented(LOSS, jitter), CLIPPED),
  'rehearse': rehearse(
    finetune(LOSS, CLIPPED, tuning=SURGERY), memory.reservoir(16, ROW), 4
  ),
  'rehearse beside': rehearse(
    finetune(read_memory, SGD), memory.reservoir(16, ROW), 4, mix=beside
  ),
  'der_plus_plus': remembers_logits(jnp.float32),
  'er_ace class_balanced': rehearse(
    finetune(continual.er_ace(FORWARD, CE), SGD),
    memory.class_balanced(16, ROW),
    4,
    mix=beside,
  ),
  'rehearse per_task': rehearse(
    finetune(LOSS, SGD), memory.per_task(2, 8, ROW), 4
  ),
  'gem': GEM,
  # With dropout the scan is bitwise the loop only as users compile (conftest).
  'a_gem': rehearse(
    finetune(STILL, SGD, value_and_grad=continual.a_gem()),
    remembering(memory.reservoir(16, ROW), tasks=1),
    4,
    mix=beside,
  ),
  'ogd': finetune(
    LOSS, SGD, tuning=SURGERY, penalty=after_a_task(continual.ogd(8, 4))
  ),
  'gpm': finetune(LOSS, SGD, penalty=GPM),
  'lora_fa': finetune(LOSS, CLIPPED, tuning=adapters.lora_fa(MATRICES, rank=2)),
  'o_lora': continual.fold(O_LORA),
  'inf_lora': in_second_task(INF_LORA),
  'ema mixout sam': finetune(
    STILL,
    averaging.ema(SGD, 0.9),
    tuning=ANCHORED,
    value_and_grad=PERTURBED,
  ),
  'swa mixup': finetune(MIXED, averaging.swa(SGD, 1, 2)),
  'r_drop': finetune(regularise.r_drop(LOSS, 1.0), SGD),
  **{
    name: finetune(LOSS, SGD, tuning=SURGERY, penalty=each)
    for name, each in LEARNING.items()
  },
}
# Compiling for eight devices is slow: those whose data flow is special.
ON_A_MESH = (
  'accumulate',
  'rehearse',
  'er_ace class_balanced',
  'gem',
  'ema mixout sam',
  'swa mixup',
)
# Differentiable at every point, so the meta-gradient is checked as well.
META_ROWS = {
  'full sgd': finetune(LOSS, SGD),
  'select l2_sp': finetune(
    LOSS, SMOOTH, tuning=SURGERY, penalty=penalty.l2_sp(0.1)
  ),
  'lora ewc': finetune(LOSS, SGD, tuning=LORA, penalty=penalty.ewc(1.0)),
  # Through the singular vectors, too. (DoRA's norm is a constant in the
  # backward pass, so its meta-gradient is not that of differences.)
  'pissa': finetune(LOSS, SGD, tuning=PISSA),
  'accumulate': finetune(LOSS, SMOOTH, value_and_grad=gradients.accumulate(2)),
  'rehearse': rehearse(finetune(LOSS, SGD), memory.reservoir(16, ROW), 4),
  # Through the logits it remembers, too.
  'der_plus_plus': remembers_logits(jnp.float64),
  'ema mixout sam': ROWS['ema mixout sam'],
  # Through the dual as well.
  'gem': GEM,
  'lora_fa': finetune(LOSS, SGD, tuning=adapters.lora_fa(MATRICES, rank=2)),
  # With factors of an earlier task.
  'o_lora': finetune(
    LOSS, SGD, tuning=LORA, penalty=after_a_task(continual.o_lora(1.0, 3))
  ),
}


BERT = models.BertClassifier(
  models.BertConfig(
    vocab_size=6,
    hidden_size=4,
    num_layers=1,
    num_heads=2,
    intermediate_size=4,
    max_positions=8,
    dropout=0.0,
    attention_dropout=0.0,
  ),
  num_classes=3,
)
TEXT = {
  'input_ids': jnp.arange(12).reshape(4, 3) % 6,
  'attention_mask': jnp.asarray([[1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 1, 1]]),
  'label': jnp.asarray([0, 1, 2, 0]),
}
OF_TEXT = losses.supervised(models.forward(BERT), losses.softmax_cross_entropy)
KEYS_AND_VALUES = 'body/layer_0/attention/(key|value)/kernel'
PREFIX = adapters.prefix(KEYS_AND_VALUES, length=2, also=('head/.*',))
PROMPT = adapters.prompt(length=2)


def mesh():
  return jax.make_mesh(
    (8,), ('data',), axis_types=(jax.sharding.AxisType.Auto,)
  )


@pytest.mark.parametrize('name', ROWS)
def test_learner_conforms(name):
  on = mesh() if name in ON_A_MESH else None
  check_learner(ROWS[name], PARAMS, BATCH, mesh=on)


def test_icarl_conforms():
  teacher = jax.random.normal(jax.random.key(3), (8, 3))
  batch = {**BATCH, 'teacher': teacher, 'old': teacher > 0}
  check_learner(finetune(ICARL, SGD), PARAMS, batch)


def test_prefix_tuning_of_bert_conforms():
  params, _ = models.init(BERT, jax.random.key(0), TEXT)
  check_learner(finetune(OF_TEXT, SGD, tuning=PREFIX), params, TEXT)


def grown(params):
  """Outer parameters that own what the tunings below train."""
  random = np.random.default_rng(0)
  away = lambda x: x + 0.3 * random.normal(size=x.shape).astype(x.dtype)
  return jax.tree.map(away, params)


BORN_ROWS = {
  'ia3': (
    finetune(LOSS, SGD, tuning=IA3),
    LOSS,
    adapters.ia3_init(PARAMS, (ADAPTED,), ('head/kernel',)),
  ),
  'bottleneck': (
    finetune(ENTERING, SGD, tuning=BOTTLENECK),
    ENTERING,
    adapters.bottleneck_init(PARAMS, jax.random.key(1), (ADAPTED,), 2),
  ),
  'subspace': (
    finetune(LOSS, SGD, tuning=SUBSPACE),
    LOSS,
    adapters.subspace_init(PARAMS, 4, 2),
  ),
}


@pytest.mark.parametrize('name', BORN_ROWS)
def test_meta_gradient_of_leaves_an_outer_loop_owns_is_exact(name):
  from fmeta.testing import check_meta_gradient

  learner, loss_fn, params = BORN_ROWS[name]
  grads = check_meta_gradient(
    learner, grown(params), BATCH, loss_fn, num_steps=1
  )
  assert all(np.any(np.asarray(g)) for g in jax.tree.leaves(grads))


def test_meta_gradient_of_a_prompt_on_a_prefix_is_exact(x64):
  from fmeta.testing import check_gradient

  key = jax.random.key(0)
  params, _ = models.init(BERT, key, TEXT)
  params = adapters.prefix_init(params, key, (KEYS_AND_VALUES,), 2)
  params = toys.double(adapters.prompt_init(params, key, '.*/word/.*', 2))
  added, base = tree.partition(params, lambda name: '.' in name)
  learner = finetune(OF_TEXT, SGD, tuning=PROMPT)

  def objective(added):
    state = learner.init(tree.combine(grown(base), added), key)
    state, _ = learner.step(state, TEXT, key)
    with learner.using(state) as adapted:
      return OF_TEXT(adapted, {}, TEXT, None)[0]

  grads = check_gradient(objective, grown(added))
  assert len(tree.names(grads)) == 3


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
  'maml': finetune(episode_loss(INNER, LOSS, 2), SGD),
  'reptile': finetune(reptile_loss(INNER, 2), CLIPPED),
  'maml of maml, select': finetune(
    episode_loss(INNER, LOSS, 1), SGD, tuning=tuning.select('body/.*')
  ),
}


@pytest.mark.parametrize(
  'name', [name for name in OUTER_ROWS if name != 'maml']
)
def test_meta_learner_conforms(name):
  # The same suite: a meta-learner is a learner.
  check_learner(OUTER_ROWS[name], PARAMS, episodes(8))


def test_maml_conforms(as_users):
  check_learner(OUTER_ROWS['maml'], PARAMS, episodes(8), mesh=mesh())


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
