"""What a step of every tuning costs, read from the compiled program.

  python -m experiments.run --config=experiments/benchmarks/cost.py

A BERT of MiniLM's shape, AdamW, clipping at norm 1, both norms logged. Beside
each tuning stands the same step written by hand (`bert_by_hand.py`), which
differentiates the moving leaves alone. Columns: moving parameters; FLOPs and
temporary bytes as XLA counts them, with their ratio to the step by hand; bytes
of optimiser state over those of the moving parameters. Nothing is executed,
so the numbers do not depend on the machine's load. Expected: at most 1.02 in
FLOPs and bytes, 2 in optimiser state. Measured: experiments/README.md.
"""

import dataclasses
from typing import Any

import jax
import numpy as np
import optax

import fmeta
from experiments.benchmarks import bert_by_hand
from fmeta import adapters, models, optim, tree
from fmeta.workdir import Context

CLASSES = 10
ALPHA = 16.0


@dataclasses.dataclass
class Config:
  """Shapes; the defaults are MiniLM's."""

  rows: tuple[str, ...] = ()  # all of them
  hidden_size: int = 384
  num_layers: int = 6
  intermediate_size: int = 1536
  num_heads: int = 12
  vocab_size: int = 30522
  batch_size: int = 16
  length: int = 32
  rank: int = 8


SMALL = {
  'rows': ('probe', 'prompt'),
  'hidden_size': 16,
  'num_layers': 2,
  'num_heads': 2,
  'intermediate_size': 32,
  'vocab_size': 20,
  'batch_size': 2,
  'length': 8,
}


def tunings(config: Config) -> dict[str, fmeta.Tuning]:
  """Row -> what moves; the head moves in all of them."""
  last, head = config.num_layers - 1, ('head/.*',)
  kernels = r'body/layer_\d+/.*kernel'
  past = r'body/layer_\d+/attention/(key|value)/kernel'
  after = r'body/layer_\d+/(attention/output|mlp/down)/kernel'
  factors = {'rank': config.rank, 'also': head}
  return {
    'full': fmeta.full(),
    'probe': fmeta.select('head/.*'),
    'last block': fmeta.select(f'body/layer_{last}/.*', 'head/.*'),
    'first block': fmeta.select('body/layer_0/.*', 'head/.*'),
    'bitfit': adapters.bitfit(also=head),
    'norm tuning': adapters.norm_tuning(also=head),
    'lora': adapters.lora(kernels, alpha=ALPHA, **factors),
    'rslora': adapters.rslora(kernels, alpha=ALPHA, **factors),
    'dora': adapters.dora(kernels, alpha=ALPHA, **factors),
    'pissa': adapters.pissa(kernels, **factors),
    'vera': adapters.vera(kernels, **factors),
    'ia3': adapters.ia3(
      past, inputs=(r'body/layer_\d+/mlp/down/kernel',), also=head
    ),
    'bottleneck': adapters.bottleneck(after, width=config.rank, also=head),
    'prefix': adapters.prefix(past, length=config.rank, also=head),
    'prompt': adapters.prompt(length=config.rank, also=head),
  }


def scale_of(row: str, config: Config) -> float:
  """The factor of A B in a row."""
  scales = {'rslora': ALPHA / config.rank**0.5, 'pissa': 1.0, 'vera': 1.0}
  return scales.get(row, ALPHA / config.rank)


def setting(config: Config) -> tuple[models.BertClassifier, Any, Any]:
  """The model, and shapes of its parameters and of a batch."""
  sizes = models.BertConfig(
    vocab_size=config.vocab_size,
    hidden_size=config.hidden_size,
    num_layers=config.num_layers,
    num_heads=config.num_heads,
    intermediate_size=config.intermediate_size,
    dropout=0.0,
    attention_dropout=0.0,
  )
  module = models.BertClassifier(sizes, num_classes=CLASSES)
  ids = jax.ShapeDtypeStruct((config.batch_size, config.length), np.int32)
  label = jax.ShapeDtypeStruct((config.batch_size,), np.int32)
  batch = {'input_ids': ids, 'attention_mask': ids, 'label': label}
  shapes = jax.eval_shape(module.init, jax.random.key(0), ids, ids)
  return module, shapes['params'], batch


def flat(leaves: Any) -> dict[str, Any]:
  """Name -> leaf."""
  return {name: tree.get(leaves, name) for name in tree.names(leaves)}


def numbers(lowered: Any) -> tuple[float, int]:
  """FLOPs and temporary bytes of a compiled step."""
  compiled = lowered.compile()
  memory = compiled.memory_analysis()
  return compiled.cost_analysis()['flops'], memory.temp_size_in_bytes


def ours(module: Any, params: Any, batch: Any, tuning: Any) -> tuple:
  """FLOPs, bytes and shapes of the state of fmeta's step."""
  learner = fmeta.finetune(
    fmeta.supervised(models.forward(module), fmeta.softmax_cross_entropy),
    optim.adamw(1e-4),
    tuning=tuning,
  )
  key = jax.eval_shape(jax.random.key, 0)
  state = jax.eval_shape(learner.init, params, key)
  run = jax.jit(
    lambda moving, frozen, batch, key: learner.step(
      moving.replace(frozen=frozen), batch, key
    )[0].replace(frozen={}),
    donate_argnums=0,
  )
  lowered = run.lower(state.replace(frozen={}), state.frozen, batch, key)
  return *numbers(lowered), state


def by_hand(module: Any, batch: Any, state: Any, scale: float) -> tuple:
  """FLOPs and bytes of the step that moves the same leaves."""
  moving, still = flat(state.trainable), flat(state.frozen)
  decayed = {name: len(leaf.shape) > 1 for name, leaf in moving.items()}
  optimizer = optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.adamw(1e-4, weight_decay=0.01, mask=decayed),
  )
  run = bert_by_hand.step(optimizer, module.config, scale)
  slots = jax.eval_shape(optimizer.init, moving)
  lowered = jax.jit(run, donate_argnums=(0, 1)).lower(
    moving, slots, still, batch
  )
  return numbers(lowered)


def measure(row: str, config: Config, where: tuple) -> dict[str, float]:
  """The numbers of one row; `where` is from `setting`."""
  module, params, batch = where
  flops, held, state = ours(module, params, batch, tunings(config)[row])
  bound = by_hand(module, batch, state, scale_of(row, config))
  return {
    'moving': tree.size(state.trainable),
    'flops': flops,
    'flops ratio': flops / bound[0],
    'temp bytes': held,
    'temp ratio': held / bound[1],
    'slots ratio': (
      tree.num_bytes(state.opt_state) / tree.num_bytes(state.trainable)
    ),
  }


def run(config: Config, context: Context) -> dict:
  """Compiles every row and prints the table."""
  del context
  known = tunings(config)
  for row in config.rows:
    if row not in known:
      raise fmeta.UsageError(f'no row {row!r}; possible: {", ".join(known)}')
  where, metrics = setting(config), {}
  print('tuning           moving    GFLOP  ratio      MB  ratio  slots')
  for row in config.rows or known:
    found = measure(row, config, where)
    metrics |= {f'{row}/{name}': value for name, value in found.items()}
    print(
      f'{row:<12} {found["moving"]:>10,} {found["flops"] / 1e9:>8.2f} '
      f'{found["flops ratio"]:>6.3f} {found["temp bytes"] / 1e6:>7.1f} '
      f'{found["temp ratio"]:>6.3f} {found["slots ratio"]:>6.3f}',
      flush=True,
    )
  return {'metrics': metrics}
