"""Trials side by side, in turn, or from the host: which is fastest?

  python -m experiments.run --config=experiments/benchmarks/trials.py

T trials of one learner (rates differ) take a few steps in each of the three
ways of `fmeta.search`, interleaved; compilation is left out. One JSON line per
row: median seconds of a step of all T trials, and how many times faster than
the loop from the host each way is (median of paired ratios). Rows: a small
MLP, and MiniLM from cached hidden states as a probe and with its last block.
Measured: experiments/README.md.
"""

import dataclasses
import json
from collections.abc import Callable

import jax
import numpy as np

import fmeta
from experiments import minilm
from experiments.common import Seeds
from fmeta import data, models, optim, search
from fmeta.pretrained import MINILM
from fmeta.workdir import Context


@dataclasses.dataclass
class Config:
  """What one would sweep; numbers of trials and repeats are untuned."""

  seed: Seeds = dataclasses.field(default_factory=Seeds)
  rows: tuple[str, ...] = ('mlp', 'probe', 'last block')
  model: str = MINILM
  trials_mlp: int = 16
  trials_minilm: int = 4
  batch_size: int = 32
  length: int = 32
  num_steps: int = 5
  repeats: int = 7


SMALL = {'rows': ('mlp',), 'trials_mlp': 2, 'num_steps': 1, 'repeats': 1}


def mlp(config: Config):
  """(forward, tuning, parameters, batch, T) of a small MLP, 8x8 pixels."""
  module = models.Mlp((64,), 10)
  draw = np.random.default_rng(config.seed.data)
  size = (config.batch_size, 8, 8, 1)
  batch = {'image': draw.random(size, np.float32)}
  params, _ = models.init(
    module, jax.random.key(config.seed.init), batch, ('image',)
  )
  forward = models.forward(module, ('image',))
  return forward, fmeta.full(), params, batch, config.trials_mlp


def from_cache(config: Config, blocks: int):
  """The same of MiniLM from the states that enter its last `blocks` blocks."""
  module, params, _ = minilm.load_model(config.model, 10, config.seed.init)
  last = module.config.num_layers
  draw = np.random.default_rng(config.seed.data)
  shape = (config.batch_size, config.length, module.config.hidden_size)
  batch = {
    'hidden': draw.normal(size=shape).astype(np.float32),
    'attention_mask': np.ones(shape[:2], np.int32),
  }
  moving = [f'body/layer_{k}/.*' for k in range(last - blocks, last)]
  tuning = fmeta.select(*moving, 'head/.*')
  forward = minilm.from_layer(module, last - blocks)
  return forward, tuning, params, batch, config.trials_minilm


ROWS: dict[str, Callable] = {
  'mlp': mlp,
  'probe': lambda config: from_cache(config, 0),
  'last block': lambda config: from_cache(config, 1),
}


def measure(config: Config, name: str) -> dict:
  """One row as plain numbers."""
  forward, tuning, params, batch, size = ROWS[name](config)
  batch['label'] = np.arange(config.batch_size, dtype=np.int32) % 10
  loss = fmeta.supervised(forward, fmeta.softmax_cross_entropy)

  def learner(hyper):
    return fmeta.finetune(loss, optim.adamw(hyper['rate']), tuning=tuning)

  hyper = search.log_uniform(config.seed.train, size, rate=(1e-5, 1e-3))
  rng = jax.random.key(config.seed.train)
  found = search.compare(
    learner,
    search.Trials(learner).init(params, hyper, rng),
    hyper,
    lambda i: batch,
    rng,
    num_steps=config.num_steps,
    repeats=config.repeats,
  )
  seconds = np.median(found.seconds, 1) / config.num_steps
  return {
    'row': name,
    'trials': size,
    'seconds_per_step': {
      way.__name__: round(float(s), 6)
      for way, s in zip(found.ways, seconds, strict=True)
    },
    'times_faster_than_looped': {
      way.__name__: round(found.ratio(way, to=search.looped), 3)
      for way in found.ways
    },
    'fastest': found.fastest.__name__,
  }


def run(config: Config, context: Context) -> dict:
  """Prints a line per row."""
  metrics, first = {}, {}
  for name in config.rows:
    if name not in ROWS:
      raise fmeta.UsageError(f'no row {name!r}; possible: {sorted(ROWS)}')
    row = measure(config, name)
    print(json.dumps(row), flush=True)
    for way, ratio in row['times_faster_than_looped'].items():
      metrics[f'{name}/{way}'] = ratio
    first = first or ROWS[name](config)[3]
  return {
    'metrics': metrics,
    'steps': config.num_steps * config.repeats,
    'data_sha256': data.fingerprint(first),
  }
