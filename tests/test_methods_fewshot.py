"""One row per few-shot method: the conformance suite on all of them."""

import re

import jax
import jax.numpy as jnp
import optax
import pytest
import toys
from test_methods import SGD, episodes, mesh

from fmeta import fewshot, losses, optim, penalty, through, tree, tuning
from fmeta.learner import finetune
from fmeta.meta import episode_loss
from fmeta.testing import check_learner

KEY = jax.random.key(0)
CRITERION = losses.softmax_cross_entropy
THREE = losses.supervised(toys.three_layers, CRITERION)
KERNELS = toys.three_kernels()
KEEP = tuning.select('head/.*')
MOVING = KEEP.init(KERNELS, KEY)[0]
CONTEXT = 2


def embed(params, model_state, batch, rng):
  return jnp.tanh(batch['x'] @ params['body']['layer_0']['kernel']), model_state


def with_prototypes(params, model_state, batch, rng):
  rows, _ = embed(params, model_state, batch, rng)
  head = params['head']
  return rows @ head['kernel'] + head['bias'][None], model_state


OF_PROTOTYPES = losses.supervised(with_prototypes, CRITERION)
WARPED = losses.supervised(fewshot.warped(toys.three_layers), CRITERION)
READING = losses.supervised(fewshot.with_context(toys.three_layers), CRITERION)


def stepping(rates):
  return finetune(THREE, fewshot.step_rates(rates), tuning=KEEP)


def curving(matrices):
  turned = optax.chain(fewshot.meta_curvature(matrices), SGD)
  return finetune(THREE, turned, tuning=KEEP)


def rating(rates):
  names = tree.names(rates)
  multipliers = tuple((re.escape(n), tree.get(rates, n)) for n in names)
  return finetune(THREE, optim.sgd(1.0, multipliers=multipliers))


def moving(*patterns, loss=THREE, way=through.plain):
  inner = finetune(loss, SGD, tuning=tuning.select(*patterns))
  return episode_loss(inner, loss, 2, through=way)


def headed(head, *args):
  return fewshot.head_loss(head, embed, 3, *args)


def wide(params):
  """The first kernel reads the context, too."""
  body, kernel = params['body'], jnp.ones((6 + CONTEXT, 5)) / 4
  return {**params, 'body': {**body, 'layer_0': {'kernel': kernel}}}


def leo():
  params = fewshot.leo_init(KEY, 5, 2)
  params['model'] |= {'body': KERNELS['body']}
  loss = fewshot.leo_loss(embed, 3, latent_steps=2, head_steps=2)
  return loss, params


BODY = {'body': KERNELS['body']}
PROXIMAL = finetune(THREE, SGD, penalty=penalty.l2_sp(0.5))
# (loss of episodes, outer parameters)
ROWS = {
  'prototypical network': (headed(fewshot.prototypes), BODY),
  'cosine prototypes': (headed(fewshot.cosine_prototypes()), BODY),
  'matching network': (headed(fewshot.matching()), BODY),
  'relation network': (
    headed(fewshot.Learned(fewshot.relation), fewshot.relation_error),
    {'model': BODY, 'hyper': fewshot.relation_init(KEY, 5)},
  ),
  'r2d2': (
    headed(fewshot.learned_ridge()),
    {'model': BODY, 'hyper': fewshot.ridge_init()},
  ),
  'proto-maml': (
    fewshot.starting_from(
      fewshot.prototype_start(embed, 3),
      episode_loss(finetune(OF_PROTOTYPES, SGD), OF_PROTOTYPES, 1),
    ),
    BODY,
  ),
  'cavia': (
    fewshot.starting_from(
      fewshot.context_start(CONTEXT), moving('context/.*', loss=READING)
    ),
    wide(KERNELS),
  ),
  'fomaml': (moving('.*', way=through.first_order), KERNELS),
  'anil': (moving('head/.*'), KERNELS),
  'boil': (moving('body/.*'), KERNELS),
  't-net': (
    moving('.*/kernel', loss=WARPED),
    fewshot.warp_init(KERNELS, ('.*/kernel',)),
  ),
  'meta-sgd': (
    episode_loss(rating, THREE, 2),
    {
      'model': KERNELS,
      'hyper': jax.tree.map(lambda x: jnp.full_like(x, 0.1), KERNELS),
    },
  ),
  'imaml': (
    episode_loss(PROXIMAL, THREE, 2, through=through.implicit(through.cg(2))),
    KERNELS,
  ),
  'maml++': (
    fewshot.multi_step_loss(stepping, THREE, 2),
    {
      'model': KERNELS,
      'hyper': fewshot.step_rates_init(MOVING, 2, 0.1),
    },
  ),
  'meta-curvature': (
    episode_loss(curving, THREE, 1),
    {'model': KERNELS, 'hyper': fewshot.curvature_init(MOVING)},
  ),
  'leo': leo(),
}
# Scanned and looped, these differ in the last bit in other code. (Meta-SGD and
# LEO do in all code with inner loops of one step, which XLA unrolls.)
ON_USERS_CODE = ('r2d2', 'proto-maml', 'meta-sgd', 'leo')
# Compiling is slow; of these kinds another row always runs.
RARE = ('cosine prototypes', 'matching network', 'fomaml', 'boil')


def check(name):
  loss, params = ROWS[name]
  batch = episodes(8)
  # Every class has support; `step_weight` is for MAML++ alone.
  batch['support']['label'] = jnp.tile(jnp.asarray([[0, 1, 2, 0]]), (8, 1))
  batch['step_weight'] = jnp.tile(jnp.asarray([[0.25, 0.75]]), (8, 1))
  on = mesh() if name in ('prototypical network', 'maml++') else None
  check_learner(finetune(loss, SGD), params, batch, mesh=on)


def marked(name):
  return pytest.param(name, marks=[pytest.mark.oracle] * (name in RARE))


@pytest.mark.parametrize(
  'name', [marked(name) for name in ROWS if name not in ON_USERS_CODE]
)
def test_few_shot_learner_conforms(name):
  check(name)


@pytest.mark.parametrize('name', ON_USERS_CODE)
def test_few_shot_learner_conforms_as_users_compile_it(name, as_users):
  check(name)
