import math
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fmeta
from fmeta import optim, sharding, train
from fmeta.errors import UsageError
from fmeta.train import stopping

KEY = jax.random.key(2)


def forward(params, model_state, batch, rng):
  hidden = jnp.tanh(batch['x'] @ params['body']['kernel'])
  if rng is not None:
    kept = jax.random.bernoulli(rng, 0.8, hidden.shape)
    hidden = jnp.where(kept, hidden / 0.8, 0)
  return hidden @ params['head']['kernel'], model_state


def parameters():
  keys = jax.random.split(jax.random.key(0), 2)
  return {
    'body': {'kernel': 0.4 * jax.random.normal(keys[0], (6, 8))},
    'head': {'kernel': 0.4 * jax.random.normal(keys[1], (8, 3))},
  }


def batches(index, size=8):
  x = np.random.default_rng((3, index)).normal(size=(size, 6))
  x = x.astype(np.float32)
  return {'x': x, 'label': x[:, :3].argmax(-1).astype(np.int32)}


LOSS = fmeta.supervised(forward, fmeta.softmax_cross_entropy)


def learner_of(**kwargs):
  return fmeta.finetune(LOSS, optax.adamw(1e-2), **kwargs)


def run(learner=None, stages=None, num_steps=20, state=None, **kwargs):
  learner = learner or learner_of()
  state = state or learner.init(parameters(), jax.random.key(1))
  stages = stages or [train.Stage('train', batches, num_steps)]
  return train.fit(learner, state, stages, KEY, quiet=True, **kwargs)


def assert_same(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


def losses(fitted):
  return [line['loss_hex'] for line in fitted.history]


TUNINGS = {
  'full': fmeta.full(),
  'select': fmeta.select('head/.*'),
  # The model here is no linen module, so the factors are merged.
  'lora': fmeta.lora_merged('body/kernel', rank=2, also=('head/.*',)),
}
OPTIMIZERS = {'sgd': optim.sgd(0.1), 'clipped adamw': optim.adamw(1e-2)}


@pytest.mark.parametrize('optimizer', OPTIMIZERS)
@pytest.mark.parametrize('tuning', TUNINGS)
def test_fit_equals_the_written_out_loop_bitwise(tuning, optimizer):
  learner = fmeta.finetune(LOSS, OPTIMIZERS[optimizer], tuning=TUNINGS[tuning])
  state = learner.init(parameters(), jax.random.key(1))
  step = jax.jit(learner.step)
  looped, trace = state, []
  for i in range(20):
    looped, aux = step(looped, batches(i), KEY)
    trace.append(float(aux.metrics['loss']).hex())
  stacked = jax.tree.map(lambda *xs: np.stack(xs), *map(batches, range(20)))
  scanned, _ = jax.jit(
    lambda state, data: fmeta.adapt(
      learner,
      state,
      lambda i: jax.tree.map(lambda x: x[i], data),
      KEY,
      num_steps=20,
    )
  )(state, stacked)
  for dispatched in (1, 8):
    fitted = run(learner, state=state, steps_per_dispatch=dispatched)
    assert_same(fitted.state, looped)
    assert losses(fitted) == trace
    assert fitted.traces == len({dispatched, 20 % dispatched} - {0})
  assert_same(scanned, looped)
  assert fitted.steps == 20 and fitted.examples_per_second > 0
  assert fitted.flops_per_step > 0 and fitted.peak_bytes > 0


def test_unrolled_steps_are_the_same_without_a_loop():
  learner = learner_of()
  programs = train.Program(learner), train.Unrolled(learner)
  fitted = [
    run(learner, num_steps=4, steps_per_dispatch=3, program=program)
    for program in programs
  ]
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
    *(one.params for one in fitted),
  )
  assert [line['step'] for line in fitted[1].history] == [1, 2, 3, 4]
  assert programs[1].traces == 2
  # Random bits have loops of their own, in the dispatch of one step no other.
  looped, unrolled = (
    sorted(c.as_text().count(' while(') for c in program._compiled.values())
    for program in programs
  )
  own = unrolled[0]
  assert looped == [own, own + 1] and unrolled == [own, 3 * own]


def test_boundaries_and_shapes_shorten_chunks_without_changing_results():
  def bucketed(index):
    return batches(index, 4 if index % 5 == 3 else 8)

  stages = [train.Stage('train', bucketed, 12)]
  alone = run(stages=stages)
  calls = []

  def evaluate(params, model_state):
    calls.append(float(params['head']['kernel'].sum()))
    return {'accuracy': 0.5}

  chunked = run(
    stages=stages, steps_per_dispatch=8, evaluate=evaluate, evaluate_every=5
  )
  assert_same(chunked.state, alone.state)
  assert losses(chunked) == losses(alone)
  assert [e['step'] for e in chunked.evaluations] == [5, 10, 12]
  assert len(set(calls)) == 3


def test_caller_keeps_its_arrays_although_fit_donates():
  params = parameters()
  learner = learner_of(penalty=fmeta.l2_sp(0.1))
  state = learner.init(params, jax.random.key(1))
  # The worst case: the anchor is the very array that moves.
  state = state.replace(penalty_state={'anchor': state.trainable})
  first = run(learner, state=state, num_steps=3)
  again = run(learner, state=state, num_steps=3)
  assert_same(first.state, again.state)
  assert_same(params, parameters())
  assert first.history[-1]['penalty'] > 0


def test_frozen_leaves_are_the_given_buffers():
  learner = learner_of(tuning=fmeta.select('head/.*'))
  state = learner.init(parameters(), jax.random.key(1))
  fitted = run(learner, state=state, num_steps=3)
  given, after = state.frozen['body']['kernel'], fitted.state.frozen
  after = after['body']['kernel']
  assert after.unsafe_buffer_pointer() == given.unsafe_buffer_pointer()


def test_stream_of_one_task_is_plain_training_bitwise():
  learner = learner_of(penalty=fmeta.ewc(1.0))
  stages = [train.Stage('task', batches, 6, [batches(0)])]
  stream = run(learner, stages, forward=forward)
  plain = run(learner, num_steps=6)
  assert_same(stream.state.trainable, plain.state.trainable)
  assert losses(stream) == losses(plain)


def test_stages_consolidate_and_fill_the_matrix():
  learner = learner_of(penalty=fmeta.ewc(1.0))
  stages = [
    train.Stage(
      f'task_{t}', lambda i, t=t: batches(50 * t + i), 4, [batches(t)]
    )
    for t in range(2)
  ]
  seen = []

  def after(params, model_state, index):
    seen.append(float(params['head']['kernel'][0, 0]))
    return [index + 0.5]

  fitted = run(learner, stages, forward=forward, after_stage=after)
  assert fitted.matrix == [[0.5], [1.5]] and len(set(seen)) == 2
  # Step 5 starts at the anchor, up to the rounding of its weighted mean.
  pulled = [line['penalty'] > 1e-9 for line in fitted.history]
  assert pulled == [False] * 5 + [True] * 3
  assert [r['stage'] for r in fitted.history] == ['task_0'] * 4 + ['task_1'] * 4
  assert fitted.traces == 1
  importance = fitted.state.penalty_state['importance']
  assert all(float(x.sum()) > 0 for x in jax.tree.leaves(importance))


def scripted(values, kept):
  script = iter(values)

  def evaluate(params, model_state):
    kept.append(jax.tree.map(np.array, params))
    return {'accuracy': next(script), 'loss': -kept.__len__()}

  return evaluate


def test_patience_ends_training_and_the_best_leaves_return():
  kept = []
  fitted = run(
    evaluate=scripted([0.1, 0.5, 0.505, 0.4, math.nan, 0.9], kept),
    evaluate_every=2,
    patience=3,
    min_delta=0.01,
    restore_best=True,
  )
  assert fitted.stopped_early and fitted.steps == 10
  assert fitted.best_step == 4
  assert_same(fitted.params, kept[1])
  assert not np.array_equal(
    kept[1]['head']['kernel'], kept[4]['head']['kernel']
  )


def test_without_restore_best_the_last_leaves_return():
  kept = []
  fitted = run(
    num_steps=6, evaluate=scripted([0.9, 0.1, 0.0], kept), evaluate_every=2
  )
  assert not fitted.stopped_early
  assert_same(fitted.params, kept[-1])


@pytest.mark.parametrize('monitor, step', [('accuracy', 2), ('-loss', 6)])
def test_monitor_decides_what_is_best(monitor, step):
  fitted = run(
    num_steps=6,
    evaluate=scripted([0.9, 0.1, 0.0], []),
    evaluate_every=2,
    monitor=monitor,
    restore_best=True,
  )
  assert fitted.best_step == step


def test_unknown_monitor_is_refused():
  monitor = stopping.Monitor('acuracy')
  with pytest.raises(UsageError, match="did you mean 'accuracy'"):
    monitor.value({'accuracy': 1.0})


def test_divergence_names_step_and_checkpoint_and_keeps_it(tmp_path):
  def poisoned(index):
    batch = batches(index)
    return {**batch, 'x': batch['x'] * (np.nan if index == 6 else 1)}

  with pytest.raises(train.Diverged) as error:
    run(
      stages=[train.Stage('train', poisoned, 12)],
      workdir=tmp_path,
      checkpoint_every=4,
      steps_per_dispatch=4,
    )
  message = str(error.value)
  assert 'loss is nan at step 7;' in message and '\n' not in message
  folder = tmp_path / 'checkpoints' / 'steps'
  assert str(folder / '4') in message
  assert [p.name for p in folder.iterdir()] == ['4']


def test_resume_continues_bitwise_with_the_best_leaves(tmp_path):
  values = [0.1, 0.8, 0.3, 0.2, 0.1]
  options = {'evaluate_every': 2, 'restore_best': True, 'checkpoint_every': 2}
  kept = []
  whole = run(num_steps=10, evaluate=scripted(values, kept), **options)

  class Interrupt(Exception):
    pass

  def broken(index):
    if index == 9:
      raise Interrupt
    return batches(index)

  stages = [train.Stage('train', broken, 10)]
  with pytest.raises(Interrupt):
    run(
      stages=stages,
      evaluate=scripted(values, []),
      workdir=tmp_path,
      **options,
    )
  steps = tmp_path / 'checkpoints' / 'steps'
  done = max(int(p.name) for p in steps.iterdir())
  resumed = run(
    num_steps=10,
    evaluate=scripted(values[done // 2 :], []),
    workdir=tmp_path,
    resume=True,
    **options,
  )
  assert 4 <= done < 10
  assert_same(resumed.state, whole.state)
  assert_same(resumed.params, kept[1])
  assert resumed.best_step == 4
  assert resumed.history == whole.history
  assert [e['step'] for e in resumed.evaluations] == [2, 4, 6, 8, 10]


def test_finished_run_resumes_to_the_same_result_without_a_step(tmp_path):
  first = run(num_steps=4, workdir=tmp_path)
  again = run(num_steps=4, workdir=tmp_path, resume=True)
  assert_same(first.state, again.state)
  assert again.traces == 0 and again.history == first.history


def test_sigterm_saves_and_exits_143_and_the_handler_is_put_back(tmp_path):
  before = signal.getsignal(signal.SIGTERM)

  def evaluate(params, model_state):
    os.kill(os.getpid(), signal.SIGTERM)
    return {'accuracy': 0.0}

  with pytest.raises(SystemExit) as error:
    run(evaluate=evaluate, evaluate_every=3, workdir=tmp_path)
  assert error.value.code == 143
  assert signal.getsignal(signal.SIGTERM) is before
  steps = tmp_path / 'checkpoints' / 'steps'
  assert [p.name for p in steps.iterdir()] == ['3']


def test_used_workdir_is_refused_and_left_alone(tmp_path):
  run(num_steps=2, workdir=tmp_path)
  before = (tmp_path / 'metrics.jsonl').read_bytes()
  with pytest.raises(UsageError, match='already holds'):
    run(num_steps=2, workdir=tmp_path)
  assert (tmp_path / 'metrics.jsonl').read_bytes() == before


def test_checkpoint_of_another_run_is_refused_in_one_line(tmp_path):
  run(num_steps=2, workdir=tmp_path)
  other = learner_of(tuning=fmeta.select('head/.*'))
  state = learner_of().init(parameters(), jax.random.key(1))
  cases = [
    (lambda: run(other, num_steps=2, workdir=tmp_path, resume=True), 'body'),
    (lambda: run(num_steps=3, workdir=tmp_path, resume=True), 'stages'),
    (
      lambda: train.fit(
        learner_of(),
        state,
        [train.Stage('train', batches, 2)],
        jax.random.key(3),
        workdir=tmp_path,
        resume=True,
      ),
      'random key',
    ),
  ]
  for case, word in cases:
    with pytest.raises(UsageError, match=word) as error:
      case()
    assert '\n' not in str(error.value)


def test_mesh_of_two_gives_the_numbers_of_one_device(tmp_path):
  mesh = sharding.make_mesh(sharding.parse_mesh('data:2'))
  one = run(num_steps=4)
  two = run(num_steps=4, mesh=mesh, steps_per_dispatch=2, workdir=tmp_path)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
    one.params,
    two.params,
  )
  # A checkpoint of two devices continues on one.
  again = run(num_steps=4, workdir=tmp_path, resume=True)
  assert_same(again.params, two.params)


@pytest.mark.parametrize(
  'options, word',
  [
    ({'stages': [train.Stage('a', batches, 0)]}, 'num_steps=0'),
    ({'stages': [train.Stage('a', batches, 1, [batches(0)])]}, 'forward'),
    ({'restore_best': True}, 'evaluate'),
    ({'patience': 1}, 'patience'),
    ({'steps_per_dispatch': 0}, 'steps_per_dispatch=0'),
    ({'log_every': 0}, 'log_every=0'),
  ],
)
def test_contradictory_settings_are_refused(options, word):
  with pytest.raises(UsageError, match=word):
    run(**options)


def test_log_every_keeps_each_nth_step_and_the_last():
  fitted = run(num_steps=7, log_every=3, steps_per_dispatch=4)
  assert [line['step'] for line in fitted.history] == [3, 6, 7]
