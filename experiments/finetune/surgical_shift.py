"""Which block repairs which shift? ResNets on CIFAR-10, one block at a time.

  python -m experiments.run --config=experiments/finetune/surgical_shift.py \\
    --data_dir=DIR

`DIR` holds `cifar10/` and `checkpoints/cifar10_resnet<depth>.safetensors`. A
ResNet trained on CIFAR-10 meets ten shifts, which were fixed on 2026-11-24
before the first run:

- of the image, at the constants of CIFAR-10-C, severity 5: gaussian_noise,
  gaussian_blur, brightness, contrast, pixelate, jpeg;
- of the label: label_flip (y to 9 - y), label_merge (odd classes to the even
  one below);
- of features: stage_1_scaled, stage_2_scaled (fixed random factors on the
  channels that the stage gives).

For each of them 300 shifted images train one block (stem and first stage,
second stage, third stage, head), everything, or the block that `auto_surgical`
chooses from gradient-to-weight ratios on those 300 images before training.
Every row chooses its rate on 300 other images from the same grid, with the
first seed; all images are of the test split, which the model has not seen.
Lee et al. 2022 (https://arxiv.org/abs/2210.11466, section 2): image corruption
-> first block, feature shift -> middle, label shift -> last. Expected and
measured: experiments/README.md.
"""

import dataclasses

import numpy as np

from experiments.common import Seeds
from experiments.finetune import shift_trials, shifts
from experiments.finetune.shift_trials import BLOCKS, NONE, open_bench
from experiments.resnets import checkpoint_of
from fmeta import metrics, tree
from fmeta.errors import UsageError, suggest
from fmeta.scores import Scores
from fmeta.workdir import Context

AUTO = 'auto'


@dataclasses.dataclass
class Config:
  """What one would sweep."""

  seed: Seeds = dataclasses.field(default_factory=Seeds)
  seeds: int = 3
  depth: int = 20
  checkpoint: str | None = None  # by default that of `depth` in data_dir
  shifts: tuple[str, ...] = shifts.SHIFTS
  rows: tuple[str, ...] = (*BLOCKS, 'full')
  rates: tuple[float, ...] = (1e-4, 1e-3, 1e-2)
  # Fifteen epochs in the paper's appendix; ten at these rates (untuned).
  epochs: int = 10
  batch_size: int = 50
  tune_examples: int = 300
  validation_examples: int = 300
  test_examples: int = 1500
  explained: int = 8  # images explained by pixel; 0: no page
  nodes: int = 200  # of their integrals


SMALL = {
  'seeds': 1,
  'shifts': ('gaussian_blur', 'label_flip'),
  'rows': ('early', 'head'),
  'rates': (1e-2,),
  'epochs': 1,
  'batch_size': 8,
  'tune_examples': 16,
  'validation_examples': 16,
  'test_examples': 32,
  'explained': 0,
}


def check(config: Config) -> None:
  """Refuses unknown shifts and rows before anything is loaded."""
  for kind, given, known in (
    ('shift', config.shifts, shifts.SHIFTS),
    ('row', config.rows, (*BLOCKS, 'full')),
  ):
    for name in given:
      if name not in known:
        raise UsageError(f'no {kind} {name!r}{suggest(name, known, limit=12)}')
  if not set(config.rows) & set(BLOCKS):
    raise UsageError(f'rows={config.rows} name no block of {list(BLOCKS)}')


def auto_picks(config: Config, result: dict) -> list[str]:
  """The block with the largest ratio among the rows, for each seed."""
  blocks = [name for name in BLOCKS if name in config.rows]
  return [max(blocks, key=ratios.get) for ratios in result['ratios']]


def summary(config: Config, result: dict) -> dict:
  """Intervals of a shift, its blocks from best to worst, auto's hits.

  Every seed has its own test images, so the intervals resample all of them.

  Args:
    config: the settings.
    result: of one shift: row -> right answers [seeds, N], and `ratios`.
  """
  picks = auto_picks(config, result)
  rows = {row: result['rows'][row] for row in (*config.rows, NONE)}
  rows[AUTO] = np.array([rows[pick][k] for k, pick in enumerate(picks)])
  found = {
    row: metrics.bootstrap_ci(right.ravel()) for row, right in rows.items()
  }
  blocks = [name for name in BLOCKS if name in config.rows]
  order = sorted(blocks, key=lambda name: -found[name].mean)
  hits = [pick in order[:2] for pick in picks]
  lead = None
  if len(order) > 1:
    best, second = (rows[name].ravel() for name in order[:2])
    lead = metrics.paired_bootstrap(best, second)
  return {
    'found': found,
    'order': order,
    'lead': lead,
    'picks': picks,
    'hits': hits,
  }


def line(name: str, found: dict) -> str:
  """One printed row."""
  cells = '  '.join(
    f'{row} {100 * value.mean:5.1f}' for row, value in found['found'].items()
  )
  best, picks = found['order'][0], '/'.join(found['picks'])
  if found['lead']:
    mean, low, high = (100 * value for value in found['lead'])
    best = f'{best} by {mean:.1f} [{low:.1f}, {high:.1f}]'
  return f'{name:<15} {cells}  best {best}, auto {picks}'


def tested_on(bench: shift_trials.Bench, name: str) -> str:
  """Names the test images of all seeds under a shift."""
  config = bench.config
  first = config.tune_examples + config.validation_examples
  return (
    f'{name} of {bench.data_sha256}, images {first} to '
    f'{first + config.test_examples} of seeds {config.seed.data} to '
    f'{config.seed.data + config.seeds - 1}'
  )


def run(config: Config, context: Context) -> dict:
  """Trains every row under every shift and prints a table."""
  check(config)
  path = checkpoint_of(config.depth, config.checkpoint, context)
  bench = open_bench(config, context, path)
  means, ci95, kept, hits = {}, {}, {}, []
  for name in config.shifts:
    measured = shift_trials.measure(bench, name)
    found = summary(config, measured)
    kept |= {
      f'{name}/{row}': Scores(right.ravel(), tested_on(bench, name))
      for row, right in measured['rows'].items()
    }
    print(line(name, found), flush=True)
    intervals = {f'{name}/{row}': i for row, i in found['found'].items()}
    if found['lead']:
      intervals[f'{name}/best minus second'] = found['lead']
    means |= {key: interval.mean for key, interval in intervals.items()}
    ci95 |= {key: list(interval[1:]) for key, interval in intervals.items()}
    means[f'{name}/auto in the best two'] = float(np.mean(found['hits']))
    hits += found['hits']
  share = means['auto in the best two'] = float(np.mean(hits))
  print(f'auto_surgical took one of the best two blocks in {share:.0%}')
  if config.explained:
    shift_trials.explain_one(bench, config.shifts[0])
  return {
    'metrics': means,
    'ci95': ci95,
    'scores': kept,
    'total_parameters': tree.size(bench.params),
    'data_sha256': bench.data_sha256,
  }
