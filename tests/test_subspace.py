"""Random subspaces against an explicit projection."""

import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from fmeta import adapters, optim, penalty, tree
from fmeta.errors import UsageError
from fmeta.learner import finetune

LOSS, PARAMS, BATCH, FORWARD = toys.problem()
KEY = jax.random.key(2)
DIM = 4
BODY = adapters.subspace('body/.*', dim=DIM, seed=3, also=('head/.*',))


TRAINABLE, FROZEN = BODY.init(PARAMS, KEY)
merge = jax.jit(BODY.merge)


def scrambled(x):
  """Murmur's finaliser on Python's integers."""
  x = (x ^ (x >> 16)) * 0x85EBCA6B % 2**32
  x = (x ^ (x >> 13)) * 0xC2B2AE35 % 2**32
  return x ^ (x >> 16)


def projection(params, dim, seed):
  """{name: rows [size, dim]} of P, one entry after the other."""
  total, rows = tree.size(params), {}
  for name in tree.names(params):
    salt = (scrambled(seed) + zlib.crc32(name.encode())) % 2**32
    matrix = np.zeros((tree.get(params, name).size, dim))
    for i in range(len(matrix)):
      bits = scrambled(scrambled(i) ^ salt)
      sign = -1 if bits >> 31 else 1
      matrix[i, (bits & 0x7FFFFFFF) % dim] = sign * np.sqrt(dim / total)
    rows[name] = matrix
  return rows


def test_the_model_starts_unchanged():
  assert tree.names(TRAINABLE) == [
    'head/bias',
    'head/kernel',
    'subspace.direction',
  ]
  jax.tree.map(np.testing.assert_array_equal, merge(TRAINABLE, FROZEN), PARAMS)


def test_parameters_and_gradients_are_those_of_the_projection():
  direction = np.array([0.5, -1.0, 2.0, 0.25], np.float32)
  trainable = {**TRAINABLE, 'subspace.direction': jnp.asarray(direction)}
  body = {'body': PARAMS['body']}
  rows = projection(body, DIM, 3)
  merged = merge(trainable, FROZEN)
  for name, matrix in rows.items():
    start = np.asarray(tree.get(PARAMS, name))
    np.testing.assert_allclose(
      tree.get(merged, name),
      start + (matrix @ direction).reshape(start.shape),
      rtol=1e-5,
      atol=1e-6,
    )

  def value(params):
    return LOSS(params, {}, BATCH, None)[0]

  def both(trainable, merged):
    ours = jax.grad(lambda t: value(BODY.merge(t, FROZEN)))(trainable)
    return ours, jax.grad(value)(merged)

  ours, full = jax.jit(both)(trainable, merged)
  expected = sum(
    matrix.T @ np.asarray(tree.get(full, name)).ravel()
    for name, matrix in rows.items()
  )
  np.testing.assert_allclose(
    ours['subspace.direction'], expected, rtol=1e-4, atol=1e-6
  )
  jax.tree.map(np.testing.assert_allclose, ours['head'], full['head'])


def test_the_columns_are_orthogonal_and_of_unit_length():
  params = {'a': jnp.zeros((150, 200)), 'b': jnp.zeros(20_000)}
  tuning = adapters.subspace('.*', dim=20)
  trainable, frozen = tuning.init(params, KEY)

  def column(k):
    unit = {'subspace.direction': jnp.zeros(20).at[k].set(1.0)}
    moved = tuning.merge(unit, frozen)
    return jnp.concatenate([moved['a'].ravel(), moved['b']])

  matrix = np.asarray(jax.jit(jax.vmap(column))(jnp.arange(20)))
  assert np.all((matrix != 0).sum(0) == 1)  # One entry in every row of P.
  gram = matrix @ matrix.T
  np.testing.assert_array_equal(gram - np.diag(np.diag(gram)), 0)
  # 2,500 entries of square 1 / 2,500 each: deviation .02.
  np.testing.assert_allclose(np.diag(gram), 1, atol=0.08)
  assert abs(np.sign(matrix.sum(0)).mean()) < 4 / np.sqrt(50_000)
  # Two leaves do not repeat each other.
  first, second = matrix[:, :20_000], matrix[:, 30_000:]
  assert abs(np.mean(first * second) * 50_000) < 4 / np.sqrt(20_000)


def test_groups_scale_their_parameters():
  tuning = adapters.subspace('.*', dim=DIM, groups=('body/layer_0/.*', '.*'))
  trainable, frozen = tuning.init(PARAMS, KEY)
  np.testing.assert_array_equal(trainable['subspace.scale'], [1.0, 1.0])
  run = jax.jit(tuning.merge)
  trainable['subspace.direction'] = jnp.arange(1.0, 5.0)
  moved = run(trainable, frozen)
  trainable['subspace.scale'] = jnp.array([3.0, 0.0])
  scaled = run(trainable, frozen)
  for name in tree.names(PARAMS):
    start, once, now = (
      np.asarray(tree.get(t, name)) for t in (PARAMS, moved, scaled)
    )
    factor = 3.0 if name.startswith('body/layer_0/') else 0.0
    np.testing.assert_allclose(
      now - start, factor * (once - start), rtol=1e-4, atol=1e-5
    )
    assert np.abs(once - start).max() > 0


def test_another_seed_is_another_subspace_and_may_be_traced():
  def moved(seed):
    tuning = adapters.subspace('body/.*', dim=DIM, seed=seed)
    _, frozen = tuning.init(PARAMS, KEY)
    unit = {'subspace.direction': jnp.ones(DIM)}
    return tuning.merge(unit, frozen)['body']['layer_0']['kernel']

  both = jax.jit(jax.vmap(moved))(jnp.array([0, 3]))
  unit = {**TRAINABLE, 'subspace.direction': jnp.ones(DIM)}
  expected = merge(unit, FROZEN)['body']['layer_0']['kernel']
  np.testing.assert_array_equal(both[1], expected)
  assert np.any(both[0] != both[1])


def test_statistics_move_with_a_norm_that_moves_in_the_subspace():
  leaf = {'scale': np.ones(3, np.float32)}
  params = {'body': {'norm': leaf}, 'head': {'kernel': np.ones((3, 2))}}
  old, new = ({'batch_stats': {'body': {'norm': {'mean': k}}}} for k in (0, 1))

  def kept(pattern):
    tuning = adapters.subspace(pattern, dim=2)
    split = jax.eval_shape(tuning.init, params, KEY)
    return tuning.keep(old, new, *split)

  assert kept('body/norm/.*') == new
  assert kept('head/.*') == old


def test_a_norm_that_moves_in_the_subspace_reads_the_batch():
  module = toys.NormNet()
  params, model_state = toys.init_of(module)
  model_state = jax.tree.map(lambda x: x + 2.0, model_state)
  forward = toys.forward_of(module)

  @jax.jit
  def outputs(params):
    def entered(pattern):
      tuning = adapters.subspace(pattern, dim=2)
      with tuning.intercept(*tuning.init(params, KEY)) as moved:
        return forward(moved, model_state, BATCH, KEY)[0]

    trained, _ = forward(params, model_state, BATCH, KEY)
    evaluated, _ = forward(params, model_state, BATCH, None)
    return entered('body/norm/.*'), trained, entered('head/.*'), evaluated

  moving, trained, still, evaluated = outputs(params)
  np.testing.assert_allclose(moving, trained, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(still, evaluated, rtol=1e-5, atol=1e-6)
  assert np.abs(trained - evaluated).max() > 0.1


def test_bad_requests_are_refused():
  with pytest.raises(UsageError, match='dimension 0'):
    adapters.subspace('.*', dim=0).init(PARAMS, KEY)
  with pytest.raises(UsageError, match='no parameter matches'):
    adapters.subspace('bodi/.*', dim=2).init(PARAMS, KEY)
  with pytest.raises(UsageError, match="'head/bias' a group"):
    adapters.subspace('.*', dim=2, groups=('body/.*',)).init(PARAMS, KEY)
  learner = finetune(
    LOSS, optim.sgd(0.1), tuning=BODY, penalty=penalty.l2_sp(1.0)
  )
  with pytest.raises(UsageError, match='moves many parameters at once'):
    learner.init(PARAMS, KEY)
