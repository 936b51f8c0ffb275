"""How fast does it adapt from a few examples? MAML and its relatives.

  python -m experiments.run --config=experiments/fewshot/docparams_maml.py

Which parameter does a description describe? An episode has five parameter
names, one description of each to learn from and five of each to answer for.
Names with 20 descriptions or more are split 60/15/25 by the sha256 of the
name, so test names were never seen.

All but the last block of MiniLM is frozen and run once per text. An inner step
moves the last norm's scale and bias and a zero head on unit-length embeddings;
the outer loop moves the whole block and the head. Every row is that one inner
learner:

  fine-tuning  from the pre-trained weights, no meta-training
  Reptile      moves to where the inner loop went, with all texts as support
  FOMAML       the inner gradient is a constant
  MAML         second order
  Meta-SGD     MAML whose outer loop also moves the inner rate of each leaf
  ANIL         the inner loop moves the head alone

After training each row chooses a factor on its inner rates and the number of
inner steps on episodes of the validation names, from the same grid. Nearest
class mean by cosine has no settings. The test episodes are one fixed list.
Expected and measured: experiments/README.md.
"""

import dataclasses

import jax
import numpy as np

import fmeta
from experiments.common import Seeds, best_setting, placement, trial
from experiments.fewshot.names import SPLITS, Bench, Family
from fmeta import baselines, data, evaluate, metrics, optim, train, tree
from fmeta.pretrained import MINILM
from fmeta.report import Line, Panel, Row, curves, terminal_table
from fmeta.workdir import Context

REFERENCE = 'nearest class mean'


@dataclasses.dataclass
class Config:
  """What one would sweep; what has no source is untuned."""

  seed: Seeds = dataclasses.field(default_factory=Seeds)
  seeds: int = 1
  model: str = MINILM
  methods: tuple[str, ...] = (
    'fine-tuning',
    'Reptile',
    'FOMAML',
    'MAML',
    'Meta-SGD',
    'ANIL',
  )
  ways: int = 5
  shots: int = 1
  queries: int = 5
  min_examples: int = 20
  max_length: int = 16
  blocks: int = 1
  # Beside the head. Without meta-training the whole block (rates 0.1 to 1) and
  # rank-4 factors (rates 1, 10) gained at most 0.2 points on the head alone (60
  # validation episodes, 2026-11-23); factors on the MLP tested 2.6x slower.
  adapted: str = r'body/layer_\d+/mlp/norm/.*'
  iterations: int = 40
  meta_batch: int = 4
  inner_steps: int = 3
  # The head's is large because embeddings have unit length.
  head_rate: float = 50.0
  norm_rate: float = 1.0
  outer_lr: float = 3e-4
  # At 0.5 the head, whose classes are drawn anew in every episode, wanders off
  # and validation is at chance (2026-11-23).
  reptile_lr: float = 0.05
  # Logarithms of rates, against weights of a pre-trained block.
  rate_multiplier: float = 100.0
  rate_factors: tuple[float, ...] = (0.3, 1.0, 3.0)
  test_steps: tuple[int, ...] = (1, 3, 5)
  tasks: int = 10
  validation_episodes: int = 40
  test_episodes: int = 600
  steps_per_dispatch: int = 5


SMALL = {
  'methods': ('fine-tuning', 'Reptile', 'Meta-SGD'),
  'iterations': 2,
  'meta_batch': 2,
  'inner_steps': 1,
  'rate_factors': (1.0,),
  'test_steps': (1, 2),
  'steps_per_dispatch': 1,
  'validation_episodes': 10,
  'test_episodes': 20,
}


def meta_train(family: Family, method: str, seed: int, **options):
  """Fits the outer learner; returns what `fit` does."""
  bench, config = family.bench, family.bench.config
  how = fmeta.gradients.plain
  if method == 'FOMAML':
    how = fmeta.first_order()
  inner, steps = family.inner(how), config.inner_steps
  moves = fmeta.select('model/.*')
  if method == 'Meta-SGD':
    moves = fmeta.full()
  rates = (('hyper/.*', config.rate_multiplier), ('.*', 1.0))
  optimizer = optim.adamw(
    optim.warmup_linear(config.outer_lr, config.iterations),
    # A rate is no weight, it does not decay.
    decay=(('hyper/.*', 0.0), *optim.DECAY),
    multipliers=rates,
  )
  loss = fmeta.episode_loss(inner, bench.loss, steps)
  if method == 'Reptile':
    loss = fmeta.reptile_loss(inner, steps)
    optimizer = optim.sgd(config.reptile_lr)
  learner = fmeta.finetune(loss, optimizer, tuning=moves)
  tasks = bench.train_tasks(seed, whole=method == 'Reptile')
  return train.fit(
    learner,
    learner.init(family.start(seed), jax.random.key(config.seed.init + seed)),
    [train.Stage(method, tasks, config.iterations)],
    jax.random.key(config.seed.train + seed),
    steps_per_dispatch=config.steps_per_dispatch,
    **options,
    **placement(bench.context),
  )


def result_of(family: Family, method: str, seed: int) -> dict:
  """Trains, chooses on validation, tests: one trial."""
  config, params, cost = family.bench.config, family.start(seed), {}
  if method != 'fine-tuning':
    fitted = meta_train(family, method, seed)
    params = fitted.params
    cost = {
      'steps': fitted.steps,
      'examples_per_second': fitted.examples_per_second,
      'flops_per_step': fitted.flops_per_step,
      'peak_bytes': fitted.peak_bytes,
    }
  tried = {
    f'{factor:g} x rate, {steps} steps': float(value)
    for factor in config.rate_factors
    for steps, value in zip(
      config.test_steps,
      family.accuracies(params, 'validation', factor).mean(0),
      strict=True,
    )
  }
  chosen = best_setting(tried)
  place = list(tried).index(chosen)
  factor = config.rate_factors[place // len(config.test_steps)]
  curve = family.accuracies(params, 'test', factor)
  moving, _ = family.tuning.init(params['model'], jax.random.key(0))
  return {
    **cost,
    'tried': tried,
    'setting': chosen,
    'correct': curve[:, place % len(config.test_steps)].tolist(),
    'curve': curve.T.tolist(),
    'trainable': tree.size(moving),
  }


def nearest_mean(bench: Bench) -> np.ndarray:
  """Accuracy [episodes] of the frozen model, by cosine."""
  config = bench.config
  predict = baselines.nearest_mean_episodes(
    bench.embed, baselines.nearest_mean_cosine, config.ways
  )
  held_out = bench.held_out('test')
  return evaluate.evaluate_episodes(
    predict, bench.start, held_out.__getitem__, config.test_episodes
  )


def run_methods(bench: Bench) -> dict[str, list[dict]]:
  """Method -> a result per seed; prints each grid."""
  config = bench.config
  possible = Config.methods
  for name in config.methods:
    if name not in possible:
      raise fmeta.UsageError(
        f'no method {name!r}; possible: {", ".join(possible)}'
      )
  families = {head: Family(bench, head) for head in (False, True)}
  results = {}
  for name in config.methods:
    family = families[name == 'ANIL']
    results[name] = [
      trial(
        bench.context,
        f'fewshot/{name}/seed_{seed}',
        lambda name=name, family=family, seed=seed: result_of(
          family, name, seed
        ),
      )
      for seed in range(config.seeds)
    ]
    tried = {
      setting: round(value, 3)
      for setting, value in results[name][0]['tried'].items()
    }
    print(f'{name}: validation accuracy by setting {tried}', flush=True)
  return results


def panel(config: Config, context: Context) -> tuple[Panel, dict]:
  """Runs every row and returns the panel and its numbers."""
  bench = Bench(config, context)
  reference = nearest_mean(bench)
  base = evaluate.summarize(reference)
  rows = [Row(REFERENCE, base.mean, base.ci95, 'cosine', baseline=True)]
  numbers = {f'fewshot/{REFERENCE}': base.mean}
  ci95 = {f'fewshot/{REFERENCE}': base.ci95}
  steps = config.test_steps
  ends = [base.ci95] * len(steps)
  lines = [Line(REFERENCE, steps, [base.mean] * len(steps), ends, True)]
  results = run_methods(bench)
  for name, runs in results.items():
    right = np.array([one['correct'] for one in runs])
    summary = evaluate.summarize(right.mean(0))
    difference = metrics.paired_bootstrap(right, reference)
    numbers[f'fewshot/{name}'] = summary.mean
    ci95[f'fewshot/{name}'] = summary.ci95
    numbers[f'fewshot/{name} minus {REFERENCE}'] = difference.mean
    ci95[f'fewshot/{name} minus {REFERENCE}'] = difference.ci95
    rows.append(
      Row(
        name,
        summary.mean,
        summary.ci95,
        setting='; '.join(dict.fromkeys(one['setting'] for one in runs)),
        trainable=runs[0]['trainable'],
        seconds=float(np.mean([one['seconds'] for one in runs])),
        baseline=name == 'fine-tuning',
        difference=tuple(difference),
      )
    )
    points = [
      evaluate.summarize(point)
      for point in np.mean([one['curve'] for one in runs], 0)
    ]
    lines.append(
      Line(name, steps, [p.mean for p in points], [p.ci95 for p in points])
    )
  shown = Panel(
    'Few-shot adaptation',
    'How fast does it adapt from a few examples?',
    rows,
    note_of(bench),
    curves(lines, xlabel='inner steps'),
    reference=REFERENCE,
    total=bench.total,
  )
  trained = [runs[0] for runs in results.values() if 'steps' in runs[0]]
  cost = trained[-1] if trained else {}
  keys = ('steps', 'examples_per_second', 'flops_per_step', 'peak_bytes')
  outcome = {
    'metrics': numbers,
    'ci95': ci95,
    **{key: cost.get(key) for key in keys},
    'trainable_parameters': rows[-1].trainable,
    'total_parameters': bench.total,
    'data_sha256': data.fingerprint(bench.texts),
  }
  return shown, outcome


def note_of(bench: Bench) -> str:
  """The protocol in words."""
  config = bench.config
  train_names, validation, test = (len(bench.classes[s]) for s in SPLITS)
  return (
    f'{config.ways} names an episode, {config.shots} description(s) of each to '
    f'adapt to and {config.queries} to answer for; {config.test_episodes} '
    f'episodes of {test} names that neither the {train_names} of meta-training '
    f'({config.iterations} iterations of {config.meta_batch} episodes) nor the '
    f'{validation} of validation contain. Intervals are 1.96 standard errors '
    'over episodes, for the mean of '
    f'{config.seeds} seed(s); differences are paired by episode. Every row '
    f'chose among {len(config.rate_factors)} factors on its inner rates x '
    f'{len(config.test_steps)} numbers of steps on '
    f'{config.validation_episodes} validation episodes; the curves keep the '
    'chosen factor. Trained parameters are those of the inner loop.'
  )


def run(config: Config, context: Context) -> dict:
  """Prints the table and writes the picture."""
  shown, outcome = panel(config, context)
  print(terminal_table(shown))
  (context.workdir / 'panel_b.png').write_bytes(shown.figure.png)
  return outcome
