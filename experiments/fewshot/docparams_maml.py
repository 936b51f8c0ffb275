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

import fmeta
from experiments.common import Seeds, require, trial
from experiments.fewshot import intent_table, text_table, text_task
from experiments.fewshot.intent_methods import LEAST
from experiments.fewshot.names import SPLITS, open_bench
from experiments.fewshot.text_family import Family, choose_and_test, cost_of
from experiments.fewshot.text_table import REFERENCE
from experiments.fewshot.text_task import Bench
from fmeta import optim
from fmeta.pretrained import MINILM
from fmeta.report import Panel, curves, terminal_table
from fmeta.workdir import Context


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


def families_of(bench: Bench) -> dict[bool, Family]:
  """Inner learners; True: the head alone."""
  config = bench.config
  rates = (('head/.*', config.head_rate), ('.*', config.norm_rate))
  patterns = (config.adapted, 'head/.*')
  return {
    alone: Family(bench, fmeta.select(*patterns[alone:]), rates)
    for alone in (False, True)
  }


def meta_train(family: Family, method: str, seed: int, **options):
  """Fits the outer learner; returns what `fit` does."""
  bench, config = family.bench, family.bench.config
  how = fmeta.gradients.plain
  if method == 'FOMAML':
    how = fmeta.first_order()
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
  loss, whole = family.loss(how), method == 'Reptile'
  if whole:
    loss = fmeta.reptile_loss(family.inner(how), config.inner_steps)
    optimizer = optim.sgd(config.reptile_lr)
  learner = fmeta.finetune(loss, optimizer, tuning=moves)
  key = jax.random.key(config.seed.init + seed)
  state = learner.init(family.start(seed), key)
  return bench.meta_fit(method, learner, state, seed, whole=whole, **options)


def result_of(family: Family, method: str, seed: int) -> dict:
  """Trains, chooses on validation, tests: one trial."""
  params, cost = family.start(seed), {}
  if method != 'fine-tuning':
    fitted = meta_train(family, method, seed)
    params, cost = fitted.params, cost_of(fitted)
  return {**cost, **choose_and_test(family, family.bench, params)}


def run_methods(bench: Bench) -> dict[str, list[dict]]:
  """Method -> a result per seed; prints each grid."""
  config = bench.config
  require(config, LEAST)
  possible = Config.methods
  for name in config.methods:
    if name not in possible:
      raise fmeta.UsageError(
        f'no method {name!r}; possible: {", ".join(possible)}'
      )
  families, results = families_of(bench), {}
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
    text_table.show_grid(name, results[name][0])
  return results


def panel(config: Config, context: Context) -> tuple[Panel, dict]:
  """Runs every row and returns the panel and its numbers."""
  bench = open_bench(config, context)
  reference = text_task.nearest_mean(bench)
  table = text_table.compare(
    'fewshot',
    run_methods(bench),
    reference,
    config.test_steps,
    ('fine-tuning',),
  )
  shown = Panel(
    'Few-shot adaptation',
    'How fast does it adapt from a few examples?',
    table.rows,
    note_of(bench),
    curves(table.lines, xlabel='inner steps'),
    reference=REFERENCE,
    total=bench.total,
  )
  tested_on = intent_table.episodes_of(config)
  return shown, text_table.outcome_of(table, bench, tested_on)


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
