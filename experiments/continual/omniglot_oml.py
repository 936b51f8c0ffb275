"""Can a representation be learned that an online head does not forget on?

  python -m experiments.run --config=experiments/continual/omniglot_oml.py \\
    --data_dir=DIR

N characters that training never saw come one after the other, 15 drawings
each, one drawing per step, one pass; then 5 other drawings of each of the N
are to be told apart. The body is still, a linear head that starts at zero
learns by gradient descent. What differs is where the body is from:

- random: fresh weights;
- pre-trained: plain classification of all training characters at once, the
  same network trained jointly;
- OML: the pre-trained network, then trained through streams (Javed & White
  2019, https://arxiv.org/abs/1905.12588, with a larger network and larger
  images: their numbers are others);
- pre-trained longer: OML's start, with as many more images by plain
  classification as OML has seen.

Each body also gives the nearest class mean, which forgets nothing, and the
same head on the same drawings in random order. Rates of the head are chosen for
each body, order and N on streams of validation characters, whose accuracy at
every rate is among the metrics: the smaller the rate, the less the order
matters and the less is learned. Measured:
experiments/README.md.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import fmeta
from experiments.common import Seeds, fit_options, require
from experiments.continual import online_streams as streams
from experiments.fewshot.omniglot import splits
from fmeta import data, evaluate, metrics, models, optim, train
from fmeta.continual import meta
from fmeta.datasets import omniglot
from fmeta.report import Line, curves
from fmeta.scores import Scores
from fmeta.workdir import Context

BODIES = 'random', 'pre-trained', 'pre-trained longer', 'OML'
ORDERS = {'one by one': False, 'shuffled': True}
MEAN = 'nearest mean'
# The smallest values that mean something.
LEAST = dict.fromkeys(
  (
    'train_characters',
    'validation_characters',
    'filters',
    'width',
    'batch_size',
    'pretrain_iterations',
    'stream_classes',
    'stream_shots',
    'meta_batch',
    'meta_iterations',
    'classes',
    'shots',
    'asked',
    'draws',
    'validation_draws',
  ),
  1,
) | {'remember': 0}
POSITIVE = 'rate', 'inner_lr', 'outer_lr', 'rates'


@dataclasses.dataclass
class Config:
  """What one would sweep; untuned where nothing else is said."""

  seed: Seeds = dataclasses.field(default_factory=Seeds)
  split: str = 'random'  # or 'alphabets', see the few-shot experiments
  split_seed: int = 0
  train_characters: int = 1000
  validation_characters: int = 200
  filters: int = 64
  width: int = 256
  # Plain classification.
  batch_size: int = 64
  rate: float = 1e-3
  pretrain_iterations: int = 1500
  # Streams to train on.
  stream_classes: int = 1
  stream_shots: int = 15
  remember: int = 64
  inner_lr: float = 0.03
  meta_batch: int = 1
  outer_lr: float = 1e-4
  meta_iterations: int = 1500
  # Streams to test on.
  classes: tuple[int, ...] = (10, 50, 100, 200)
  shots: int = 15
  asked: int = 5
  draws: int = 10
  validation_draws: int = 3
  # Down to where rate does not matter: a head that has hardly moved from zero
  # is a sum over the drawings, in whatever order they came.
  rates: tuple[float, ...] = (1e-6, 1e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 1e-1)

  @property
  def ways(self) -> int:
    """Of the longest stream."""
    return max(self.classes)


SMALL = {
  'train_characters': 30,
  'validation_characters': 10,
  'filters': 8,
  'width': 16,
  'batch_size': 8,
  'pretrain_iterations': 2,
  'stream_shots': 3,
  'remember': 4,
  'meta_iterations': 2,
  'classes': (2, 5),
  'shots': 2,
  'asked': 2,
  'draws': 10,
  'validation_draws': 2,
  'rates': (1e-2, 1e-1),
}


class Bench:
  """Network, data and the two ways to train."""

  def __init__(self, config: Config, context: Context):
    self.config, self.context = config, context
    parts = splits.load(config, context, turned=False)
    self.parts = {k: streams.numbered(part) for k, part in parts.items()}
    self.data_sha256 = splits.sha256(parts)
    encoder = streams.Encoder(config.filters, config.width)
    self.embed = streams.embedding(encoder)
    self.start = self._fresh(encoder)
    self.fits: dict[str, train.Fitted] = {}

  def _fresh(self, encoder) -> dict:
    key = jax.random.key(self.config.seed.init)
    side = (1, omniglot.SIDE, omniglot.SIDE, 1)
    image = {'image': np.zeros(side, np.float32)}
    body, _ = models.init(encoder, key, image, models.IMAGE)
    classes = int(self.parts['train']['label'].max()) + 1
    kernel = jax.nn.initializers.he_normal()(
      jax.random.fold_in(key, 1), (self.config.width, classes)
    )
    head = {'kernel': kernel, 'bias': jnp.zeros(classes)}
    return {'body': body, 'head': head}

  def fit(self, name, learner, params, batches, steps) -> Any:
    """Trains once; a resumed job goes on."""
    options = fit_options(self.context)
    options['workdir'] = options['workdir'] / name
    seed = self.config.seed
    fitted = train.fit(
      learner,
      learner.init(params, jax.random.key(seed.init)),
      [train.Stage(name, batches, steps)],
      jax.random.key(seed.train),
      steps_per_dispatch=min(20, steps),
      checkpoint_every=max(steps // 5, 1),
      log_every=100,
      **options,
    )
    self.fits[name] = fitted
    return fitted.params

  def classify(self, name: str, params: Any, steps: int, seed: int) -> Any:
    """Plain classification of all training characters."""
    config = self.config
    loss = fmeta.supervised(
      streams.classifier(self.embed), fmeta.softmax_cross_entropy
    )
    learner = fmeta.finetune(loss, optim.adam(config.rate))
    batches = data.batches(self.parts['train'], config.batch_size, seed)
    return self.fit(name, learner, params, batches, steps)

  def learn_streams(self, params: Any) -> Any:
    """OML; the slow network reads every image once."""
    config = self.config
    rows = config.stream_classes * config.stream_shots
    start = meta.fresh_classes(jax.nn.initializers.zeros)
    loss = meta.oml_loss(streams.HEAD_LOSS, config.inner_lr, rows, start=start)
    learner = fmeta.finetune(
      meta.on_features(self.embed, loss), optim.adam(config.outer_lr)
    )
    source = streams.TrainingStreams(
      self.parts['train'],
      config.stream_classes,
      config.stream_shots,
      config.remember,
      config.meta_batch,
      config.seed.data,
    )
    return self.fit('OML', learner, params, source, config.meta_iterations)

  def bodies(self) -> dict[str, Any]:
    """Name -> parameters."""
    config = self.config
    joint = self.classify(
      'pre-trained', self.start, config.pretrain_iterations, config.seed.data
    )
    rows = config.stream_classes * config.stream_shots
    seen = config.meta_iterations * config.meta_batch
    more = -(-seen * (2 * rows + config.remember) // config.batch_size)
    longer = self.classify(
      'pre-trained longer', joint, more, config.seed.data + 1
    )
    trained = self.learn_streams(joint)
    return dict(zip(BODIES, (self.start, joint, longer, trained), strict=True))

  def trials(self, split: str, classes: int, shuffled: bool) -> streams.Trials:
    """What is learned online, of validation or test characters."""
    config = self.config
    draws = config.draws if split == 'test' else config.validation_draws
    return streams.test_streams(
      self.parts[split],
      classes,
      config.shots,
      config.asked,
      draws,
      0,
      shuffled=shuffled,
    )


def online(
  bench: Bench, known: dict[str, np.ndarray], classes: int, shuffled: bool
) -> tuple[np.ndarray, dict[float, float]]:
  """Test accuracy [draws] at the best rate, and validation's by rate."""
  trials = bench.trials('validation', classes, shuffled)
  tried = {
    rate: float(
      streams.online_accuracy(trials, known['validation'], rate).mean()
    )
    for rate in bench.config.rates
  }
  rate = max(tried, key=lambda rate: tried[rate])
  test = bench.trials('test', classes, shuffled)
  return streams.online_accuracy(test, known['test'], rate), tried


def tested(
  bench: Bench, name: str, params: Any
) -> tuple[dict[str, np.ndarray], dict[str, float]]:
  """`<body>, <how>, <N>` -> test accuracy [draws]; validation's by rate."""
  known = {
    split: streams.features(bench.embed, params, bench.parts[split])
    for split in ('validation', 'test')
  }
  found, by_rate = {}, {}
  for classes in bench.config.classes:
    for order, shuffled in ORDERS.items():
      row = f'{name}, {order}, {classes}'
      found[row], tried = online(bench, known, classes, shuffled)
      by_rate |= {f'{row}, validation at {r:g}': v for r, v in tried.items()}
      said = ', '.join(f'{r:g}: {100 * v:.1f}' for r, v in tried.items())
      print(f'{row}: {100 * found[row].mean():.1f} % (validation {said})')
    row = f'{name}, {MEAN}, {classes}'
    trials = bench.trials('test', classes, False)
    found[row] = streams.nearest_mean_accuracy(trials, known['test'])
    print(f'{row}: {100 * found[row].mean():.1f} %', flush=True)
  return found, by_rate


def draw_picture(config: Config, found: dict[str, np.ndarray]) -> bytes:
  """Accuracy one by one over N."""
  places = sorted(config.classes)
  lines = []
  for name in BODIES:
    rows = [found[f'{name}, one by one, {n}'] for n in places]
    mean, ci95, _ = zip(*map(evaluate.summarize, rows), strict=True)
    lines.append(Line(name, places, mean, ci95, baseline=name == 'random'))
  return curves(lines, xlabel='classes learned one by one, one pass').png


def check(config: Config) -> None:
  """Raises `UsageError` for what means nothing, before data are read."""
  require(config, LEAST, POSITIVE)
  for name in ('classes', 'rates'):
    if not getattr(config, name):
      raise fmeta.UsageError(f'config.{name} is empty; give at least one')


def run(config: Config, context: Context) -> dict:
  """Trains the bodies, tests each."""
  check(config)
  bench = Bench(config, context)
  for split in ('validation', 'test'):  # refuses what cannot be, now
    bench.trials(split, config.ways, False)
  found, by_rate = {}, {}
  for name, params in bench.bodies().items():
    accuracies, tried = tested(bench, name, params)
    found, by_rate = found | accuracies, by_rate | tried
  for n in config.classes:
    ours, other = (f'{k}, one by one, {n}' for k in ('OML', BODIES[2]))
    gap = metrics.paired_bootstrap(found[ours], found[other])
    print(
      f'{n} classes one by one, OML minus pre-trained longer: '
      f'{100 * gap.mean:+.1f} [{100 * gap.low:+.1f}, {100 * gap.high:+.1f}]'
    )
  (context.workdir / 'classes.png').write_bytes(draw_picture(config, found))
  means = {key: evaluate.summarize(values) for key, values in found.items()}
  fitted = bench.fits['OML']
  size = fmeta.tree.size(bench.start)
  listed = f'{bench.data_sha256}, {config.shots} shots, {config.asked} asked'
  return {
    'metrics': {key: one.mean for key, one in means.items()} | by_rate,
    'ci95': {key: one.ci95 for key, one in means.items()},
    'steps': sum(fit.steps for fit in bench.fits.values()),
    'examples_per_second': fitted.examples_per_second,
    'flops_per_step': fitted.flops_per_step,
    'trainable_parameters': size,
    'total_parameters': size,
    'data_sha256': bench.data_sha256,
    'scores': {
      key: Scores(values, f'{listed}, {key.rpartition(", ")[2]} classes')
      for key, values in found.items()
    },
  }
