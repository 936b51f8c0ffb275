"""Outer gradients of few-shot methods against central differences."""

import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import test_methods as methods
import toys

from fmeta import adapters, fewshot, losses, models, optim, tree, tuning
from fmeta.learner import finetune
from fmeta.meta import episode_loss
from fmeta.testing import check_gradient
from fmeta.types import LossFn

KEY = jax.random.key(4)
TASKS, STEPS = 2, 2
CRITERION = losses.softmax_cross_entropy
THREE = losses.supervised(toys.three_layers, CRITERION)
NET, PARAMS, _, _ = toys.problem(sizes=(4,))
OFFSETS = 'body/.*/bias'
CONTEXT = 2
NORMS = adapters.norm_tuning(also=('head/.*',))
BIASES = adapters.bitfit(also=('head/.*',))
CAVIA = losses.supervised(fewshot.with_context(toys.three_layers), CRITERION)


class Row(NamedTuple):
  """A loss, where its gradient is measured, and leaves that play no part."""

  loss: LossFn
  params: Any
  batch: Any
  dead: str = '$'


def stacked(*tasks):
  return jax.tree.map(lambda *x: jnp.stack(x), *tasks)


def episodes(features=6):
  return stacked(
    *(
      {
        'support': toys.batch_of(4, features, seed=k),
        'query': toys.batch_of(3, features, seed=10 + k),
      }
      for k in range(TASKS)
    )
  )


def away(values, size=0.1):
  """Near the start, but no two numbers alike."""
  random = np.random.default_rng(0)
  return jax.tree.map(
    lambda x: x + size * random.normal(size=x.shape).astype(x.dtype), values
  )


def meta_sgd():
  def inner(rates):
    names = tree.names(rates)
    multipliers = tuple((re.escape(n), tree.get(rates, n)) for n in names)
    return finetune(THREE, optim.sgd(1.0, multipliers=multipliers))

  model = toys.three_kernels()
  rates = away(jax.tree.map(lambda x: jnp.full_like(x, 0.3), model))
  loss = episode_loss(inner, THREE, STEPS)
  return Row(loss, {'model': model, 'hyper': rates}, episodes())


def maml_plus_plus():
  def inner(hyper):
    rates = fewshot.step_rates(hyper['rates'])
    return finetune(
      NET, optax.chain(rates, fewshot.step_offsets(hyper['offsets']))
    )

  follow, _ = tuning.select(OFFSETS).init(PARAMS, KEY)
  hyper = {
    'rates': fewshot.step_rates_init(PARAMS, STEPS, 0.3),
    'offsets': fewshot.step_offsets_init(follow, STEPS),
  }
  weights = jnp.tile(jnp.asarray([[0.3, 0.7]]), (TASKS, 1))
  return Row(
    fewshot.multi_step_loss(inner, NET, STEPS),
    {'model': PARAMS, 'hyper': away(hyper)},
    {**episodes(), 'step_weight': weights},
    dead=f'hyper/rates/{OFFSETS}',  # what follows offsets has no rate
  )


def cavia():
  inner = finetune(CAVIA, optim.sgd(0.5), tuning=tuning.select('context/.*'))
  loss = fewshot.starting_from(
    fewshot.context_start(CONTEXT), episode_loss(inner, CAVIA, STEPS)
  )
  return Row(loss, toys.three_kernels(), episodes(6 - CONTEXT))


def normed(params, model_state, batch, rng):
  layer, norm = params['body']['layer_0'], params['body']['norm']
  rows = batch['x'] @ layer['kernel'] + layer['bias'][None]
  rows = rows - rows.mean(-1, keepdims=True)
  rows = rows / jnp.sqrt((rows**2).mean(-1, keepdims=True) + 1e-3)
  rows = jnp.tanh(rows * norm['scale'][None] + norm['bias'][None])
  head = params['head']
  return rows @ head['kernel'] + head['bias'][None], model_state


def of_norm(what):
  kernels = toys.three_kernels()
  norm = {'scale': jnp.ones(5), 'bias': jnp.zeros(5)}
  layer = {**kernels['body']['layer_0'], 'bias': jnp.zeros(5)}
  head = {'kernel': jnp.ones((5, 3)), 'bias': jnp.zeros(3)}
  params = {'body': {'layer_0': layer, 'norm': norm}, 'head': head}
  loss = losses.supervised(normed, CRITERION)
  inner = finetune(loss, optim.sgd(0.3), tuning=what)
  return Row(episode_loss(inner, loss, STEPS), away(params, 0.3), episodes())


def of_bert(what):
  text = stacked(
    *(
      {name: jnp.roll(x, k, 0) for name, x in methods.TEXT.items()}
      for k in range(TASKS)
    )
  )
  params, _ = models.init(methods.BERT, KEY, methods.TEXT)
  inner = finetune(methods.OF_TEXT, optim.sgd(0.1), tuning=what)
  turned = jax.tree.map(lambda x: x[:, ::-1], text)
  return Row(
    episode_loss(inner, methods.OF_TEXT, STEPS),
    methods.grown(params),
    {'support': text, 'query': {**turned, 'label': text['label']}},
    # One number more in all keys' scores: a softmax does not see it.
    dead='.*/key/bias',
  )


def baseline_plus_plus():
  def embed(params, model_state, batch, rng):
    hidden = batch['x'] @ params['body']['layer_0']['kernel']
    return jnp.tanh(hidden) @ params['body']['layer_1']['kernel'], model_state

  classify = fewshot.cosine_classifier(embed, 10.0)
  loss = losses.supervised(classify, CRITERION)
  return Row(loss, toys.three_kernels(), toys.batch_of())


ROWS = {
  'meta-sgd': meta_sgd,
  'maml++': maml_plus_plus,
  'cavia': cavia,
  'layer norm maml': lambda: of_norm(NORMS),
  'bitfit maml': lambda: of_norm(BIASES),
  'layer norm maml of bert': lambda: of_bert(NORMS),
  'bitfit maml of bert': lambda: of_bert(BIASES),
  'baseline++': baseline_plus_plus,
}


def marked(name):
  # BERT's second derivatives compile for 10 s.
  rare = [pytest.mark.oracle] * name.endswith('of bert')
  return pytest.param(name, marks=rare)


@pytest.mark.parametrize('name', [marked(name) for name in ROWS])
def test_gradients_agree_with_central_differences(name, x64):
  row = ROWS[name]()
  params, batch = toys.double((row.params, row.batch))
  grads = check_gradient(lambda p: row.loss(p, {}, batch, None)[0], params)
  for leaf in tree.names(grads):
    if not re.fullmatch(row.dead, leaf):
      assert np.any(np.abs(tree.get(grads, leaf)) > 1e-8), leaf
