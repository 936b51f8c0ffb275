"""R-Drop against its formula, and torch's divergence."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from fmeta import regularise

KEY = jax.random.key(10)
LOSS, PARAMS, BATCH, FORWARD = toys.problem(dropout=0.4)
WEIGHT = jnp.asarray([1.0, 0.0, 2.0, 0.5, 1.0, 0.0, 1.0, 0.0])
RUN = jax.jit(jax.value_and_grad(regularise.r_drop(LOSS, 1.5), has_aux=True))


def passes(params, batch):
  """Log-probabilities of the two passes of the step's key."""
  return [
    jax.nn.log_softmax(FORWARD(params, {}, batch, key)[0])
    for key in jax.random.split(KEY)
  ]


def by_hand(params, batch, weight):
  p, q = passes(params, batch)
  rows = jnp.arange(8)
  nll = -(p + q)[rows, batch['label']] / 2
  divergence = 0.0
  for a, b in ((p, q), (q, p)):
    divergence += jnp.sum(jnp.exp(a) * (a - b), axis=-1) / 2
  return jnp.sum(weight * (nll + 1.5 * divergence)) / weight.sum()


BY_HAND = jax.jit(jax.value_and_grad(by_hand))


@pytest.mark.parametrize('weight', [jnp.ones(8), WEIGHT], ids=['whole', 'part'])
def test_r_drop_is_its_formula_with_its_gradient(weight):
  (value, aux), grads = RUN(PARAMS, {}, {**BATCH, 'weight': weight}, KEY)
  expected, slope = BY_HAND(PARAMS, BATCH, weight)
  np.testing.assert_allclose(value, expected, rtol=1e-5)
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6),
    grads,
    slope,
  )
  assert aux.metrics['divergence'] > 0
  np.testing.assert_allclose(aux.weight, weight.sum())


def test_evaluation_is_one_plain_pass():
  given, calls = (PARAMS, {}, BATCH, None), []

  def loss_fn(*args):
    calls.append(args)
    return 1.0, None

  assert regularise.r_drop(loss_fn, 1.5)(*given) == (1.0, None)
  assert len(calls) == 1
  assert all(x is y for x, y in zip(calls[0], given, strict=True))


def test_without_dropout_it_is_the_plain_loss():
  loss, params, batch, _ = toys.problem()
  value, aux = jax.jit(regularise.r_drop(loss, 1.5))(params, {}, batch, KEY)
  plain, _ = jax.jit(loss)(params, {}, batch, KEY)
  np.testing.assert_allclose(value, plain, rtol=1e-6)
  assert aux.metrics['divergence'] == 0 and aux.weight == 8


def test_statistics_pass_through_both():
  from fmeta.types import Aux

  def loss_fn(params, model_state, batch, rng):
    outputs = jnp.zeros((2, 3))
    return jnp.zeros(()), Aux(model_state + 1, {}, jnp.ones(()), outputs)

  _, aux = regularise.r_drop(loss_fn, 1.0)({}, jnp.zeros(()), {}, KEY)
  assert aux.model_state == 2


def test_a_batch_of_padding_moves_nothing():
  batch = {**BATCH, 'weight': jnp.zeros(8)}
  (value, _), grads = RUN(PARAMS, {}, batch, KEY)
  assert value == 0 and not any(np.any(g) for g in jax.tree.leaves(grads))


@pytest.mark.oracle
def test_the_divergence_equals_torch():
  import torch
  from torch.nn.functional import kl_div, log_softmax

  x, y = np.random.default_rng(5).normal(size=(2, 6, 4)).astype(np.float32)
  p, q = (log_softmax(torch.tensor(z), dim=-1) for z in (x, y))
  both = [
    kl_div(a, b, log_target=True, reduction='none').sum(-1)
    for a, b in ((p, q), (q, p))
  ]
  np.testing.assert_allclose(
    regularise.symmetric_kl(jnp.asarray(x), jnp.asarray(y)),
    (both[0] + both[1]).numpy() / 2,
    rtol=1e-5,
  )
