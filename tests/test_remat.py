"""A BERT whose blocks are computed again: the same numbers, fewer bytes."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fmeta
from experiments import run as job
from experiments.benchmarks import meta_memory
from fmeta import models, optim, through, tree
from fmeta.adapters import prefix

KEY = jax.random.key(0)
HERE = pathlib.Path(__file__).parent
PATHS = os.pathsep.join([str(HERE.parent), str(HERE)])
CONFIG = models.BertConfig(
  vocab_size=40,
  hidden_size=16,
  num_layers=2,
  num_heads=2,
  intermediate_size=32,
  max_positions=16,
)
TUNINGS = {
  'full': fmeta.full(),
  'lora': fmeta.lora('body/layer_1/.*kernel', rank=2, also=('head/.*',)),
  'prefix': prefix(
    'body/layer_.*/attention/(key|value)/kernel', length=2, also=('head/.*',)
  ),
}


def batch_of(rows=4, length=6):
  random = np.random.default_rng(0)
  return {
    'input_ids': random.integers(1, 40, (rows, length)).astype(np.int32),
    'attention_mask': np.ones((rows, length), np.int32),
    'label': random.integers(0, 3, rows).astype(np.int32),
  }


def loss_of(remat):
  config = dataclasses.replace(CONFIG, remat=remat)
  module = models.BertClassifier(config, 3)
  params, _ = models.init(module, KEY, batch_of())
  loss = fmeta.supervised(models.forward(module), fmeta.softmax_cross_entropy)
  return loss, params


def test_parameters_have_the_same_names_and_values():
  plain, again = loss_of(False)[1], loss_of(True)[1]
  assert tree.names(plain) == tree.names(again)
  jax.tree.map(np.testing.assert_array_equal, plain, again)


@pytest.mark.parametrize('what', TUNINGS)
def test_a_step_is_the_same_with_dropout_and_adapters(what):
  states = []
  for remat in (False, True):
    loss, params = loss_of(remat)
    learner = fmeta.finetune(loss, optim.sgd(0.5), tuning=TUNINGS[what])
    state = learner.init(params, jax.random.key(1))
    states.append(jax.jit(learner.step)(state, batch_of(), KEY))
    before = state.trainable
  (one, aux), (two, other) = states
  np.testing.assert_allclose(other.metrics['loss'], aux.metrics['loss'], 1e-6)
  close = lambda x, y: np.testing.assert_allclose(x, y, 1e-4, 1e-6)
  jax.tree.map(close, one.trainable, two.trainable)
  moved = jax.tree.map(lambda x, y: np.abs(x - y).max(), one.trainable, before)
  assert max(jax.tree.leaves(moved)) > 1e-3


def test_a_meta_gradient_is_the_same():
  def gradient(remat, way):
    loss, params = loss_of(remat)
    inner = fmeta.finetune(loss, optim.sgd(0.1), tuning=fmeta.select('head/.*'))
    outer = fmeta.episode_loss(inner, loss, 2, through=way)
    part = jax.tree.map(lambda x: x[None], batch_of())
    episodes = {'support': part, 'query': part}
    run = jax.jit(jax.grad(lambda p: outer(p, {}, episodes, None)[0]))
    return run(params)

  expected = gradient(False, through.plain)
  found = gradient(True, through.mixed)
  close = lambda x, y: np.testing.assert_allclose(x, y, 1e-4, 1e-6)
  jax.tree.map(close, found, expected)


def test_a_deep_stack_keeps_less():
  """In a process of its own: XLA reads its flags once."""
  flags = f'{os.environ.get("XLA_FLAGS", "")} {meta_memory.MEMORY_FIRST}'
  found = subprocess.run(
    [sys.executable, '-P', '-m', 'test_remat'],
    env={**os.environ, 'XLA_FLAGS': flags, 'PYTHONPATH': PATHS},
    capture_output=True,
    text=True,
    check=True,
  )
  kept, computed_again = map(int, found.stdout.split()[-2:])
  assert computed_again < 0.7 * kept


def temporary_bytes(remat):
  """Of a gradient through six blocks."""
  config = dataclasses.replace(
    CONFIG,
    num_layers=6,
    hidden_size=64,
    intermediate_size=256,
    remat=remat,
    dropout=0.0,
    attention_dropout=0.0,
  )
  module = models.BertClassifier(config, 3)
  batch = jax.tree.map(jnp.asarray, batch_of(64, 16))
  params = jax.eval_shape(lambda: models.init(module, KEY, batch)[0])
  loss = fmeta.supervised(models.forward(module), fmeta.softmax_cross_entropy)
  run = jax.jit(jax.grad(lambda p: loss(p, {}, batch, None)[0]))
  compiled = run.lower(params).compile()
  return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.oracle  # No peer, but eight programs to compile.
def test_the_memory_benchmark_reports_every_way(tmp_path, capsys):
  small = {**meta_memory.SMALL, 'rows': ('lora',), 'inner_steps': (2, 6)}
  small['ways'] = ('first_order', 'plain', 'mixed+blocks')
  flags = [f'--config={meta_memory.__file__}', f'--workdir={tmp_path / "run"}']
  for name, value in small.items():
    shown = ','.join(map(str, value)) if isinstance(value, tuple) else value
    flags.append(f'--config.{name}={shown}')
  assert job.main(['run', *flags]) == 0
  printed = capsys.readouterr().out.splitlines()
  lines = [json.loads(line) for line in printed if line.startswith('{')]
  assert [(line['way'], line['steps']) for line in lines] == [
    (way, steps) for steps in (2, 6) for way in small['ways']
  ]
  by = {(line['way'], line['steps']): line for line in lines}
  assert by['first_order', 2]['ratio'] == 1
  # Three times the steps: three times the state, and hardly more beside it.
  assert by['plain', 6]['state_bytes'] == 3 * by['plain', 2]['state_bytes']
  assert by['plain', 6]['temp_bytes'] > 2 * by['plain', 2]['temp_bytes']
  numbers = json.loads((tmp_path / 'run' / 'result.json').read_text())
  assert numbers['metrics']['lora mixed+blocks growth'] < 0.2


def test_segments_hold_few_states():
  held = meta_memory.states_held
  assert [held(n, 'mixed') for n in (1, 5, 100)] == [1, 5, 100]
  assert [held(n, meta_memory.SEGMENTS) for n in (1, 5, 20, 100)] == [
    *(2, 6, 9),
    20,
  ]


@pytest.mark.oracle  # No peer, but a program to compile for one number.
def test_the_memory_benchmark_runs_what_it_compiles():
  config = meta_memory.Config(**{**meta_memory.SMALL, 'execute': True})
  line = meta_memory.measure(config, 'lora', 4, meta_memory.SEGMENTS)
  assert line['finite'] and line['seconds'] > 0
  assert line['resident_mib'] > 50
  texts = meta_memory.random_texts(config)
  for part in texts.values():
    assert part['label'].tolist() == [[0, 1, 2, 3, 4]]
    assert part['input_ids'].max() < config.vocab_size


if __name__ == '__main__':
  print(temporary_bytes(False), temporary_bytes(True))
