"""The trials of `surgical_shift`: rows of tunings, all the same step."""

import dataclasses
import pathlib
from typing import Any

import jax
import numpy as np
import optax

import fmeta
from experiments.common import best_setting, placement, trial
from experiments.finetune import shifts
from fmeta import (
  data,
  evaluate,
  explain,
  optim,
  pretrained,
  result,
  surgical,
  train,
)
from fmeta.datasets import cifar
from fmeta.draw import permutation
from fmeta.explain import images
from fmeta.models import ResNet
from fmeta.workdir import Context

# Row -> pattern of its parameters, from input to output.
BLOCKS = {
  'early': 'body/(stem|stage_1)/.*',
  'stage_2': 'body/stage_2/.*',
  'stage_3': 'body/stage_3/.*',
  'head': 'head/.*',
}
NONE = 'none'
EVAL_ROWS = 100
# Stream of randomness that divides the test split; any number would do.
DIVIDE = 77


@dataclasses.dataclass
class Bench:
  """What all trials share, and a compiled step per row."""

  config: Any
  context: Context
  module: ResNet
  params: dict
  model_state: dict
  images: dict[str, np.ndarray]
  programs: dict[str, train.Program]
  data_sha256: str
  shifted: dict[str, dict] = dataclasses.field(default_factory=dict)

  def under(self, name: str) -> dict[str, np.ndarray]:
    """All images under a shift, each with noise of its own; keeps one."""
    if name not in self.shifted:
      self.shifted.clear()
      self.shifted[name] = shifts.shifted(name, self.images, self.module.width)
    return self.shifted[name]

  @property
  def forward(self) -> fmeta.Forward:
    """The model with the feature shifts, the same object each time."""
    return shifts.forward_of(self.module)

  @property
  def loss_fn(self) -> fmeta.LossFn:
    """Cross-entropy."""
    return fmeta.supervised(self.forward, fmeta.softmax_cross_entropy)


def open_bench(config: Any, context: Context, path: pathlib.Path) -> Bench:
  """Loads the model and the images that it has not been trained on."""
  published = pretrained.CIFAR10_SHA256.get(config.depth)
  module, params, state = pretrained.load_resnet(
    path, sha256=None if config.checkpoint else published
  )
  test = cifar.load(context.data_dir)['test']
  bench = Bench(
    config,
    context,
    module,
    params,
    state,
    test,
    {},
    data.fingerprint(test),
  )
  for row in config.rows:
    # Not in a loop: there XLA's convolutions take 14 times as long on CPU.
    bench.programs[row] = train.Unrolled(
      fmeta.finetune(
        bench.loss_fn,
        optax.inject_hyperparams(_optimizer)(rate=0.0, num_steps=1.0),
        tuning=tuning_of(row),
      )
    )
  return bench


def _optimizer(rate, num_steps):
  return optim.adamw(optim.warmup_linear(rate, num_steps))


def tuning_of(row: str) -> fmeta.Tuning:
  """What moves."""
  return fmeta.full() if row == 'full' else fmeta.select(BLOCKS[row])


def splits_of(bench: Bench, name: str, seed: int) -> dict[str, dict]:
  """Disjoint shifted images to tune on, choose by and test with."""
  config = bench.config
  have = len(bench.images['label'])
  order = permutation(config.seed.data + seed, DIVIDE, 0, have)
  out, first = {}, 0
  for split in ('tune', 'validation', 'test'):
    size = getattr(config, f'{split}_examples')
    rows = data.take(bench.under(name), order[first : first + size])
    out[split] = rows
    first += size
  if first > have:
    raise fmeta.UsageError(
      f'{first} images to tune, choose and test with, but there are {have}; '
      'lower config.*_examples'
    )
  return out


def correct(bench: Bench, params, state, columns) -> np.ndarray:
  """Which answers are right, [N]."""
  size = min(EVAL_ROWS, len(columns['label']))
  return evaluate.evaluate(
    bench.forward, params, state, data.eval_batches(columns, size)
  ).correct


def fit(bench: Bench, row: str, splits, rate: float, seed: int):
  """Trains one row once."""
  config = bench.config
  batches = data.batches(
    splits['tune'], config.batch_size, config.seed.data + seed
  )
  steps = batches.steps_per_epoch * config.epochs
  program = bench.programs[row]
  state = program.learner.init(
    bench.params, jax.random.key(config.seed.init), bench.model_state
  )
  return train.fit(
    program.learner,
    optim.set_hyper(state, rate=rate, num_steps=steps),
    [train.Stage(row, batches, steps)],
    jax.random.key(config.seed.train + seed),
    program=program,
    quiet=True,
    **placement(bench.context),
  )


def attempt(bench: Bench, name: str, row: str, rate: float, seed: int) -> dict:
  """Validation accuracy and test answers of one rate; once per workdir."""

  def run():
    splits = splits_of(bench, name, seed)
    state = fit(bench, row, splits, rate, seed).state
    params = bench.programs[row].learner.params(state)
    right = {
      split: correct(bench, params, state.model_state, splits[split])
      for split in ('validation', 'test')
    }
    return {
      'validation': float(right['validation'].mean()),
      'correct': right['test'].astype(int).tolist(),
    }

  path = f'{name}/{row}/rate_{rate:g}_seed_{seed}'
  return trial(bench.context, path, run)


def chosen_rate(bench: Bench, name: str, row: str) -> float:
  """The rate of the grid with the best validation accuracy, first seed."""
  tried = {
    f'{rate:g}': attempt(bench, name, row, rate, 0)['validation']
    for rate in bench.config.rates
  }
  return float(best_setting(tried))


def untrained(bench: Bench, name: str, seed: int) -> dict:
  """Accuracy without tuning, and each block's ratio on the tuning images."""

  def run():
    splits = splits_of(bench, name, seed)
    batches = data.eval_batches(
      splits['tune'], min(EVAL_ROWS, len(splits['tune']['label']))
    )
    ratios = surgical.relative_gradients(
      bench.loss_fn, bench.params, batches, BLOCKS, bench.model_state
    )
    right = correct(bench, bench.params, bench.model_state, splits['test'])
    return {'correct': right.astype(int).tolist(), 'ratios': ratios}

  return trial(bench.context, f'{name}/{NONE}/seed_{seed}', run)


def measure(bench: Bench, name: str) -> dict:
  """All rows under one shift: right test answers [seeds, N], the ratios."""
  seeds = range(bench.config.seeds)
  start = [untrained(bench, name, seed) for seed in seeds]
  rows = {NONE: np.array([found['correct'] for found in start])}
  for row in bench.config.rows:
    rate = chosen_rate(bench, name, row)
    made = [attempt(bench, name, row, rate, seed) for seed in seeds]
    rows[row] = np.array([found['correct'] for found in made])
    shown = [round(100 * value, 1) for value in rows[row].mean(1)]
    print(f'  {name} {row}: rate {rate:g}, {shown} %', flush=True)
  return {'rows': rows, 'ratios': [found['ratios'] for found in start]}


def explain_one(bench: Bench, name: str) -> None:
  """Writes `explain.html` about the first row under a shift, first seed."""
  row = bench.config.rows[0]
  rate = chosen_rate(bench, name, row)
  splits = splits_of(bench, name, 0)
  fitted = fit(bench, row, splits, rate, 0)
  test = data.take(splits['test'], slice(0, 200))
  pattern = '.*' if row == 'full' else BLOCKS[row]
  rates = jax.vmap(optim.warmup_linear(rate, fitted.steps))(
    np.arange(fitted.steps)
  )
  case = explain.Case(
    bench.forward,
    bench.params,
    bench.programs[row].learner.params(fitted.state),
    data.eval_batches(test, min(EVAL_ROWS, len(test['label']))),
    bench.model_state,
    fitted.state.model_state,
    explain.Recipe('', 0, tuple(rates.tolist()), ((pattern, 1.0),)),
  )
  measured = explain.measure(case)
  shown = explain.Page(
    f'What fine-tuning {row} changed: ResNet-{bench.module.depth}, {name}',
    cifar.CLASSES,
    images.examples(test['image']),
    images.explained(
      case,
      test['image'],
      measured,
      cifar.CLASSES,
      bench.config.explained,
      bench.config.nodes,
    ),
    {
      'tuned': f'{row}, rate {rate:g}, {fitted.steps} steps',
      'commit': result.commit(),
      'versions': ', '.join(f'{k} {v}' for k, v in result.versions().items()),
    },
    case.recipe,
  )
  print(explain.write(bench.context.workdir, measured, shown)[0])
