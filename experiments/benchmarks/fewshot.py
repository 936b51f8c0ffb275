"""A second-order meta-step against torch.func, higher, learn2learn, TorchOpt.

  ./launch/peers.sh    # once: installs the peers
  ./launch/local.sh --config=experiments/benchmarks/fewshot.py

Rows: MAML of Conv4-64 on 28x28 images (5 ways, 1 shot, 15 queries, 32 tasks,
batch statistics, inner SGD 0.4, then Adam 1e-3) with one and with five inner
steps, and LoRA-MAML of MiniLM (factors and head move inside and outside) on
the last two layers or all against torch.func. A meta-step is the meta-gradient
and Adam. Both sides start from the same weights and see the same tasks, with
the allocator settings of `launch/local.sh` and all cores, which fmeta uses as
host devices. torch.func is there twice, tasks by vmap and one by one; the
others are written as their users do, one by one. That all compute the same
gradient: tests/test_benchmarks_fewshot.py.

One JSON line per row and peer: ratio > 1 means that fmeta is faster; the
seconds of the first step hold compilation (without a cache), and memory is the
high-water mark of each process. Expected and measured: experiments/README.md.
"""

import dataclasses
import importlib.util
import json
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import fmeta
from experiments.benchmarks.maml_problems import ROWS, lora_layers, problem
from experiments.benchmarks.paired import Contender, compare
from experiments.common import in_turn
from experiments.run import use_host_devices
from fmeta import optim, pretrained, sharding, train
from fmeta.workdir import Context

FUNC = ('func_vmap', 'func_loop')
PEERS = (*FUNC, 'higher', 'learn2learn', 'torchopt')


@dataclasses.dataclass
class Config:
  """Shapes and lengths of the timings."""

  rows: tuple[str, ...] = tuple(ROWS)
  peers: tuple[str, ...] = PEERS
  pairs: int = 10
  batches: int = 2  # a timing has one meta-step on each
  devices: int = 0  # host devices of fmeta's process; 0: one a core
  chunk: int = 1  # tasks at a time and device, 0: all
  ways: int = 5
  shots: int = 1
  outer_lr: float = 1e-3
  # Conv4
  tasks: int = 32
  queries: int = 15
  filters: int = 64
  inner_lr: float = 0.4
  # MiniLM
  model: str = pretrained.MINILM
  text_tasks: int = 4
  text_queries: int = 5
  max_length: int = 32
  lora_rank: int = 8
  lora_lr: float = 0.1


SMALL = {
  'rows': ('conv4_1', 'lora_last_two'),
  'peers': FUNC,
  'pairs': 2,
  'batches': 2,
  'devices': 1,
  'chunk': 0,
  'tasks': 2,
  'queries': 2,
  'filters': 4,
  'text_tasks': 2,
  'text_queries': 1,
  'max_length': 6,
  'lora_rank': 2,
}


class Stepper:
  """Meta-steps of fmeta, compiled at the first.

  Attributes:
    program: what `fit` dispatches; it counts its traces.
    moving: the state without what is frozen.
  """

  def __init__(self, name: str, config: Config, devices: int = 1):
    made = problem(name, config)
    tasks = len(made.batches[0]['support']['label'])
    learner = fmeta.finetune(
      made.loss,
      optim.adam(config.outer_lr),
      tuning=made.tuning,
      value_and_grad=in_turn(tasks, config.chunk, devices),
    )
    state = learner.init(made.params, jax.random.key(0))
    stacked = [jax.tree.map(lambda x: x[None], each) for each in made.batches]
    if devices > 1:
      mesh = sharding.make_mesh({'data': devices})
      state = sharding.place_state(state, mesh)
      stacked = [
        sharding.place_batch(each, mesh, stacked=True) for each in stacked
      ]
    self.program = train.Program(learner)
    self._frozen = jax.device_put(state.frozen)
    self.moving = jax.tree.map(jnp.copy, state.replace(frozen={}))
    self._stacked, self._rng = stacked, jax.random.key(1)

  def __call__(self, steps: int) -> None:
    """Takes the steps and waits for them."""
    metrics = None
    for k in range(steps):
      batch = self._stacked[k % len(self._stacked)]
      self.moving, metrics = self.program(
        self.moving, self._frozen, batch, self._rng
      )
    jax.block_until_ready((self.moving, metrics))
    if self.program.traces > 1:
      raise RuntimeError('a batch of the same shapes was compiled again')


def make_fmeta(row: str, config: Config) -> Stepper:
  """Ours, in a process of its own."""
  # A program from the cache would say nothing about compilation.
  jax.config.update('jax_enable_compilation_cache', False)
  devices = config.devices or cores()
  use_host_devices(f'data:{devices}')
  return Stepper(row, config, devices)


def cores() -> int:
  """How many this process may use."""
  return len(os.sched_getaffinity(0))


def torch_model(name: str, config: Config, peer: str, params: Any) -> Any:
  """The row's model in torch with our weights; what moves wants a gradient."""
  from experiments.benchmarks import torch_models

  row = ROWS[name]
  if row.layers is None:
    model = torch_models.Conv4(config.ways, config.filters, peer)
  else:
    count = sum(part.startswith('layer_') for part in params['body'])
    layers = lora_layers(row, count)
    folder = pretrained.find(config.model)
    model = torch_models.LoraBert(folder, layers, config.lora_rank, config.ways)
  torch_models.copy_into(model, params)
  return model


def make_torch(
  row: str, config: Config, peer: str, params: Any, batches: list[dict]
) -> Any:
  """A peer, in a process of its own that computes nothing in JAX."""
  import torch

  from experiments.benchmarks import maml_in_torch as peers
  from experiments.benchmarks.torch_models import episodes

  torch.set_num_threads(cores())
  steps, layers = ROWS[row]
  model = torch_model(row, config, peer, params)
  rate = config.inner_lr if layers is None else config.lora_lr
  meta_gradient = peers.WAYS[peer](model, rate, steps)
  leaves = [leaf for leaf in model.parameters() if leaf.requires_grad]
  optimizer = torch.optim.Adam(leaves, config.outer_lr, fused=True)
  tensors = [episodes(batch) for batch in batches]

  def run(steps: int) -> None:
    for k in range(steps):
      optimizer.zero_grad()
      meta_gradient(tensors[k % len(tensors)])
      optimizer.step()

  return run


def peers_of(name: str, config: Config) -> list[str]:
  """Whom a row is held against.

  Raises:
    UsageError: if a row or a peer does not exist, or is not installed.
  """
  for given, possible in ((name, ROWS), *((p, PEERS) for p in config.peers)):
    if given not in possible:
      raise fmeta.UsageError(f'no {given!r}; possible: {", ".join(possible)}')
  text = ROWS[name].layers is not None
  chosen = [peer for peer in config.peers if peer in FUNC or not text]
  modules = ['torch'] if FUNC[0] in chosen or FUNC[1] in chosen else []
  modules += ['transformers', 'peft'] if text else []
  modules += [peer for peer in chosen if peer not in FUNC]
  missing = [m for m in modules if importlib.util.find_spec(m) is None]
  if missing:
    raise fmeta.UsageError(
      f'not installed: {", ".join(missing)}; run ./launch/peers.sh once, or '
      'name the peers to measure with --config.peers='
    )
  return chosen


def measure(name: str, config: Config) -> list[dict]:
  """The lines of a row: ours and each peer in turn."""
  lines, steps = [], config.batches
  made = problem(name, config)
  shared: dict[str, Any] = {
    'row': name,
    'config': config,
    'params': jax.tree.map(np.asarray, made.params),
    'batches': made.batches,
  }
  ours = Contender('fmeta', make_fmeta, row=name, config=config)
  for peer in peers_of(name, config):
    theirs = Contender(peer, make_torch, peer=peer, **shared)
    ratio = compare(ours, theirs, config.pairs, steps)
    theirs.close()
    line: dict[str, Any] = {
      'row': name,
      'peer': peer,
      'ratio': round(ratio.median, 3),
      'ci95': [round(ratio.low, 3), round(ratio.high, 3)],
      'pairs': ratio.pairs,
    }
    sides = ('fmeta', ours), ('peer', theirs)
    for (side, contender), seconds in zip(sides, ratio.seconds, strict=True):
      line |= {
        f'{side}_steps_per_second': round(1 / seconds, 4),
        f'{side}_first_step_seconds': round(contender.first_seconds or 0, 3),
        f'{side}_peak_mib': contender.peak_bytes // 2**20,
      }
    print(json.dumps(line), flush=True)
    lines.append(line)
  ours.close()
  return lines


def run(config: Config, context: Context) -> dict:
  """Times every row; the ratio of a row is that to its fastest peer."""
  del context
  for name in config.rows:
    peers_of(name, config)  # Before anything takes time.
  metrics, ci95 = {}, {}
  for name in config.rows:
    lines = measure(name, config)
    best = min(lines, key=lambda line: line['ratio'])
    metrics[f'{name} ratio to the fastest peer'] = best['ratio']
    ci95[f'{name} ratio to the fastest peer'] = best['ci95']
    for line in lines:
      for key in line.keys() - {'row', 'peer', 'ci95'}:
        metrics[f'{name}, {line["peer"]}: {key}'] = line[key]
    print(f'{name}: {best["ratio"]} x the fastest peer ({best["peer"]})')
  return {'metrics': metrics, 'ci95': ci95}
