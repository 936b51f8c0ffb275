"""Which ULMFiT piece helps MiniLM on TREC-6? Table 7 of the paper, again.

  python -m experiments.run --config=experiments/finetune/trec.py

Question classification, 5,452 training and 500 test questions. Howard & Ruder
(2018, https://arxiv.org/abs/1801.06146, Table 7, validation error of an LSTM):
last layer 16.09, full 6.86, chain-thaw 11.71, gradual unfreezing +
discriminative rates + slanted triangular 5.69. Rows here, all for the same
number of steps:

- last: the head alone;
- full: everything at one rate, constant after a warm-up;
- stlr: everything, slanted triangular rate;
- discr: that with rates that shrink by 2.6 per block;
- ulmfit: that with one more block per half epoch;
- chain_thaw: head, each block alone, all, slanted triangular.

The fresh head moves `head_multiplier` times faster in every row. Every row
chooses its rate from a grid of five on 500 held-out training questions; 5
seeds; intervals resample test questions of the seed-averaged correctness.
Expected and measured: experiments/README.md.
"""

import dataclasses
from collections.abc import Sequence

import fmeta
from experiments.common import Seeds
from experiments.finetune.text_table import Plan, compare
from experiments.finetune.text_task import Recipe, hold_out, open_task
from fmeta import data, optim
from fmeta.datasets import trec
from fmeta.pretrained import MINILM
from fmeta.workdir import Context

ROWS = ('last', 'full', 'stlr', 'discr', 'ulmfit', 'chain_thaw')
REFERENCE = 'full'


@dataclasses.dataclass
class Config:
  """What one would sweep."""

  seed: Seeds = dataclasses.field(default_factory=Seeds)
  seeds: int = 5
  model: str = MINILM
  rows: tuple[str, ...] = ROWS
  epochs: int = 5
  batch_size: int = 32
  max_length: int = 32
  layers: int = 6
  head_multiplier: float = 10.0
  rates_last: tuple[float, ...] = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
  rates: tuple[float, ...] = (2e-5, 5e-5, 1e-4, 2e-4, 4e-4)
  search_examples: int = 1500
  validation_examples: int = 500
  train_examples: int | None = None
  test_examples: int | None = None


SMALL = {
  'rows': ('full', 'ulmfit'),
  'layers': 2,
  'max_length': 16,
  'rates': (1e-3,),
  'seeds': 1,
  'epochs': 2,
  'search_examples': 64,
  'train_examples': 64,
  'validation_examples': 16,
  'test_examples': 32,
}


def blocks(config: Config) -> list[str]:
  """From the input to the output."""
  layers = [f'body/layer_{k}/.*' for k in range(config.layers)]
  return ['body/embeddings/.*', *layers, 'head/.*']


def gradually(config: Config, steps: int) -> Sequence[fmeta.Phase]:
  """Half an epoch per block, the rest with all of them."""
  names = blocks(config)
  each = max(1, round(steps / config.epochs / 2))
  lengths = [each] * (len(names) - 1)
  return fmeta.gradual_unfreezing(names, [*lengths, steps - sum(lengths)])


def thawing(config: Config, steps: int) -> Sequence[fmeta.Phase]:
  """Half an epoch per block alone, the rest with all of them."""
  names = blocks(config)
  each = max(1, round(steps / config.epochs / 2))
  lengths = [each] * len(names)
  return fmeta.chain_thaw(names, [*lengths, steps - sum(lengths)])


def recipe_of(config: Config, row: str) -> Recipe:
  """A row of the table."""
  head = ('head/.*', config.head_multiplier)
  uniform = (head, ('.*', 1.0))
  # The last block moves at the rate itself, the one below at rate / 2.6.
  decayed = (head, *optim.layerwise_decay(blocks(config)[:-1], 1 / 2.6))
  one = lambda tuning: lambda steps: fmeta.phases([(steps, tuning)])
  made = {
    'last': (one(fmeta.select('head/.*')), optim.warmup_constant, uniform),
    'full': (one(fmeta.full()), optim.warmup_constant, uniform),
    'stlr': (one(fmeta.full()), optim.slanted_triangular, uniform),
    'discr': (one(fmeta.full()), optim.slanted_triangular, decayed),
    'ulmfit': (
      lambda steps: gradually(config, steps),
      optim.slanted_triangular,
      decayed,
    ),
    'chain_thaw': (
      lambda steps: thawing(config, steps),
      optim.slanted_triangular,
      uniform,
    ),
  }
  if row not in made:
    raise fmeta.UsageError(f'no row {row!r}; possible: {", ".join(ROWS)}')
  rates = config.rates_last if row == 'last' else config.rates
  return Recipe(*made[row], rates, config.epochs)


def load(config: Config, context: Context) -> dict:
  """Train, validation (held out from train) and test."""
  splits = trec.load(context.data_dir)
  rest, held = hold_out(
    splits['train'], config.validation_examples, config.seed.data
  )
  cut = lambda columns, count: {k: v[:count] for k, v in columns.items()}
  return {
    'train': cut(rest, config.train_examples),
    'validation': held,
    'test': cut(splits['test'], config.test_examples),
  }


def run(config: Config, context: Context) -> dict:
  """Trains every row and prints the table."""
  recipes = {row: recipe_of(config, row) for row in config.rows}
  task = open_task(config, context, load(config, context), len(trec.LABELS))
  train = task.splits['train']
  plan = Plan(
    'trec',
    recipes,
    data.take(train, slice(config.search_examples)),
    lambda seed: train,
    config.seeds,
    REFERENCE,
  )
  return compare(
    task,
    plan,
    'Which piece of ULMFiT helps MiniLM?',
    f'{config.seeds} seeds, {config.epochs} epochs each.',
  )
