import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec as P

import fmeta
from fmeta import optim, sharding, tree
from fmeta.testing import assert_close

PARAMS = {
  'body': {'kernel': jnp.arange(6.0).reshape(2, 3) - 2, 'bias': jnp.ones(3)},
  'head': {'kernel': jnp.full((3,), 0.5)},
}


def gradients(step):
  return tree.map_with_name(
    lambda name, p: jnp.sin(p + len(name) + 2 * step), PARAMS
  )


def run(*transformations, num_steps=4):
  """The parameters after some steps of each, in one program."""

  def trained(transformation):
    def body(carry, step):
      params, state = carry
      updates, state = transformation.update(gradients(step), state, params)
      return (optax.apply_updates(params, updates), state), None

    start = PARAMS, transformation.init(PARAMS)
    return jax.lax.scan(body, start, jnp.arange(num_steps))[0][0]

  return jax.jit(lambda: [trained(each) for each in transformations])()


def test_leaves_of_one_age_move_as_they_do_together():
  kinds = [optax.adam(0.1), optax.lion(0.1), optax.sgd(0.1, momentum=0.9)]
  found = run(*kinds, *map(fmeta.per_leaf, kinds))
  assert_close(found[:3], found[3:], 'per leaf = together', 1e-6)


def test_adamw_per_leaf_is_adamw_for_leaves_of_one_age():
  options = {
    'weight_decay': 0.1,
    'multipliers': (('head/.*', 3.0), ('.*', 1.0)),
    'clip_norm': 0.5,
    'b1': 0.8,
    'b2': 0.9,
    'eps': 1e-3,
    'eps_root': 1e-4,
  }
  rate = optim.warmup_linear(0.1, 8)
  found = run(
    optim.adamw(rate, **options),
    optim.adamw(0.1),
    fmeta.adamw_per_leaf(rate, **options),
    fmeta.adamw_per_leaf(0.1),
  )
  assert_close(found[:2], found[2:], 'adamw', 1e-6)


def test_a_wrapped_transformation_sees_whole_names():
  scaled = fmeta.per_leaf(
    optim.scale_by_patterns([('body/kernel', 2.0), ('.*', 0.0)])
  )
  found, _ = scaled.update(gradients(0), scaled.init(PARAMS))
  np.testing.assert_array_equal(
    found['body']['kernel'], 2 * gradients(0)['body']['kernel']
  )
  assert not found['head']['kernel'].any() and not found['body']['bias'].any()


def test_extra_arguments_reach_the_wrapped_transformation():
  def update(updates, state, params=None, *, value):
    return jax.tree.map(lambda u: u * value, updates), state

  inner = optax.GradientTransformationExtraArgs(optax.identity().init, update)
  outer = fmeta.per_leaf(inner)
  found, _ = outer.update(gradients(1), outer.init(PARAMS), PARAMS, value=3.0)
  np.testing.assert_array_equal(
    found['head']['kernel'], 3.0 * gradients(1)['head']['kernel']
  )


def test_moments_lie_with_their_parameter():
  mesh = sharding.make_mesh(sharding.parse_mesh('fsdp:2'))
  state = fmeta.per_leaf(optax.scale_by_adam()).init(PARAMS)
  rules = [('body/kernel', P('fsdp')), ('.*', P())]
  where = sharding.shardings(state, mesh, rules, PARAMS)
  specs = {
    name: leaf.spec
    for name, leaf in zip(
      tree.names(where), jax.tree.leaves(where), strict=True
    )
  }
  split = {name for name, spec in specs.items() if spec == P('fsdp')}
  kernel = 'leaves/body/kernel'
  assert split == {f'{kernel}/{m}/body/kernel' for m in ('mu', 'nu')}
