"""A text data set and MiniLM: what the fine-tuning tables share.

A row of such a table is a list of phases, rates and a schedule; everything
else (splits, batches, evaluation, the choice of a rate on the validation
split) is here and the same for all.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

import fmeta
from experiments import minilm
from experiments.common import Seeds, best_setting, placement, trial
from fmeta import data, evaluate, models, optim, train, tree
from fmeta.workdir import Context

Columns = dict[str, np.ndarray]


class Recipe(NamedTuple):
  """One row: what moves, how it moves and for how long.

  Attributes:
    phases: `steps -> phases`, whose lengths sum to `steps`.
    schedule: `(rate, steps) -> schedule`.
    multipliers: ordered `(pattern, multiplier)` rates.
    rates: the grid.
    epochs: passes over the training split.
    start: `(params, key) -> params` before training.
  """

  phases: Callable[[int], Sequence[fmeta.Phase]]
  schedule: Callable[[Any, Any], optax.Schedule]
  multipliers: tree.Patterns
  rates: tuple[float, ...]
  epochs: int
  start: Callable[[Any, jax.Array], Any] = lambda params, key: params


@dataclasses.dataclass
class TextTask:
  """Encoded splits, the model and where results go."""

  splits: dict[str, Columns]
  classes: int
  model: str
  batch_size: int
  seed: Seeds
  context: Context
  forward: fmeta.Forward
  # By identity of the recipe, which is kept so that its id is not reused.
  programs: dict[int, tuple[Recipe, list[train.Program]]] = dataclasses.field(
    default_factory=dict
  )

  def fit(
    self, recipe: Recipe, columns: Columns, rate: float, seed: int
  ) -> train.Fitted:
    """Trains once for a fixed length."""
    batches = minilm.train_batches(
      columns, self.batch_size, self.seed.data + seed
    )
    steps = batches.steps_per_epoch * recipe.epochs
    key = jax.random.key(self.seed.init + seed)
    _, params, _ = minilm.load_model(
      self.model, self.classes, self.seed.init + seed
    )
    phases = recipe.phases(steps)
    programs = self._programs(recipe, phases)
    learners = iter([program.learner for program in programs])
    phased = train.Phased(phases, lambda tuning: next(learners))
    first = phased.learners[0]
    state = first.init(recipe.start(params, key), key)
    return train.fit(
      first,
      optim.set_hyper(state, rate=rate, num_steps=float(steps)),
      phased.stages('train', batches),
      jax.random.key(self.seed.train + seed),
      log_every=20,
      program=programs,
      **placement(self.context),
    )

  def _programs(
    self, recipe: Recipe, phases: Sequence[fmeta.Phase]
  ) -> list[train.Program]:
    """One program per phase, shared by all rates, seeds and lengths."""
    if id(recipe) not in self.programs:
      loss = fmeta.supervised(self.forward, fmeta.softmax_cross_entropy)

      def adamw(rate, num_steps):
        return fmeta.adamw_per_leaf(
          recipe.schedule(rate, num_steps), multipliers=recipe.multipliers
        )

      # Rate and length live in the state.
      optimizer = optax.inject_hyperparams(adamw)(rate=0.0, num_steps=1.0)
      made = [
        train.Program(fmeta.finetune(loss, optimizer, tuning=phase.tuning))
        for phase in phases
      ]
      self.programs[id(recipe)] = recipe, made
    return self.programs[id(recipe)][1]

  def correct(self, params: Any, split: str) -> np.ndarray:
    """Which texts of a split the model gets right, in their order."""
    columns = self.splits[split]
    order = np.argsort(columns['length'], kind='stable')
    batches = minilm.eval_batches(data.take(columns, order))
    predicted = evaluate.evaluate(self.forward, params, {}, batches)
    right = np.zeros(len(order), bool)
    right[order] = predicted.correct
    return right

  def choose(self, name: str, recipe: Recipe, columns: Columns) -> float:
    """The rate with the best validation accuracy, trained on `columns`."""
    tried = {}
    for rate in recipe.rates:

      def run(rate=rate):
        fitted = self.fit(recipe, columns, rate, 0)
        return {
          'value': float(self.correct(fitted.params, 'validation').mean())
        }

      made = trial(self.context, f'{name}/rate_{rate:g}', run)
      tried[f'{rate:g}'] = made['value']
    print(f'{name}: validation accuracy by rate {tried}', flush=True)
    return float(best_setting(tried))

  def final(
    self, name: str, recipe: Recipe, columns: Columns, rate: float, seed: int
  ) -> dict:
    """One run on `columns`: test correctness and cost."""

    def run():
      fitted = self.fit(recipe, columns, rate, seed)
      return {
        'correct': self.correct(fitted.params, 'test').tolist(),
        'steps': fitted.steps,
        'examples_per_second': fitted.examples_per_second,
        'flops_per_step': fitted.flops_per_step,
        'peak_bytes': fitted.peak_bytes,
        'trainable': tree.size(fitted.state.trainable),
      }

    return trial(self.context, f'{name}/seed_{seed}', run)


def open_task(
  config: Any, context: Context, splits: dict[str, Columns], classes: int
) -> TextTask:
  """Loads the model and encodes the splits.

  Args:
    config: has `model`, `max_length`, `batch_size` and `seed`.
    context: of the run.
    splits: 'train', 'validation' and 'test' with `text` and `label`.
    classes: of the labels.
  """
  module, _, tokenizer = minilm.load_model(config.model, classes, 0)
  encoded = {}
  for name, columns in splits.items():
    data.check_labels(columns['label'], classes)
    encoded[name] = minilm.encode(tokenizer, columns, config.max_length)
  return TextTask(
    encoded,
    classes,
    config.model,
    config.batch_size,
    config.seed,
    context,
    models.forward(module),
  )


def hold_out(
  columns: Columns, count: int, seed: int
) -> tuple[Columns, Columns]:
  """(rest, `count` rows drawn at random from `columns`)."""
  order = np.random.default_rng(seed).permutation(len(columns['label']))
  if not 0 < count < len(order):
    raise fmeta.UsageError(
      f'{count} validation examples of {len(order)}; give 1 to {len(order) - 1}'
    )
  return data.take(columns, order[count:]), data.take(columns, order[:count])
