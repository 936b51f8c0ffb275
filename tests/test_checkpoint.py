import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from fmeta import sharding
from fmeta.errors import UsageError
from fmeta.train import checkpoint


def state(scale=1.0):
  params = {'head': {'kernel': scale * jnp.arange(24.0).reshape(8, 3)}}
  return {'params': params, 'opt': optax.adam(0.1).init(params), 'none': {}}


def assert_same(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture
def checkpoints(tmp_path):
  made = checkpoint.Checkpoints(tmp_path / 'checkpoints')
  yield made
  made.close()


def test_restores_state_best_and_host_bitwise(checkpoints):
  host = {'matrix': [[0.1, 1 / 3]], 'stopped': False, 'best': None}
  checkpoints.save(7, state(), host, best={'b': jnp.ones(2)})
  checkpoints.wait()
  assert checkpoints.latest() == 7
  assert checkpoints.host(7) == host
  loaded, best = checkpoints.restore(7, state(0.0), {'b': jnp.zeros(2)})
  assert_same(loaded, state())
  assert_same(best, {'b': np.ones(2)})
  assert jax.tree.structure(loaded) == jax.tree.structure(state())


def test_best_is_none_when_it_was_not_saved(checkpoints):
  checkpoints.save(1, state(), {})
  checkpoints.wait()
  assert checkpoints.restore(1, state(), {'b': jnp.zeros(2)})[1] is None


def test_only_the_latest_are_kept(checkpoints):
  for step in (1, 2, 3):
    checkpoints.save(step, state(step), {})
  checkpoints.wait()
  kept = sorted(p.name for p in (checkpoints.folder / 'steps').iterdir())
  assert kept == ['2', '3']


def test_saved_arrays_may_be_donated_at_once(checkpoints):
  values = {'x': jnp.arange(200_000.0)}
  checkpoints.save(1, values, {})
  bump = jax.jit(lambda x: x - 1e6, donate_argnums=0)
  bump(values['x']).block_until_ready()
  checkpoints.wait()
  target = {'x': jnp.zeros(200_000)}
  loaded, _ = checkpoints.restore(1, target, None)
  np.testing.assert_array_equal(loaded['x'], np.arange(200_000.0))


def test_another_model_is_named_by_its_first_differing_leaf(checkpoints):
  checkpoints.save(1, state(), {})
  checkpoints.wait()
  other = state()
  other['params']['head']['kernel'] = jnp.zeros((8, 4))
  with pytest.raises(UsageError) as error:
    checkpoints.restore(1, other, None)
  message = str(error.value)
  assert "'params/head/kernel' is float32[8, 3] there" in message
  assert 'float32[8, 4] here' in message and '\n' not in message


@pytest.mark.parametrize(
  'there, here, what',
  [
    ({'a': 1}, {'a': 1, 'b': 1}, "'b' is absent there and float32"),
    ({'a': 1, 'b': 1}, {'a': 1}, "'b' is float32.* there and absent here"),
  ],
)
def test_missing_and_superfluous_leaves_are_refused(there, here, what):
  def arrays(names):
    return {name: jnp.ones(2) for name in names}

  with pytest.raises(UsageError, match=what):
    checkpoint.require_same(arrays(there), arrays(here), 'checkpoint x')


def test_checkpoint_of_eight_devices_restores_on_one(checkpoints):
  mesh = sharding.make_mesh(sharding.parse_mesh('data:8'))
  values = jnp.arange(16.0)
  split = jax.device_put(values, NamedSharding(mesh, P('data')))
  checkpoints.save(1, {'x': split}, {})
  checkpoints.wait()
  loaded, _ = checkpoints.restore(1, {'x': jnp.zeros(16)}, None)
  assert len(loaded['x'].sharding.device_set) == 1
  np.testing.assert_array_equal(loaded['x'], values)
  back, _ = checkpoints.restore(1, {'x': split}, None)
  assert back['x'].sharding == split.sharding


def test_frozen_leaves_are_written_once_per_content(checkpoints):
  frozen = {'body': {'kernel': jnp.ones((2, 2))}}
  of = checkpoint.digests(frozen)
  checkpoints.save_frozen(frozen, of)
  folder = checkpoints.folder / 'frozen'
  (first,) = folder.iterdir()
  made = first.stat().st_mtime_ns
  checkpoints.save_frozen(frozen, checkpoint.digests(frozen))
  assert [p.stat().st_mtime_ns for p in folder.iterdir()] == [made]
  other = {'body': {'kernel': jnp.zeros((2, 2))}}
  checkpoints.save_frozen(other, checkpoint.digests(other))
  assert len(list(folder.iterdir())) == 2


def test_other_frozen_values_are_refused_by_name(checkpoints):
  frozen = {'a': jnp.ones(2), 'b': jnp.ones(2)}
  of = checkpoint.digests(frozen)
  checkpoints.save_frozen(frozen, of)
  saved = checkpoint.fingerprint(of)
  checkpoints.require_frozen(saved, of)
  other = checkpoint.digests({**frozen, 'b': jnp.zeros(2)})
  with pytest.raises(UsageError, match="'b' differs"):
    checkpoints.require_frozen(saved, other)


def test_fingerprint_sees_names_shapes_types_and_bytes():
  trees = [
    {'a': np.zeros(4, np.float32)},
    {'b': np.zeros(4, np.float32)},
    {'a': np.zeros((2, 2), np.float32)},
    {'a': np.zeros(4, np.int32)},
    {'a': np.array([0, 0, 0, 1], np.float32)},
  ]
  prints = [checkpoint.fingerprint(checkpoint.digests(t)) for t in trees]
  assert len(set(prints)) == len(trees)
  again = checkpoint.digests({'a': np.zeros(4, np.float32)})
  assert checkpoint.fingerprint(again) == prints[0]
