import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from fmeta import adapters, memory, optim, tuning
from fmeta.errors import UsageError
from fmeta.learner import adapt, finetune, rehearse
from fmeta.losses import squared_error, supervised
from fmeta.memory import append, beside
from fmeta.testing import assert_close, assert_same

KEY = jax.random.key(11)
LOSS, PARAMS, BATCH, FORWARD = toys.problem(dropout=0.3)
STREAM = jax.tree.map(
  lambda *x: jnp.stack(x), *[toys.batch_of(4, seed=k) for k in range(20)]
)
OPTIMIZERS = {'sgd': optim.sgd(0.1), 'adamw': optim.adamw(0.01, eps_root=1e-8)}
TUNINGS = {
  'full': tuning.full(),
  'select': tuning.select('body/layer_1/.*', 'head/.*'),
  'lora': adapters.lora('body/.*/kernel', rank=2, also=('head/.*',)),
}
ROW = {
  'x': jax.ShapeDtypeStruct((6,), jnp.float32),
  'label': jax.ShapeDtypeStruct((), jnp.int32),
  'outputs': jax.ShapeDtypeStruct((3,), jnp.float32),
}


def _at(stream, index):
  return jax.tree.map(lambda x: x[index], stream)


def _learner(optimizer, what):
  return finetune(LOSS, OPTIMIZERS[optimizer], tuning=TUNINGS[what])


@pytest.mark.parametrize('what', TUNINGS)
@pytest.mark.parametrize('optimizer', OPTIMIZERS)
@pytest.mark.usefixtures('optimised')
def test_twenty_steps_of_a_loop_and_of_adapt_are_bitwise_equal(optimizer, what):
  learner = _learner(optimizer, what)
  state = start = learner.init(PARAMS, KEY)
  step = jax.jit(learner.step)
  losses = []
  for index in range(20):
    state, aux = step(state, _at(STREAM, index), KEY)
    losses.append(aux.metrics['loss'])
  scanned, history = jax.jit(
    lambda start, stream, rng: adapt(
      learner, start, functools.partial(_at, stream), rng, num_steps=20
    )
  )(start, STREAM, KEY)
  assert_same(state, scanned, 'adapt = loop')
  assert_same(jnp.stack(losses), history['loss'], 'losses')
  assert len(set(np.asarray(history['loss']))) == 20


@pytest.mark.parametrize(
  ('optimizer', 'what'),
  [('sgd', 'full'), ('adamw', 'select'), ('adamw', 'lora')],
)
@pytest.mark.parametrize('bits', [32, 64])
def test_the_step_is_the_same_inside_a_gradient_and_under_vmap(
  bits, optimizer, what
):
  with jax.enable_x64(bits == 64):
    params, stream = PARAMS, STREAM
    if bits == 64:
      params, stream = toys.double((params, stream))
    learner = _learner(optimizer, what)

    def run(params, rng):
      state, _ = adapt(
        learner,
        learner.init(params, KEY),
        functools.partial(_at, stream),
        rng,
        num_steps=20,
      )
      adapted = learner.params(state)
      return sum(jnp.sum(x**2) for x in jax.tree.leaves(adapted)), adapted

    _, alone = jax.jit(run)(params, KEY)
    (_, inside), _ = jax.jit(jax.value_and_grad(run, has_aux=True))(params, KEY)
    keys = jnp.stack([jax.random.fold_in(KEY, 1), KEY])
    _, both = jax.jit(jax.vmap(run, (None, 0)))(params, keys)
    # Weights are of order one; a bias near zero keeps their rounding.
    limit = 1e-6 if bits == 32 else 1e-12
    for found in (inside, _at(both, 1)):
      jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=limit, atol=limit),
        found,
        alone,
      )


def test_one_step_by_hand():
  loss_fn, params, batch, _ = toys.problem()
  learner = finetune(loss_fn, optim.sgd(0.5), tuning=tuning.select('head/.*'))
  after, aux = jax.jit(learner.step)(learner.init(params, KEY), batch, KEY)

  def plain(head):
    return loss_fn({**params, 'head': head}, {}, batch, None)[0]

  loss, grads = jax.value_and_grad(plain)(params['head'])
  expected = jax.tree.map(lambda p, g: p - 0.5 * g, params['head'], grads)
  assert_close(expected, after.trainable['head'], 'sgd', 1e-6)
  norm = np.sqrt(sum(float((g**2).sum()) for g in jax.tree.leaves(grads)))
  np.testing.assert_allclose(aux.metrics['loss'], loss, rtol=1e-6)
  np.testing.assert_allclose(aux.metrics['grad_norm'], norm, rtol=1e-5)
  np.testing.assert_allclose(aux.metrics['update_norm'], norm / 2, rtol=1e-5)


def test_dropout_depends_on_the_root_key_and_the_step_only():
  learner = finetune(LOSS, optim.sgd(0.0))
  step = jax.jit(learner.step)
  state = learner.init(PARAMS, KEY)
  first, one = step(state, BATCH, KEY)
  _, again = step(state, BATCH, KEY)
  _, two = step(first, BATCH, KEY)
  _, other = step(state, BATCH, jax.random.key(12))
  assert one.metrics['loss'] == again.metrics['loss']
  assert one.metrics['loss'] != two.metrics['loss']
  assert one.metrics['loss'] != other.metrics['loss']


def test_adapt_records_what_every_says_and_zero_steps_change_nothing():
  learner = finetune(LOSS, OPTIMIZERS['sgd'], tuning=TUNINGS['select'])
  start = learner.init(PARAMS, KEY)

  def run(num_steps):
    return jax.jit(
      lambda start: adapt(
        learner,
        start,
        lambda _: BATCH,
        KEY,
        num_steps=num_steps,
        every=lambda state, aux: (state.step, state.frozen['body']),
      )
    )(start)

  same, (steps, _) = run(0)
  assert_same(start, same, 'no steps')
  assert steps.shape == (0,)
  _, (steps, body) = run(3)
  np.testing.assert_array_equal(steps, [1, 2, 3])
  assert body['layer_0']['kernel'].shape == (3, 6, 5)


def _rehearsing(size=4, mix=append, capacity=16, loss_fn=LOSS):
  held = memory.reservoir(capacity, ROW)
  return rehearse(finetune(loss_fn, OPTIMIZERS['sgd']), held, size, mix=mix)


def test_the_first_rehearsed_step_equals_the_plain_one():
  # Without dropout: its mask depends on the number of rows.
  loss_fn, params, batch, _ = toys.problem()
  plain = finetune(loss_fn, OPTIMIZERS['sgd'])
  held = memory.reservoir(16, {key: ROW[key] for key in ('x', 'label')})
  learner = rehearse(plain, held, 4)
  expected, _ = jax.jit(plain.step)(plain.init(params, KEY), batch, KEY)
  found, aux = jax.jit(learner.step)(learner.init(params, KEY), batch, KEY)
  assert_close(expected.trainable, found.trainable, 'empty memory', 1e-6)
  assert aux.weight == 8 and found.memory['seen'] == 8


@pytest.mark.parametrize('mix', [append, beside])
def test_the_memory_holds_each_row_with_its_own_outputs(mix):
  learner = _rehearsing(mix=mix)
  step = jax.jit(learner.step)
  state, known = learner.init(PARAMS, KEY), {}
  for index in range(3):
    batch = _at(STREAM, index)
    before = state
    state, aux = step(state, batch, KEY)
    assert aux.outputs.shape == (4, 3)
    for row, outputs in zip(batch['x'], aux.outputs, strict=True):
      known[np.asarray(row).tobytes()] = np.asarray(outputs)
  assert before.memory['seen'] == 8 and state.memory['seen'] == 12
  for slot in range(12):
    row = np.asarray(state.memory['rows']['x'][slot]).tobytes()
    np.testing.assert_array_equal(
      state.memory['rows']['outputs'][slot], known[row]
    )


def test_replayed_rows_enter_the_loss_with_their_labels():
  loss_fn, params, batch, _ = toys.problem()
  held = memory.reservoir(8, {key: ROW[key] for key in ('x', 'label')})
  plain = finetune(loss_fn, OPTIMIZERS['sgd'])
  learner = rehearse(plain, held, 8)
  state = learner.init(params, KEY)
  past = toys.batch_of(8, seed=5)
  state = state.replace(
    memory=held.insert(state.memory, past, jnp.ones(8), KEY)
  )
  found, aux = jax.jit(learner.step)(state, batch, KEY)
  joint = jax.tree.map(lambda x, y: jnp.concatenate([x, y]), batch, past)
  expected, _ = jax.jit(plain.step)(plain.init(params, KEY), joint, KEY)
  assert_close(expected.trainable, found.trainable, 'replay', 1e-5)
  assert aux.weight == 16


def test_a_scan_of_rehearsed_steps_writes_the_memory_in_place():
  # Rows so wide that what draws among 1,024 of them takes little beside.
  row = {
    'x': jax.ShapeDtypeStruct((500,), jnp.float32),
    'target': jax.ShapeDtypeStruct((1,), jnp.float32),
  }
  loss = supervised(lambda p, s, b, rng: (b['x'] @ p['w'], s), squared_error)
  plain = finetune(loss, OPTIMIZERS['sgd'])
  learner = rehearse(plain, memory.reservoir(1024, row), 4)
  run = jax.jit(
    lambda state, stream: adapt(
      learner, state, functools.partial(_at, stream), KEY, num_steps=5
    ),
    donate_argnums=0,
  )
  state = jax.eval_shape(learner.init, {'w': jnp.zeros((500, 1))}, KEY)
  stream = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct((5, 4, *x.shape), x.dtype), row
  )
  used = run.lower(state, stream).compile().memory_analysis()
  assert used.temp_size_in_bytes < memory.bytes_of(state.memory) / 4


def test_a_step_whose_loss_is_nan_leaves_no_rows_in_the_memory():
  learner = _rehearsing()
  state, _ = learner.step(learner.init(PARAMS, KEY), BATCH, KEY)
  bad = {**BATCH, 'x': jnp.full_like(BATCH['x'], jnp.nan)}
  after, _ = learner.step(state, bad, KEY)
  assert_same(state.memory, after.memory, 'memory')
  assert state.memory['seen'] == len(BATCH['label'])


def test_a_row_s_fate_depends_on_no_other_key_of_the_run():
  # Step 3's key and the memory's must differ, or dropout and slots would be
  # drawn from one stream.
  from fmeta import learner

  assert learner.INSERT >= 2**31
  keys = [jax.random.fold_in(KEY, k) for k in (3, learner.INSERT)]
  assert np.any(jax.random.key_data(keys[0]) != jax.random.key_data(keys[1]))


def test_a_memory_without_a_key_of_the_batch_is_refused():
  held = memory.reservoir(4, {'x': ROW['x']})
  learner = rehearse(finetune(LOSS, OPTIMIZERS['sgd']), held, 2)
  with pytest.raises(UsageError, match="memory does not hold 'label'"):
    jax.eval_shape(learner.step, learner.init(PARAMS, KEY), BATCH, KEY)


def test_a_tasks_end_reaches_penalty_and_memory():
  held = memory.reservoir(4, ROW)._replace(
    end_task=lambda filled: {**filled, 'seen': filled['seen'] + 100}
  )
  plain = finetune(LOSS, OPTIMIZERS['sgd'])
  plain = plain._replace(
    end_task=lambda state, *args: state.replace(penalty_state={'told': args})
  )
  learner = rehearse(plain, held, 2)
  state = learner.init(PARAMS, KEY)
  told = ('forward', ['batch'], KEY)
  ended = learner.end_task(state, *told)
  assert ended.penalty_state == {'told': told}
  assert ended.memory['seen'] == 100
