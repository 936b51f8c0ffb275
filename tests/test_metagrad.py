"""Meta-gradients against central differences in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from fmeta import adapters, optim, tree, tuning
from fmeta.learner import finetune
from fmeta.meta import episode_loss
from fmeta.testing import check_gradient

KEY = jax.random.key(15)
MATRICES = ('body/.*/kernel',)
LOSS, PARAMS, _, _ = toys.problem(dropout=0.2, sizes=(4,))
OPTIMIZERS = {
  'sgd': lambda rate: optim.sgd(rate),
  'clipped adamw': lambda rate: optim.adamw(rate, eps_root=1e-8),
}
TUNINGS = {
  'full': tuning.full(),
  'select': tuning.select('head/.*'),
  'boil': tuning.select('body/.*'),
  'lora': adapters.lora(*MATRICES, rank=2, also=('head/bias',)),
}


def _episodes(tasks=2):
  parts = [
    {
      'support': toys.batch_of(4, seed=k),
      'query': toys.batch_of(3, seed=10 + k),
    }
    for k in range(tasks)
  ]
  return toys.double(jax.tree.map(lambda *x: jnp.stack(x), *parts))


def _start(what):
  params = toys.double(PARAMS)
  if what == 'lora':
    # Born in the outer parameters, hence meta-learned.
    params = adapters.lora_init(params, KEY, MATRICES, 2)
  return params


@pytest.mark.parametrize('optimizer', OPTIMIZERS)
@pytest.mark.parametrize('what', TUNINGS)
def test_maml_agrees_with_central_differences(what, optimizer, x64):
  inner = finetune(LOSS, OPTIMIZERS[optimizer](0.1), tuning=TUNINGS[what])
  loss, episodes = episode_loss(inner, LOSS, 2), _episodes()

  def objective(params):
    return loss(params, {}, episodes, KEY)[0]

  grads = check_gradient(objective, _start(what))
  if what == 'lora':
    factor = tree.get(grads, 'body/layer_0/kernel.lora_a')
    assert np.any(factor != 0)
  # Frozen in the inner loop, moved by the outer one.
  assert np.any(grads['body']['layer_0']['kernel'] != 0)


@pytest.mark.parametrize('optimizer', OPTIMIZERS)
def test_a_learned_rate_agrees_with_central_differences(optimizer, x64):
  def inner(hyper):
    learner = OPTIMIZERS[optimizer](hyper['rate'])
    return finetune(LOSS, learner, tuning=TUNINGS['select'])

  loss, episodes = episode_loss(inner, LOSS, 2), _episodes()
  params = {
    'model': toys.double(PARAMS),
    'hyper': {'rate': jnp.asarray(0.1, 'float64')},
  }
  grads = check_gradient(
    lambda params: loss(params, {}, episodes, KEY)[0], params
  )
  assert grads['hyper']['rate'] != 0


def test_a_wrong_gradient_is_found(x64):
  @jax.custom_jvp
  def wrong(x):
    return x**2

  wrong.defjvp(lambda x, d: (wrong(*x), 2.0001 * x[0] * d[0]))
  params = {'a': jnp.asarray([1.0, 2.0]), 'b': jnp.asarray([3.0])}
  with pytest.raises(AssertionError, match='central differences give'):
    check_gradient(lambda p: p['a'].sum() + wrong(p['b']).sum(), params)
