"""One device, eight simulated ones, two processes: the same numbers.

Tolerances are relative to each leaf's largest value: 1e-5 after one f32 step,
1e-4 after twenty, 1e-10 after twenty in float64 (sums over rows are added up
in another order). What is data, not arithmetic, is equal bit by bit.
"""

import os
import pathlib
import re
import socket
import subprocess
import sys

import jax
import mesh_worker as worker
import numpy as np
import preempt_worker
import pytest
from jax.sharding import PartitionSpec as P

import fmeta
from fmeta import optim, sharding, tree

REGIMES = {
  'full': 'data:2,fsdp:4',
  'select': 'data:8',
  'lora': 'fsdp:8',
  'maml': 'data:8',
  'stream': 'data:2,fsdp:4',
}


def assert_near(found, expected, tolerance):
  assert sorted(found) == sorted(expected)
  for name, value in expected.items():
    bound = tolerance * np.abs(value).max()
    np.testing.assert_allclose(
      found[name], value, rtol=0, atol=bound, err_msg=name
    )


def assert_same_run(found, expected, first, last):
  found, expected = worker.flat(found), worker.flat(expected)

  def part(run, name):
    return {k: v for k, v in run.items() if k.startswith(name + '/')}

  assert_near(part(found, 'first'), part(expected, 'first'), first)
  assert_near(part(found, 'last'), part(expected, 'last'), last)
  memory = part(expected, 'memory')
  assert sorted(part(found, 'memory')) == sorted(memory)
  for name, value in memory.items():
    np.testing.assert_array_equal(found[name], value, err_msg=name)


@pytest.mark.parametrize('regime', REGIMES)
def test_eight_devices_give_one_devices_numbers(regime):
  found = worker.run(regime, worker.mesh_of(REGIMES[regime]))
  assert_same_run(found, worker.on_one_device(regime), 1e-5, 1e-4)


@pytest.mark.parametrize('regime', REGIMES)
def test_eight_devices_give_one_devices_numbers_in_float64(regime, x64):
  found = worker.run(regime, worker.mesh_of(REGIMES[regime]), np.float64)
  expected = worker.on_one_device(regime, np.float64)
  assert expected['last']['head']['kernel'].dtype == np.float64
  assert_same_run(found, expected, 1e-12, 1e-10)


def test_the_memory_of_the_stream_is_full_of_its_rows():
  memory = worker.on_one_device('stream')['memory']
  assert memory['seen'] == 20 * worker.BATCH
  columns = worker.columns(np.float32)
  known = {
    row.tobytes(): label for row, label in zip(*columns.values(), strict=True)
  }
  held = memory['rows']
  assert [known[x.tobytes()] for x in held['x']] == held['label'].tolist()


@pytest.mark.parametrize('regime', ['full', 'maml'])
def test_batches_and_episodes_are_bitwise_the_same_on_a_mesh(regime):
  source = worker.source_of(regime, np.float32)
  mesh = worker.mesh_of('data:2,fsdp:4')
  for i in (0, 7):
    placed = sharding.gather_to_host(sharding.place_batch(source(i), mesh))
    again = source(i)
    assert tree.names(placed) == tree.names(again)
    jax.tree.map(np.testing.assert_array_equal, placed, again)


def test_moments_stay_with_their_parameter_through_a_step():
  mesh = worker.mesh_of('fsdp:8')
  _, state, step = worker.start('lora', mesh)
  batch = worker.put(worker.source_of('lora', np.float32)(0), mesh)
  state, _ = step(state, batch, worker.RNG(3))
  adam = next(x for x in state.opt_state if hasattr(x, 'mu'))
  for part in (state.trainable, adam.mu, adam.nu):
    factor = part['body']['layer_0']['kernel.lora_b']
    assert factor.sharding.spec == P(None, 'fsdp')
    assert factor.addressable_shards[0].data.shape == (4, 2)
    assert part['head']['kernel'].addressable_shards[0].data.shape == (16, 1)
  frozen = state.frozen['body']['layer_0']['kernel']
  assert frozen.addressable_shards[0].data.shape == (8, 2)
  for leaf in jax.tree.leaves(state):
    assert len(leaf.sharding.device_set) == 8


def collectives(compiled):
  """Name -> how many of them the compiled program runs."""
  pattern = r'= .*? (all-reduce|all-gather|reduce-scatter|all-to-all|'
  pattern += r'collective-permute)(?:-start)?\('
  found = re.findall(pattern, compiled.as_text())
  return {name: found.count(name) for name in set(found)}


def test_the_meta_gradient_takes_one_all_reduce():
  mesh = worker.mesh_of('data:8')
  inner = fmeta.finetune(worker.LOSS, optim.sgd(0.1))
  loss = fmeta.episode_loss(inner, worker.LOSS, 2)
  whole = jax.sharding.NamedSharding(mesh, P())
  params = jax.device_put(worker.parameters(np.float32), whole)
  batch = worker.put(worker.source_of('maml', np.float32)(0), mesh)
  gradient = jax.jit(
    jax.grad(lambda params, batch: loss(params, {}, batch, None)[0]),
    out_shardings=whole,
  )
  compiled = gradient.lower(params, batch).compile()
  assert collectives(compiled) == {'all-reduce': 1}


def test_chunks_of_tasks_are_split_over_the_devices():
  mesh = worker.mesh_of('data:8')

  def compiled(over):
    inner = fmeta.finetune(worker.LOSS, optim.sgd(0.1))
    loss = fmeta.episode_loss(inner, worker.LOSS, 2, over=over)
    whole = jax.sharding.NamedSharding(mesh, P())
    params = jax.device_put(worker.parameters(np.float32), whole)
    tasks = worker.source_of('maml', np.float32)(0)
    tasks = jax.tree.map(lambda x: np.concatenate([x, x]), tasks)
    gradient = jax.jit(
      jax.grad(lambda params, batch: loss(params, {}, batch, None)[0]),
      out_shardings=whole,
    )
    return gradient.lower(params, worker.put(tasks, mesh)).compile()

  program = compiled(fmeta.in_chunks(8))
  assert set(collectives(program)) == {'all-reduce'}
  # XLA counts a loop's body once: half the tasks, an eighth of them here.
  at_once = compiled(jax.vmap).cost_analysis()['flops']
  assert 0.45 < program.cost_analysis()['flops'] / at_once < 0.6


def test_tasks_in_turn_meet_once_after_the_last():
  mesh = worker.mesh_of('data:8')
  inner = fmeta.finetune(worker.LOSS, optim.sgd(0.1))
  loss = fmeta.episode_loss(inner, worker.LOSS, 2)
  tasks = worker.source_of('maml', np.float32)(0)
  tasks = jax.tree.map(lambda x: np.concatenate([x, x]), tasks)
  whole = jax.sharding.NamedSharding(mesh, P())
  params = jax.device_put(worker.parameters(np.float32), whole)

  def compiled(value_and_grad):
    learner = fmeta.finetune(
      loss, optim.sgd(1.0), value_and_grad=value_and_grad
    )
    state = jax.device_put(learner.init(params, worker.RNG(0)), whole)
    step = jax.jit(learner.step, out_shardings=(whole, None))
    batch = worker.put(tasks, mesh)
    program = step.lower(state, batch, worker.RNG(1)).compile()
    return program, program(state, batch, worker.RNG(1))[0].trainable

  program, found = compiled(fmeta.accumulate(16, lanes=8))
  assert collectives(program) == {'all-reduce': 1}
  at_once, expected = compiled(fmeta.plain)
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6),
    found,
    expected,
  )
  # XLA counts a loop's body once: half the tasks, an eighth of them here.
  share = program.cost_analysis()['flops'] / at_once.cost_analysis()['flops']
  assert 0.45 < share < 0.6


def test_a_data_mesh_reduces_only_what_moves_and_gathers_nothing():
  mesh = worker.mesh_of('data:8')
  _, state, step = worker.start('select', mesh)
  batch = worker.put(worker.source_of('select', np.float32)(0), mesh)
  compiled = step.lower(state, batch, worker.RNG(3)).compile()
  assert collectives(compiled) == {'all-reduce': 1}
  (line,) = re.findall(r'= (.*?) all-reduce\(', compiled.as_text())
  shapes = re.findall(r'f32\[([\d,]*)\]', line)
  summed = sum(np.prod(sizes_of(shape), dtype=int) for shape in shapes)
  # The gradient of what moves, the loss and the accuracy, nothing else.
  assert summed == tree.size(state.trainable) + 2


def sizes_of(text):
  return [int(size) for size in text.split(',') if size]


def test_a_checkpoint_of_eight_devices_restores_on_one(tmp_path):
  import orbax.checkpoint as ocp

  mesh = worker.mesh_of('data:2,fsdp:4')
  learner, state, step = worker.start('stream', mesh)
  source = worker.source_of('stream', np.float32)
  for i in range(2):
    state, _ = step(state, worker.put(source(i), mesh), worker.RNG(3))
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(tmp_path / 'state', state)
    checkpointer.wait_until_finished()
    _, empty, alone = worker.start('stream', None)
    restored = checkpointer.restore(tmp_path / 'state', empty)
  jax.tree.map(
    np.testing.assert_array_equal,
    sharding.gather_to_host(restored),
    sharding.gather_to_host(state),
  )
  assert {len(x.sharding.device_set) for x in jax.tree.leaves(restored)} == {1}
  state, _ = step(state, worker.put(source(2), mesh), worker.RNG(3))
  restored, _ = alone(restored, source(2), worker.RNG(3))
  assert_near(
    worker.flat(sharding.gather_to_host(learner.params(restored))),
    worker.flat(sharding.gather_to_host(learner.params(state))),
    1e-5,
  )


def free_port():
  with socket.socket() as server:
    server.bind(('127.0.0.1', 0))
    return server.getsockname()[1]


def run_processes(name, arguments, devices, timeout=300, status=0):
  """Runs tests/<name>.py once per tuple of arguments; kills what hangs."""
  root = pathlib.Path(__file__).resolve().parents[1]
  flags = f'--xla_force_host_platform_device_count={devices}'
  flags += ' --xla_backend_optimization_level=0'
  env = os.environ | {
    'PYTHONPATH': os.pathsep.join(
      [str(root), os.environ.get('PYTHONPATH', '')]
    ),
    'XLA_FLAGS': flags,
    'JAX_PLATFORMS': 'cpu',
  }
  script = str(root / 'tests' / f'{name}.py')
  running = [
    subprocess.Popen(
      [sys.executable, script, *map(str, given)],
      env=env,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )
    for given in arguments
  ]
  try:
    for process in running:
      text, _ = process.communicate(timeout=timeout)
      assert process.returncode == status, text[-3000:]
  finally:
    for process in running:
      process.kill()
      process.wait()
      process.stdout.close()


def test_two_processes_give_one_processs_numbers(tmp_path):
  out = tmp_path / 'found.npz'
  port = free_port()
  run_processes('mesh_worker', [(k, 2, port, out) for k in range(2)], 2)
  with np.load(out) as found:
    found = dict(found)
  alone = worker.answers(None)
  # Two float32 steps, sums in another order.
  np.testing.assert_allclose(found['answers'], alone, rtol=1e-5, atol=1e-5)
  for regime in worker.PROCESSES:
    own = {
      k.removeprefix(regime + '/'): v
      for k, v in found.items()
      if k.startswith(regime + '/')
    }
    assert_same_run(own, worker.on_one_device(regime), 1e-5, 1e-4)


def test_a_sigterm_to_one_process_stops_both_and_both_resume(tmp_path):
  workdir, out = tmp_path / 'run', tmp_path / 'found.npz'

  def launch(*flags, status):
    port = free_port()
    given = [(k, port, workdir, out, *flags) for k in range(2)]
    run_processes('preempt_worker', given, 1, status=status)

  launch('--stop', status=143)
  saved = [int(p.name) for p in (workdir / 'checkpoints' / 'steps').iterdir()]
  assert len(saved) == 1
  assert 0 < saved[0] < preempt_worker.STEPS
  launch(status=0)
  with np.load(out) as found:
    found = dict(found)
  alone = preempt_worker.fit(None)
  losses = [record['loss'] for record in alone.history]
  # Forty float32 steps, sums in another order on two processes.
  np.testing.assert_allclose(found.pop('losses'), losses, rtol=1e-5)
  assert_near(found, worker.flat(alone.params), 1e-4)
