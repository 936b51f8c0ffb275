"""How fast does it adapt from a few examples? MAML and its relatives.

  python -m experiments.run --config=experiments/fewshot/docparams_maml.py

Which parameter does a description describe? An episode has five parameter
names, one description of each to learn from and five of each to answer for.
Names with 20 descriptions or more are split 60/15/25 by the sha256 of the
name, so test names were never seen.

All but the last block of MiniLM is frozen and run once per text. An inner step
moves low-rank factors in that block and a zero head on unit-length embeddings;
the outer loop moves the block, the factors and the head. Every row is that one
inner learner:

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
import hashlib
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

import fmeta
from experiments import minilm
from experiments.common import Seeds, best_setting, placement, trial
from fmeta import (
  baselines,
  data,
  episodes,
  evaluate,
  metrics,
  optim,
  train,
  tree,
)
from fmeta.datasets import docparams
from fmeta.models import BertClassifier, forward
from fmeta.pretrained import MINILM
from fmeta.report import Line, Panel, Row, curves, terminal_table
from fmeta.workdir import Context

REFERENCE = 'nearest class mean'
SPLITS = {'train': 0.6, 'validation': 0.75, 'test': 1.0}  # upper ends
# Seeds of the fixed lists of tasks; no sweep touches them.
LISTS = {'validation': 1001, 'test': 1002}


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
  adapted: str = r'body/layer_\d+/mlp/.*kernel'
  lora_rank: int = 4
  iterations: int = 60
  meta_batch: int = 4
  inner_steps: int = 3
  # The head's is large because embeddings have unit length.
  head_rate: float = 50.0
  lora_rate: float = 1.0
  outer_lr: float = 1e-4
  reptile_lr: float = 0.5
  # Logarithms of rates, against weights of a pre-trained block.
  rate_multiplier: float = 100.0
  rate_factors: tuple[float, ...] = (0.3, 1.0, 3.0)
  test_steps: tuple[int, ...] = (1, 3, 5)
  tasks: int = 10
  validation_episodes: int = 60
  test_episodes: int = 600
  steps_per_dispatch: int = 5


SMALL = {
  'methods': ('fine-tuning', 'Reptile', 'Meta-SGD', 'ANIL'),
  'iterations': 2,
  'meta_batch': 2,
  'inner_steps': 1,
  'rate_factors': (1.0,),
  'test_steps': (1, 2),
  'steps_per_dispatch': 1,
  'validation_episodes': 10,
  'test_episodes': 20,
}


def split_of(name: str) -> str:
  """60 / 15 / 25 by the first 32 bits of the name's sha256."""
  place = int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) / 2**32
  return next(split for split, end in SPLITS.items() if place < end)


class Bench:
  """Cached states, classes by split and the pre-trained start."""

  def __init__(self, config: Config, context: Context):
    self.config, self.context = config, context
    splits = docparams.load(subset=False)
    columns = {
      key: np.concatenate([splits[name][key] for name in splits])
      for key in ('text', 'name')
    }
    names = docparams.few_shot_names(columns['name'], config.min_examples)
    self.texts = data.take(columns, np.isin(columns['name'].astype(str), names))
    self.classes = {
      split: [name for name in names if split_of(name) == split]
      for split in SPLITS
    }
    module, params, tokenizer = minilm.load_model(
      config.model, config.ways, config.seed.init
    )
    first = module.config.num_layers - config.blocks
    encoded = minilm.encode(tokenizer, self.texts, config.max_length)
    cached = minilm.with_prefix(module, params, encoded, first)
    width = np.arange(config.max_length)[None]
    self.columns = {
      'name': cached['name'].astype(str),
      'hidden': cached['hidden'],
      'attention_mask': (width < cached['length'][:, None]).astype(np.int32),
    }
    self.total = tree.size(params)
    self.run = forward(
      BertClassifier(module.config),
      minilm.HIDDEN,
      method='resume',
      first_layer=first,
    )
    moving = {f'layer_{k}' for k in range(first, module.config.num_layers)}
    self.start = {
      'body': {k: v for k, v in params['body'].items() if k in moving},
      # Zero: classes come in random order, so no start can prefer one.
      'head': jax.tree.map(jnp.zeros_like, params['head']),
    }
    self.loss = fmeta.supervised(self.classify, fmeta.softmax_cross_entropy)

  def embed(self, params, batch):
    """Embeddings [B, H], raw length; without dropout, supports are tiny."""
    return self.run({'body': params['body']}, {}, batch, None)[0]

  def classify(self, params, model_state, batch, rng):
    """The head on unit-length embeddings: a `Forward`."""
    del rng
    vectors = baselines.unit_length(self.embed(params, batch))
    head = params['head']
    return vectors @ head['kernel'] + head['bias'][None], model_state

  def train_tasks(self, seed: int, whole: bool) -> Callable[[int], dict]:
    """Meta-batches of training names; `whole`: all texts are support."""
    config = self.config
    shots, queries = config.shots, config.queries
    if whole:
      shots, queries = shots + queries - 1, 1
    return episodes.episodes(
      self.columns,
      config.ways,
      shots,
      queries,
      config.seed.data + seed,
      tasks=config.meta_batch,
      classes=self.classes['train'],
      key='name',
    )

  def held_out(self, split: str) -> episodes.EpisodeList:
    """The fixed list of episodes of a split."""
    config = self.config
    return episodes.evaluation_episodes(
      self.columns,
      config.ways,
      config.shots,
      config.queries,
      LISTS[split],
      getattr(config, f'{split}_episodes'),
      tasks=config.tasks,
      classes=self.classes[split],
      key='name',
    )


class Family:
  """One inner learner and the program that tests it, for several rows.

  Outer parameters are `{'model', 'hyper'}`; `hyper` holds the logarithm of
  each moving leaf's inner rate, so rows with given and with learned rates
  share everything, and test-time rates are an argument.
  """

  def __init__(self, bench: Bench, head_only: bool):
    self.bench, self.head_only = bench, head_only
    config = bench.config
    self.tuning = fmeta.select('head/.*')
    if not head_only:
      self.tuning = fmeta.lora(
        config.adapted, rank=config.lora_rank, also=('head/.*',)
      )
    self.predict = jax.jit(self._curve)

  def start(self, seed: int) -> dict:
    """Outer parameters before meta-training."""
    config, model = self.bench.config, self.bench.start
    key = jax.random.key(config.seed.init + seed)
    if not self.head_only:
      model = fmeta.lora_init(model, key, (config.adapted,), config.lora_rank)
    moving, _ = self.tuning.init(model, key)

    def log_rate(name, leaf):
      del leaf
      head = name.startswith('head/')
      return jnp.log(config.head_rate if head else config.lora_rate)

    return {'model': model, 'hyper': tree.map_with_name(log_rate, moving)}

  def inner(self, value_and_grad=fmeta.gradients.plain):
    """`hyper -> learner`: SGD with a rate per leaf."""

    def learner(hyper):
      rates = [
        (re.escape(name), jnp.exp(tree.get(hyper, name)))
        for name in tree.names(hyper)
      ]
      return fmeta.finetune(
        self.bench.loss,
        optim.sgd(1.0, multipliers=rates),
        tuning=self.tuning,
        value_and_grad=value_and_grad,
      )

    return learner

  def _curve(self, params, batch):
    """Query logits [tasks, steps, queries, ways] after each of `test_steps`."""
    learner = self.inner()(params['hyper'])
    steps = self.bench.config.test_steps

    def one(episode):
      key = jax.random.key(0)
      state, outputs = learner.init(params['model'], key), []
      for more in np.diff((0, *steps)):
        state, _ = fmeta.adapt(
          learner, state, lambda _: episode['support'], key, num_steps=int(more)
        )
        with learner.using(state) as adapted:
          outputs.append(
            self.bench.classify(adapted, {}, episode['query'], None)[0]
          )
      return jnp.stack(outputs)

    return jax.vmap(one)(batch)

  def accuracies(self, params, split: str, factor: float) -> np.ndarray:
    """Accuracy [episodes, steps] with the inner rates times `factor`."""
    shift = jnp.log(factor)
    hyper = jax.tree.map(lambda rate: rate + shift, params['hyper'])
    params, rights = {**params, 'hyper': hyper}, []
    for batch in self.bench.held_out(split):
      predicted = np.asarray(self.predict(params, batch)).argmax(-1)
      rights.append((predicted == batch['query']['label'][:, None]).mean(-1))
    return np.concatenate(rights)


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
