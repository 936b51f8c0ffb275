"""The continual benchmark: what the sides compute, and that it runs."""

import importlib.util
import json

import jax
import numpy as np
import pytest

from experiments import run
from experiments.benchmarks import continual
from experiments.benchmarks.continual import ROWS
from fmeta import data, tree
from fmeta.train.flops import product_flops

CONFIG = continual.Config(**continual.SMALL)
HAVE = [p for p in continual.PEERS if importlib.util.find_spec(p)]


@pytest.mark.parametrize('row', ROWS)
def test_steps_compile_once_and_move_every_leaf(row):
  side = continual.Side(row, CONFIG)
  before = jax.tree.map(np.asarray, side.moving.trainable)
  side(4)
  side(4)
  assert side.program.traces == 1
  assert int(side.moving.step) == 8
  after = side.moving.trainable
  moved = jax.tree.map(lambda a, b: bool((a != b).any()), before, after)
  assert all(jax.tree.leaves(moved))
  if row == 'er':
    assert side.moving.memory['seen'] == 32
  if row == 'ewc':
    assert (
      float(max(map(np.max, jax.tree.leaves(side.moving.penalty_state)))) > 0
    )


@pytest.mark.parametrize('row', ROWS)
def test_the_ceiling_has_the_products_of_a_step_and_no_others(row):
  side, bare = continual.Side(row, CONFIG), continual.Products(row, CONFIG)
  batch = data.take(continual.examples(CONFIG, 0), slice(CONFIG.batch_size))
  step = jax.make_jaxpr(side.program.learner.step)(
    side.moving, batch, jax.random.key(0)
  )
  alone = jax.make_jaxpr(bare.step)(bare.kernels, bare.x[0])
  flops = [product_flops(x, repeat=True) for x in (step, alone)]
  assert flops[0] == flops[1] > 0


def test_every_dispatch_multiplies_a_batch_per_step():
  bare = continual.Products('naive', CONFIG)
  bare(CONFIG.steps)
  # The last step's gradients, by hand: of kernels A, B and outputs x A B.
  x, (a, b) = np.asarray(bare.x[1], np.float64), map(np.float64, bare.kernels)
  wanted = x.T @ (x @ a @ b) @ b.T, (x @ a).T @ (x @ a @ b)
  for found, exact in zip(bare.grads, wanted, strict=True):
    np.testing.assert_allclose(found, exact, rtol=1e-5)


def torch_leaves(model):
  """The peer's parameters under our names, kernels turned back."""
  layers = [layer for layer in model if hasattr(layer, 'weight')]
  names = [f'body/layer_{k}' for k in range(len(layers) - 1)] + ['head']
  out = {}
  for name, layer in zip(names, layers, strict=True):
    out[f'{name}/kernel'] = layer.weight.detach().numpy().T
    out[f'{name}/bias'] = layer.bias.detach().numpy()
  return out


@pytest.mark.oracle
@pytest.mark.parametrize('peer', HAVE)
def test_the_first_naive_epoch_ends_where_the_peers_does(peer, monkeypatch):
  # One batch repeated, so that the order of the rows does not matter; of
  # Avalanche's two epochs the second continues with Adam's moments.
  config = continual.Config(**{**continual.SMALL, 'steps': 1})
  params = jax.tree.map(np.asarray, continual.network(config)[1])
  side = continual.Side('naive', config)
  steps = 2 if peer == 'avalanche' else 3
  config.steps_per_dispatch = 1
  for _ in range(3):
    side(1)
  made = continual.make_torch('naive', config, peer, params)
  for _ in range(steps):  # Avalanche took one to make its memory.
    made(1)
  found = torch_leaves(made.model)
  ours = dict(
    zip(
      tree.names(side.moving.trainable),
      jax.tree.leaves(side.moving.trainable),
      strict=True,
    )
  )
  assert set(found) == set(ours)
  for name, value in ours.items():
    np.testing.assert_allclose(found[name], value, atol=2e-6, err_msg=name)


@pytest.mark.oracle
@pytest.mark.parametrize('row', ROWS)
def test_a_line_per_row_and_peer(row, tmp_path, capsys):
  argv = ['run', f'--config={continual.__file__}', f'--workdir={tmp_path}/run']
  for name, value in {**continual.SMALL, 'rows': (row,)}.items():
    value = ','.join(map(str, value)) if isinstance(value, tuple) else value
    argv.append(f'--config.{name}={value}')
  assert run.main(argv) == 0
  lines = [x for x in capsys.readouterr().out.splitlines() if x[:1] == '{']
  assert [json.loads(x)['peer'] for x in lines] == ['torch']
  line = json.loads(lines[0])
  assert line['ratio'] > 0
  # Of one run of three: what is said of two sides follows from the third.
  ours, products, peer = line['steps_per_second']
  assert ours > 0 and products > 0 and peer > 0
  assert line['products_ratio'] > 0 and line['products_share'] > 0


def test_a_line_says_how_far_products_alone_are_from_the_peer():
  times = np.array([[2.0, 1.0, 6.0], [4.0, 2.0, 12.0]])
  found = continual.summary(times)
  assert found['ratio'] == 3 and found['products_ratio'] == 6
  assert found['products_share'] == 0.5
  assert found['steps_per_second'] == [0.3, 0.7, 0.1]


@pytest.mark.parametrize(
  ('changes', 'said'),
  [
    ({'rows': ('naive', 'gemm')}, "no 'gemm'"),
    ({'peers': ('mammoth',)}, "no 'mammoth'"),
    ({'steps': 5}, 'no whole number of dispatches'),
    ({'steps': 0}, 'config.steps is 0'),
    ({'steps_per_dispatch': 0}, 'config.steps_per_dispatch is 0'),
    ({'pairs': 1}, 'config.pairs is 1'),
    ({'memory_size': 3}, 'er replays 4 rows a step from a memory of 3'),
  ],
)
def test_misuse_is_one_line(changes, said, monkeypatch):
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: name)
  config = continual.Config(**{**continual.SMALL, **changes})
  with pytest.raises(ValueError, match=said):
    continual.check(config)
