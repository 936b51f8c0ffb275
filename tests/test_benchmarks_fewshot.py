"""The few-shot benchmark: what both sides compute, and that it runs."""

import importlib.util
import json

import jax
import numpy as np
import pytest

from experiments import run
from experiments.benchmarks import fewshot
from fmeta import tree

# BERT's program compiles for 15 s.
ADAPTED = (
  'conv4_1',
  pytest.param('lora_last_two', marks=pytest.mark.oracle),
)


def small(**changes):
  return fewshot.Config(**{**fewshot.SMALL, **changes})


@pytest.fixture(scope='module')
def config(tiny_bert):
  return small(model=str(tiny_bert))


def compilations():
  """A list that grows with every program XLA compiles."""
  seen = []

  def listen(event, seconds, **_):
    if event == '/jax/core/compile/backend_compile_duration':
      seen.append(seconds)

  jax.monitoring.register_event_duration_secs_listener(listen)
  return seen


@pytest.mark.parametrize('name', ADAPTED)
def test_a_meta_step_of_other_values_compiles_nothing(name, config):
  first, second = fewshot.problem(name, config).batches
  key = 'image' if 'image' in first['query'] else 'input_ids'
  assert (first['query'][key] != second['query'][key]).any()
  compiled = compilations()
  step = fewshot.Stepper(name, config)
  before = jax.tree.map(np.asarray, step.moving.trainable)
  step(1)
  warm = len(compiled)
  assert warm > 0
  step(2)
  assert (step.program.traces, len(compiled)) == (1, warm)
  assert int(step.moving.step) == 3
  after = step.moving.trainable
  moved = jax.tree.map(lambda a, b: bool((a != b).any()), before, after)
  assert all(jax.tree.leaves(moved))


def test_a_peer_that_is_not_installed_is_named_in_one_line(
  tmp_path, monkeypatch, capsys
):
  find = importlib.util.find_spec
  gone = ('higher', 'learn2learn')
  monkeypatch.setattr(
    importlib.util, 'find_spec', lambda m: None if m in gone else find('os')
  )
  words = ['--config=experiments/benchmarks/fewshot.py']
  status = run.main(['run', *words, f'--workdir={tmp_path}/run'])
  error = capsys.readouterr().err
  assert status == 2
  assert error.count('\n') == 1
  assert 'not installed: higher, learn2learn; run ./launch/peers.sh' in error
  assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize(
  'words', ['--config.rows=conv4_9', '--config.peers=func_map']
)
def test_an_unknown_row_or_peer_is_refused(words, tmp_path, capsys):
  file = '--config=experiments/benchmarks/fewshot.py'
  assert run.main(['run', file, words, f'--workdir={tmp_path}/run']) == 2
  given = words.partition('=')[2]
  assert f"no '{given}'; possible:" in capsys.readouterr().err


def in_double(name, config):
  """The row in float64, away from its start: no factor is zero."""
  made, random = fewshot.problem(name, config), np.random.default_rng(3)

  def widened(x):
    x = np.asarray(x)
    return x.astype(np.float64) if x.dtype == np.float32 else x

  def shaken(place, x):
    # The body of BERT is read from its checkpoint on the other side.
    stays = place.startswith('body/') and '.' not in place and 'lora' in name
    return widened(x) + (0 if stays else 0.1 * random.normal(size=x.shape))

  return made._replace(
    params=tree.map_with_name(shaken, made.params),
    batches=jax.tree.map(widened, made.batches),
  )


@pytest.fixture(scope='module')
def meta_gradients(config):
  """Row -> its problem, value and meta-gradient in float64."""
  found = {}
  for name in ('conv4_5', 'lora_last_two'):
    with jax.enable_x64(True):
      made = in_double(name, config)
      gradient = jax.jit(jax.value_and_grad(made.loss, has_aux=True))
      (value, _), grads = gradient(made.params, {}, made.batches[0], None)
      found[name] = made, float(value), jax.tree.map(np.asarray, grads)
  return found


PAIRS = [('conv4_5', peer) for peer in fewshot.PEERS]
PAIRS += [('lora_last_two', peer) for peer in fewshot.FUNC]


@pytest.mark.oracle
@pytest.mark.parametrize('name, peer', PAIRS)
# peft reads a name that transformers is about to rename; higher and torchopt
# are older than the torch they run on.
@pytest.mark.filterwarnings('ignore')
def test_the_meta_gradient_is_the_peers(name, peer, config, meta_gradients):
  if importlib.util.find_spec(peer) is None and peer not in fewshot.FUNC:
    pytest.skip(f'{peer} is not installed: ./launch/peers.sh')
  from experiments.benchmarks import maml_in_torch as peers
  from experiments.benchmarks import torch_models

  made, value, grads = meta_gradients[name]
  model = fewshot.torch_model(name, config, peer, made.params)
  model = model.double()
  torch_models.copy_into(model, made.params)  # again, now in float64
  row = fewshot.ROWS[name]
  rate = config.inner_lr if row.layers is None else config.lora_lr
  compute = peers.WAYS[peer](model, rate, row.steps)
  episodes = torch_models.episodes(made.batches[0])
  np.testing.assert_allclose(float(compute(episodes)), value, rtol=1e-10)
  theirs, expected = dict(model.named_parameters()), torch_models.places(grads)
  moving = {key for key, leaf in theirs.items() if leaf.requires_grad}
  assert moving == set(expected)
  for key, (leaf, layout) in expected.items():
    found = theirs[key].grad.numpy()
    np.testing.assert_allclose(found, layout(leaf), rtol=1e-7, atol=1e-10)
    assert np.abs(found).max() > 0


@pytest.mark.oracle
@pytest.mark.filterwarnings('ignore:.*is_gradient_checkpointing')
def test_the_benchmark_runs_against_torch(config, tmp_path, capsys):
  words = ['--config=experiments/benchmarks/fewshot.py']
  settings = {**fewshot.SMALL, 'rows': ('conv4_1',), 'peers': ('func_loop',)}
  for key, value in settings.items():
    value = ','.join(value) if isinstance(value, tuple) else value
    words.append(f'--config.{key}={value}')
  assert run.main(['run', *words, f'--workdir={tmp_path}/run']) == 0
  result = json.loads((tmp_path / 'run' / 'result.json').read_text())
  lines = [
    json.loads(line)
    for line in capsys.readouterr().out.splitlines()
    if line.startswith('{')
  ]
  assert [(line['row'], line['peer']) for line in lines] == [
    ('conv4_1', 'func_loop')
  ]
  for side in ('fmeta', 'peer'):
    assert lines[0][f'{side}_steps_per_second'] > 0
    assert lines[0][f'{side}_first_step_seconds'] > 0
    assert 50 < lines[0][f'{side}_peak_mib'] < 20_000
  assert result['metrics']['conv4_1 ratio to the fastest peer'] > 0
