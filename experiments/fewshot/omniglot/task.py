"""Omniglot's training and testing as all methods share them.

The protocol of Finn et al. 2017 (https://arxiv.org/abs/1703.03400, section 5.2
and their code): 1,200 characters of all 1,623 to train, 100 of them for
validation, rotations by 90 degrees as new classes. Tested on 600 episodes of
the 423 characters that are left (turned in their code, upright here).

Which characters those are: `splits`. What is normalised by what, and what
accuracies are reported: `measure`.
"""

import dataclasses
from typing import Any

import jax
import numpy as np
import optax

import fmeta
from experiments.common import (
  Seeds,
  data_devices,
  fit_options,
  in_turn,
  require,
)
from experiments.fewshot.omniglot import measure, splits, testing, weights
from experiments.fewshot.omniglot.testing import Method
from fmeta import episodes, evaluate, optim, train
from fmeta.datasets import omniglot
from fmeta.models import IMAGE, Conv4, computing_in, forward, init
from fmeta.scores import Scores
from fmeta.workdir import Context

NORMS = 'transductive', 'group'
# The smallest value of each setting of this and of the methods' own.
LEAST = {
  **dict.fromkeys(('shots', 'filters', 'meta_batch', 'iterations'), 1),
  **dict.fromkeys(('steps_per_dispatch', 'train_shots', 'inner_batch'), 1),
  **dict.fromkeys(('batch_size', 'latents', 'hidden'), 1),
  **dict.fromkeys(('queries', 'test_queries', 'chunk', 'evaluate_every'), 0),
  **dict.fromkeys(('curve_steps', 'statistics_batches', 'inner_steps'), 0),
  **dict.fromkeys(('test_steps', 'latent_steps', 'head_steps', 'crop'), 0),
  **dict.fromkeys(('train_ways', 'kl', 'damping', 'multi_step'), 0),
  'ways': 2,
}
POSITIVE = (
  *('outer_lr', 'final_lr', 'inner_lr', 'test_lr'),
  *('scale', 'strength', 'clip_norm'),
)
COST = 'steps', 'examples_per_second', 'flops_per_step', 'peak_bytes'


@dataclasses.dataclass
class Task:
  """What one would sweep whatever the method; defaults as in the protocol."""

  seed: Seeds = dataclasses.field(default_factory=Seeds)
  split: str = 'random'  # or 'alphabets', see `splits`
  split_seed: int = 0
  train_characters: int = 1100  # what is left is tested on
  validation_characters: int = 100
  ways: int = 5
  shots: int = 1
  queries: int = 0  # to train with; 0: as many as shots
  filters: int = 64
  norm: str = 'transductive'  # or 'group', where no image sees another
  precision: str = 'float32'  # or 'tf32', 'bfloat16', see `computing_in`
  meta_batch: int = 32  # tasks per outer step
  chunk: int = 0  # tasks at a time and device, 0: all
  outer_lr: float = 1e-3
  final_lr: float = 1.0  # over the first; below 1: half a cosine down to it
  iterations: int = 3000  # outer steps; the paper's 60,000 take hours on CPU
  steps_per_dispatch: int = 10
  # Images stay on the device and a dispatch sends row numbers.
  resident: bool = False
  evaluate_every: int = 1000  # outer steps; a checkpoint is written, too
  validation_episodes: int = 100  # a multiple of ten, like all of these
  test_episodes: int = 600
  # Of each class; 0: as many as shots, as the paper has it. With
  # 'transductive' norms it is part of the method: what is normalised together.
  test_queries: int = 0
  curve_steps: int = 10  # of the picture of accuracy by inner steps
  curve_shots: tuple[int, ...] = (1, 2, 5, 10)  # of that by shots
  curve_episodes: int = 200
  # Training meta-batches whose statistics norms get in testing; 0: none.
  statistics_batches: int = 10
  # A run's folder: what it has trained is tested, and nothing is trained.
  weights: str = ''


SMALL = {
  'train_characters': 30,
  'validation_characters': 10,
  'filters': 8,
  'meta_batch': 2,
  'iterations': 4,
  'steps_per_dispatch': 2,
  'evaluate_every': 2,
  'validation_episodes': 10,
  'test_episodes': 20,
  'curve_shots': (),
  'statistics_batches': 0,
}


def network(config: Task, num_classes: int | None) -> Conv4:
  """The model in training; None: without a head.

  Every method begins here, so this is where settings are looked at.

  Raises:
    UsageError: if a setting is out of range, or the norm is none for training
      from nothing.
  """
  require(config, LEAST, POSITIVE)
  if getattr(config, 'train_ways', 0) == 1:
    raise fmeta.UsageError(
      'config.train_ways is 1, and one class is always right; give at least 2, '
      'or 0 for as many as in testing'
    )
  if config.norm not in NORMS:
    raise fmeta.UsageError(
      f'norm {config.norm!r} is not trained here; choose one of {NORMS}'
    )
  return Conv4(num_classes, config.filters, config.norm)


def model(
  config: Task,
  num_classes: int | None,
  model_of: measure.ModelOf = measure.same,
) -> fmeta.Forward:
  """`network` as a function, wrapped, in the precision of the config."""
  plain = forward(network(config, num_classes), IMAGE)
  return computing_in(model_of(plain), config.precision)


def start(config: Task, num_classes: int | None) -> Any:
  """Fresh parameters; None: without a head."""
  side = (1, omniglot.SIDE, omniglot.SIDE, 1)
  return init(
    network(config, num_classes),
    jax.random.key(config.seed.init),
    {'image': np.zeros(side, np.float32)},
    IMAGE,
  )[0]


def outer_rate(config: Task) -> float | optax.Schedule:
  """Of the outer optimiser: constant, or falling along a cosine."""
  if config.final_lr == 1:
    return config.outer_lr
  return optim.warmup_cosine(
    config.outer_lr, config.iterations, warmup=0.0, final=config.final_lr
  )


def meta_learner(
  config: Task,
  context: Context,
  loss: fmeta.LossFn,
  optimizer: optax.GradientTransformation | None = None,
) -> fmeta.Learner:
  """Minimises a loss of episodes; by default with Adam at the config's rate."""
  return fmeta.finetune(
    loss,
    optimizer or optim.adam(outer_rate(config)),
    value_and_grad=in_turn(
      config.meta_batch, config.chunk, data_devices(context)
    ),
  )


def run(
  config: Task,
  context: Context,
  method: Method,
  parts: dict[str, dict] | None = None,
) -> dict:
  """Trains, then tests; or tests what another run has trained.

  Args:
    config: the method's.
    context: of the job.
    method: what learns and answers.
    parts: what `splits.load` gave, if the method had to look.
  """
  parts = splits.load(config, context) if parts is None else parts
  source = training_episodes(config, method, parts['train'])
  lists = testing.lists_of(config, parts)  # now, to refuse what cannot be
  data_sha256 = splits.sha256(parts)
  facts = {'data_sha256': data_sha256, 'norm': config.norm}
  if config.weights:
    folder = context.workdir
    params = weights.load(config.weights, method.params, folder, facts)
    cost = dict.fromkeys(COST) | {'steps': 0, 'examples_per_second': 0.0}
  else:
    fitted = fit(config, context, method, source, lists.validation)
    params, cost = fitted.params, {key: getattr(fitted, key) for key in COST}
    weights.save(context.workdir, params, facts)
  found = testing.test(config, context, method, params, lists, source)
  tested = {
    name: evaluate.summarize(right) for name, right in found.right.items()
  }
  return {
    'metrics': {
      **{name: summary.mean for name, summary in tested.items()},
      **found.calibration,
      'episodes': config.test_episodes,
    },
    'ci95': {name: summary.ci95 for name, summary in tested.items()},
    **cost,
    'trainable_parameters': fmeta.tree.size(params),
    'total_parameters': fmeta.tree.size(params),
    'data_sha256': data_sha256,
    'scores': {
      name: Scores(right, f'{data_sha256}, {found.lists[name]}')
      for name, right in found.right.items()
    },
  }


def training_episodes(
  config: Task, method: Method, columns: dict
) -> episodes.Episodes:
  """What a method learns from."""
  return episodes.episodes(
    columns,
    method.train_ways or config.ways,
    method.train_shots or config.shots,
    config.queries or config.shots,
    config.seed.data,
    tasks=config.meta_batch,
  )


def images(source: episodes.Episodes) -> dict[str, np.ndarray]:
  """What an episode takes from its columns: labels are its own."""
  return {'image': source.columns['image']}


def fit(config, context, method, source, validation):
  """Meta-trains, and prints the accuracy on validation characters."""

  def validate(params, model_state):
    del model_state
    right = evaluate.evaluate_episodes(
      method.predict,
      params,
      validation,
      config.validation_episodes,
    )
    return {'accuracy': float(right.mean())}

  options = fit_options(context)
  batches = source
  if config.resident:
    options['program'] = train.Resident(
      method.learner, images(source), options.get('mesh')
    )
    batches = source.by_row
  fitted = train.fit(
    method.learner,
    method.learner.init(method.params, jax.random.key(config.seed.init)),
    [train.Stage('meta', method.source(batches), config.iterations)],
    jax.random.key(config.seed.train),
    evaluate=validate,
    evaluate_every=config.evaluate_every,
    checkpoint_every=config.evaluate_every,
    steps_per_dispatch=config.steps_per_dispatch,
    log_every=10,
    **options,
  )
  for record in fitted.evaluations:
    value = record['evaluation']['accuracy']
    print(
      f'step {record["step"]}: validation accuracy ({config.norm}) {value:.3f}'
      f' ({config.validation_episodes} episodes)'
    )
  return fitted
