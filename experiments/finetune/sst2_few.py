"""Fine-tuning MiniLM on 100 and 1,000 sentences: what Zhang et al. repaired.

  python -m experiments.run --config=experiments/finetune/sst2_few.py

Zhang et al. (2021, https://arxiv.org/abs/2006.05987): with few examples BERT
wants bias-corrected Adam (always so here), more steps than three epochs, and
fresh top layers. Rows on SST-2 with `sizes` training sentences:

- short: everything, 3 epochs;
- long: everything, the size's `long_epochs`;
- reinit: the last block drawn anew, 3 epochs;
- both: the last block drawn anew, `long_epochs` of the size.

Every row chooses its rate from a grid of five on validation sentences, of
which there are more than a user with 100 labels would have: the table says
what the recipe can do, not what choosing it costs. Each seed draws other
training sentences. Intervals resample test sentences of the seed-averaged
correctness. Expected and measured: experiments/README.md.
"""

import dataclasses

import numpy as np

import fmeta
from experiments.common import Seeds
from experiments.finetune.text_table import Plan, compare
from experiments.finetune.text_task import Recipe, open_task
from fmeta import adapters, data, optim
from fmeta.datasets import sst2
from fmeta.pretrained import MINILM
from fmeta.workdir import Context

ROWS = ('short', 'long', 'reinit', 'both')


@dataclasses.dataclass
class Config:
  """What one would sweep."""

  seed: Seeds = dataclasses.field(default_factory=Seeds)
  seeds: int = 5
  model: str = MINILM
  rows: tuple[str, ...] = ROWS
  sizes: tuple[int, ...] = (100, 1000)
  short_epochs: int = 3
  # One per size: 120 and 372 steps; the paper's last up to 3,200 (untuned).
  long_epochs: tuple[int, ...] = (20, 6)
  fresh: str = 'body/layer_5/.*'
  batch_size: int = 16
  max_length: int = 64
  head_multiplier: float = 10.0
  # Wide enough for 18 and for 372 steps.
  rates: tuple[float, ...] = (2.5e-5, 5e-5, 1e-4, 2e-4, 4e-4)
  validation_examples: int = 400
  test_examples: int | None = None


SMALL = {
  'rows': ('short', 'both'),
  'sizes': (32,),
  'rates': (1e-3,),
  'seeds': 1,
  'short_epochs': 1,
  'long_epochs': (2,),
  'fresh': 'body/layer_1/.*',
  'max_length': 16,
  'validation_examples': 16,
  'test_examples': 32,
}


def recipe_of(config: Config, row: str, long_epochs: int) -> Recipe:
  """A row of the table."""
  epochs = {
    'short': config.short_epochs,
    'long': long_epochs,
    'reinit': config.short_epochs,
    'both': long_epochs,
  }
  if row not in epochs:
    raise fmeta.UsageError(f'no row {row!r}; possible: {", ".join(ROWS)}')
  recipe = Recipe(
    phases=lambda steps: fmeta.phases([(steps, fmeta.full())]),
    schedule=optim.warmup_linear,
    multipliers=(('head/.*', config.head_multiplier), ('.*', 1.0)),
    rates=config.rates,
    epochs=epochs[row],
  )
  if row in ('short', 'long'):
    return recipe
  return recipe._replace(
    start=lambda params, key: adapters.reinitialise(
      params, (config.fresh,), key
    )
  )


def run(config: Config, context: Context) -> dict:
  """Trains every row for every size and prints a table each."""
  if len(config.sizes) != len(config.long_epochs):
    raise fmeta.UsageError(
      f'{len(config.sizes)} sizes and {len(config.long_epochs)} long_epochs;'
      ' give one number of epochs for each size'
    )
  splits = sst2.load(context.data_dir)
  splits['validation'] = data.take(
    splits['validation'], slice(config.validation_examples)
  )
  splits['test'] = data.take(splits['test'], slice(config.test_examples))
  task = open_task(config, context, splits, len(sst2.LABELS))
  train = task.splits['train']
  outcome = {'metrics': {}, 'ci95': {}, 'scores': {}}
  for size, epochs in zip(config.sizes, config.long_epochs, strict=True):
    if not 0 < size <= len(train['label']):
      raise fmeta.UsageError(
        f'{size} training sentences of {len(train["label"])}; give fewer'
      )

    def drawn(seed: int, size=size):
      random = np.random.default_rng((config.seed.data, seed))
      return data.take(train, random.permutation(len(train['label']))[:size])

    recipes = {row: recipe_of(config, row, epochs) for row in config.rows}
    # Rates are chosen on a sample that no final run has.
    search = drawn(config.seeds)
    plan = Plan(f'sst2_{size}', recipes, search, drawn, config.seeds, 'short')
    made = compare(task, plan, f'What helps with {size} sentences?')
    outcome = {
      **made,
      **{
        key: {**outcome[key], **made[key]}
        for key in ('metrics', 'ci95', 'scores')
      },
    }
  return outcome
