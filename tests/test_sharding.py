"""Meshes, rules and placement: what is refused, and what lies where."""

import jax
import jax.numpy as jnp
import mesh_worker as worker
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import fmeta
from fmeta import mesh as meshes
from fmeta import optim, sharding, table, tree

KEY = jax.random.key(0)
SIZES = {
  'body': {'layer_0': {'kernel': (4, 8), 'bias': (8,)}},
  'head': {'kernel': (8, 6)},
}
IS_SHAPE = lambda x: isinstance(x, tuple)


def params():
  return jax.tree.map(jnp.ones, SIZES, is_leaf=IS_SHAPE)


def specs(shardings):
  return {
    name: s.spec
    for name, s in zip(
      tree.names(shardings), jax.tree.leaves(shardings), strict=True
    )
  }


def test_a_mesh_is_parsed_in_order():
  axes = sharding.parse_mesh('data:2, fsdp:4', 8)
  assert list(axes.items()) == [('data', 2), ('fsdp', 4)]
  assert sharding.mesh_text(axes) == 'data:2,fsdp:4'


@pytest.mark.parametrize(
  ('text', 'complaint'),
  [
    ('', "no axis ''; possible"),
    ('dat:2', "no axis 'dat'; did you mean 'data'"),
    ('model:2', "no axis 'model'; possible: .*tensor"),
    ('data', "size of 'data' is ''"),
    ('data:two', "size of 'data' is 'two'; give an integer"),
    ('data:0', "size of 'data' is '0'"),
    ('data:-1', "size of 'data' is '-1'"),
    ('data:1.5', "size of 'data' is '1.5'"),
    ('data:2,data:4', "'data' twice"),
    ('data:3', r'needs 3 devices, there are 8; possible sizes: \[1, 2, 4, 8\]'),
    ('data:4,fsdp:4', 'needs 16 devices, there are 8'),
  ],
)
def test_a_bad_mesh_is_refused_in_one_line(text, complaint):
  with pytest.raises(fmeta.UsageError, match=complaint) as error:
    sharding.parse_mesh(text, 8)
  assert '\n' not in str(error.value)


def test_a_mesh_takes_the_first_devices_and_auto_axes():
  mesh = sharding.make_mesh({'data': 2, 'tensor': 2})
  assert dict(mesh.shape) == {'data': 2, 'tensor': 2}
  assert mesh.devices.ravel().tolist() == jax.devices()[:4]
  assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}


def test_a_cpu_mesh_with_asynchronous_dispatch_is_refused():
  jax.config.update('jax_cpu_enable_async_dispatch', True)
  try:
    assert sharding.make_mesh({'data': 1}).size == 1
    with pytest.raises(fmeta.UsageError, match='synchronous_dispatch'):
      sharding.make_mesh({'data': 2})
  finally:
    sharding.synchronous_dispatch()
  assert sharding.make_mesh({'data': 2}).size == 2


def test_fewer_processes_than_launched_are_refused():
  with pytest.raises(fmeta.UsageError, match=r'1 process.* although 2 were'):
    meshes.check_processes(2)


def test_half_of_the_process_arguments_are_refused():
  with pytest.raises(fmeta.UsageError, match='give all of num_processes'):
    sharding.initialize_processes(2, None, '127.0.0.1:1')


def test_without_arguments_there_is_one_process(monkeypatch):
  monkeypatch.delenv('SLURM_NTASKS', raising=False)
  assert sharding.initialize_processes() == 1


def test_a_forgotten_srun_is_refused(monkeypatch):
  monkeypatch.delenv('SLURM_STEP_NODELIST', raising=False)
  monkeypatch.setenv('SLURM_NTASKS', '4')
  with pytest.raises(fmeta.UsageError, match='SLURM_NTASKS=4.*srun'):
    sharding.initialize_processes()


def test_the_default_rule_splits_the_largest_divisible_axis_of_big_leaves():
  mesh = sharding.make_mesh({'fsdp': 8})
  assert sharding.fsdp_spec((512, 1024), mesh) == P(None, 'fsdp')
  assert sharding.fsdp_spec((30522, 384), mesh) == P(None, 'fsdp')
  assert sharding.fsdp_spec((1024, 1024), mesh) == P(None, 'fsdp')
  assert sharding.fsdp_spec((1024, 512), mesh) == P('fsdp')
  assert sharding.fsdp_spec((511, 511), mesh) == P()  # small
  assert sharding.fsdp_spec((1023, 1023), mesh) == P()  # not divisible
  assert sharding.fsdp_spec((), mesh) == P()
  data_only = sharding.make_mesh({'data': 8})
  assert sharding.fsdp_spec((1024, 1024), data_only) == P()


def test_the_first_rule_wins_and_the_rest_is_replicated():
  mesh = sharding.make_mesh({'data': 2, 'tensor': 2})
  rules = (('head/.*', P('tensor')), ('.*/kernel', P(None, 'tensor')))
  assert specs(sharding.shardings(params(), mesh, rules)) == {
    'body/layer_0/bias': P(),
    'body/layer_0/kernel': P(None, 'tensor'),
    'head/kernel': P('tensor'),
  }


def test_state_about_a_parameter_follows_its_trailing_path():
  mesh = sharding.make_mesh({'fsdp': 2})
  rules = (('.*/kernel', P(None, 'fsdp')),)
  opt_state = optax.chain(
    optax.clip_by_global_norm(1.0), optax.scale_by_adam()
  ).init(params())
  found = specs(sharding.shardings(opt_state, mesh, rules, params()))
  assert found['1/count'] == P()
  assert found['1/mu/body/layer_0/kernel'] == P(None, 'fsdp')
  assert found['1/nu/head/kernel'] == P(None, 'fsdp')
  assert found['1/nu/body/layer_0/bias'] == P()


def test_other_shapes_keep_leading_axes_whole_or_are_replicated():
  mesh = sharding.make_mesh({'fsdp': 2})
  part = {
    'per_task': {'head': {'kernel': jnp.ones((3, 8, 6))}},
    'rows': {'head': {'kernel': jnp.ones(8)}},
    'ahead/kernel': jnp.ones((8, 6)),
  }
  rules = (('head/kernel', P('fsdp')),)
  assert specs(sharding.shardings(part, mesh, rules, params())) == {
    'per_task/head/kernel': P(None, 'fsdp'),
    'rows/head/kernel': P(),
    'ahead/kernel': P(),
  }


@pytest.mark.parametrize(
  ('rule', 'complaint'),
  [
    (('hed/.*', P()), "no parameter matches 'hed/"),
    (('head/.*', P('tensor')), "no mesh axis 'tensor'; possible"),
    (('head/.*', P(None, 'fsdp')), '4 parts do not divide an axis of 6'),
    (('.*bias', P(None, 'fsdp')), 'has 2 entries, .* has 1 axes'),
  ],
)
def test_a_rule_that_does_not_fit_is_refused(rule, complaint):
  mesh = sharding.make_mesh({'fsdp': 4})
  with pytest.raises(fmeta.UsageError, match=complaint):
    sharding.parameter_specs(params(), mesh, (rule,))


def learner():
  def loss(params, model_state, batch, rng):
    value = sum(jnp.sum(x**2) for x in jax.tree.leaves(params))
    return value, fmeta.Aux(model_state, {}, jnp.ones(()))

  spec = {'head': jax.ShapeDtypeStruct((8, 6), jnp.float32)}
  return fmeta.rehearse(
    fmeta.finetune(
      loss,
      optim.adamw(0.1),
      tuning=fmeta.select('.*/kernel'),
      penalty=fmeta.ewc(1.0),
    ),
    fmeta.reservoir(4, spec),
    2,
  )


def test_moments_anchor_and_importance_lie_with_their_parameter():
  mesh = sharding.make_mesh({'data': 2, 'fsdp': 4})
  rules = (('body/.*', P('fsdp')), ('.*', P()))
  # A rule over all leaves also meets the bias: [8] divides as well.
  state = sharding.place_state(learner().init(params(), KEY), mesh, rules)
  kernel = ('body', 'layer_0', 'kernel')

  def leaf(part):
    for key in kernel:
      part = part[key]
    return part

  adam = next(x for x in state.opt_state if hasattr(x, 'mu'))
  parts = [state.trainable, adam.mu, adam.nu, *state.penalty_state.values()]
  assert len(parts) == 5
  for part in parts:
    assert leaf(part).sharding.spec == P('fsdp')
    assert leaf(part).addressable_shards[0].data.shape == (1, 8)
  assert state.frozen['body']['layer_0']['bias'].sharding.spec == P('fsdp')
  # A remembered column may bear a parameter's name: it stays whole.
  for whole in (state.step, *jax.tree.leaves(state.memory)):
    assert whole.sharding.is_fully_replicated


def test_placed_state_may_be_donated_without_loss_to_its_giver():
  mesh = sharding.make_mesh({'data': 8})
  state = learner().init(params(), KEY)
  placed = sharding.place_state(state, mesh)
  again = sharding.place_state(placed, mesh)
  jax.jit(lambda s: s.replace(step=s.step + 1), donate_argnums=0)(placed)
  assert placed.trainable['head']['kernel'].is_deleted()
  for leaf in jax.tree.leaves((state, again)):
    assert not leaf.is_deleted()


def test_rows_are_split_and_come_back_bitwise():
  mesh = sharding.make_mesh({'data': 2, 'fsdp': 2, 'tensor': 2})
  batch = {'x': np.arange(24, dtype=np.float32).reshape(8, 3), 'scale': 2.0}
  placed = sharding.place_batch(batch, mesh)
  assert placed['x'].sharding.spec == P(('data', 'fsdp'))
  assert placed['x'].addressable_shards[0].data.shape == (2, 3)
  assert placed['scale'].sharding.is_fully_replicated
  back = sharding.gather_to_host(placed)
  np.testing.assert_array_equal(back['x'], batch['x'])
  own = sharding.place_process_rows(batch, mesh)
  np.testing.assert_array_equal(own['x'], batch['x'])


def test_a_chunk_is_split_behind_its_step_axis():
  mesh = sharding.make_mesh({'data': 4})
  chunk = {'x': np.zeros((3, 8, 2), np.float32)}
  placed = sharding.place_batch(chunk, mesh, stacked=True)
  assert placed['x'].sharding.spec == P(None, ('data',))
  assert placed['x'].addressable_shards[0].data.shape == (3, 2, 2)


def test_episodes_are_split_by_task():
  mesh = sharding.make_mesh({'data': 8})
  batch = worker.source_of('maml', np.float32)(0)
  placed = sharding.place_batch(batch, mesh)
  shard = placed['query']['x'].addressable_shards[0].data
  assert shard.shape == (1, *batch['query']['x'].shape[1:])


@pytest.mark.parametrize(
  ('size', 'advice'), [(6, '4 or 8'), (3, 'such as 4$'), (0, 'such as 4$')]
)
def test_a_batch_that_does_not_divide_is_refused(size, advice):
  mesh = sharding.make_mesh({'data': 2, 'fsdp': 2})
  batch = {'query': {'x': np.zeros((size, 2))}}
  with pytest.raises(
    fmeta.UsageError, match=f"{size} rows or tasks of 'query/x'.*{advice}"
  ):
    sharding.place_batch(batch, mesh)


def test_the_table_shows_where_each_leaf_will_lie():
  mesh = sharding.make_mesh({'fsdp': 2})
  rows = table.parameter_rows(
    {
      'a': {'kernel': jax.ShapeDtypeStruct((1024, 512), jnp.float32)},
      'b': {'kernel': jax.ShapeDtypeStruct((4, 4), jnp.float32)},
    },
    fmeta.full(),
    KEY,
    rules=(('b/.*', P(None, 'fsdp')),),
    mesh=mesh,
  )
  assert [row.placement for row in rows] == ['fsdp', '-,fsdp']
