"""Rows without a gradient: sums over what a frozen net gives.

- nearest class mean by cosine;
- SLDA (Hayes & Kanan 2020, https://arxiv.org/abs/1909.01520);
- RanPAC (McDonnell et al. 2023, https://arxiv.org/abs/2307.02251) with its
  strength chosen on held-out rows of the first task.

Their tasks have the columns `feature` [N, dim] and `label`. They are measured
in the order of a seed, as rows that train are.
"""

import dataclasses
from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import fmeta
from experiments.common import trial
from experiments.continual import rows, settings
from experiments.continual.bench import Labelled, Scenario, by_label
from experiments.continual.measured import Measured, standard_error
from fmeta.continual import streaming
from fmeta.workdir import Context

TITLES = {
  'nearest_mean': 'nearest mean, frozen',
  'slda': 'SLDA, frozen',
  'ranpac': 'RanPAC, frozen',
}


@dataclasses.dataclass
class Config(settings.Config):
  """What one would sweep in a table that has such rows."""

  frozen: tuple[str, ...] = tuple(TITLES)
  random_features: int = 2000


def check(config: Config, tunings: Collection[str] = ()) -> None:
  """Raises `UsageError` for what does not exist, before data are read."""
  settings.check(config, tunings, config.frozen)
  for name in config.frozen:
    if name not in TITLES:
      raise fmeta.UsageError(
        f'no frozen row {name!r}; possible: {", ".join(TITLES)}'
      )


def classifier(
  name: str, tasks: Labelled, random_features: int, key: jax.Array
) -> tuple[streaming.Streaming, float]:
  """A row without a gradient, and the strength it has.

  Args:
    name: of `TITLES`.
    tasks: with the column `feature`.
    random_features: of RanPAC.
    key: of their projection.
  """
  dim = tasks.train[0].columns['feature'].shape[1]
  classes = tasks.allowed.shape[1]
  if name == 'nearest_mean':
    return streaming.nearest_mean_cosine(classes, dim), 0.0
  if name == 'slda':
    return streaming.slda(classes, dim), 0.0

  def make(strength):
    return streaming.ranpac(classes, dim, random_features, key, strength)

  first = tasks.train[0].columns
  cut = len(first['label']) * 4 // 5
  part = make(1.0).update(
    make(1.0).init(), first['feature'][:cut], first['label'][:cut]
  )
  strength, _ = streaming.choose_strength(
    make, part, first['feature'][cut:], first['label'][cut:]
  )
  return make(float(strength)), float(strength)


def taught(
  made: streaming.Streaming, tasks: Labelled, scenario: Scenario
) -> dict[str, Any]:
  """The accuracy matrix of a row without a gradient.

  Where tasks are known an answer is one of the task's own classes; else one
  of those seen so far, as no other has a mean.
  """
  update, answer = jax.jit(made.update), jax.jit(made.answer)
  state, matrix, correct = made.init(), [], []
  for index, task in enumerate(tasks.train):
    columns = task.columns
    state = update(state, columns['feature'], columns['label'])
    solved = jax.jit(made.solve)(state)
    correct = []
    for own, past in enumerate(tasks.test[: index + 1]):
      scores = answer(solved, past.columns['feature'])
      if scenario == 'task':
        scores = jnp.where(tasks.allowed[own], scores, -jnp.inf)
      right = jnp.argmax(scores, -1) == past.columns['label']
      correct.append(np.asarray(right))
    matrix.append([float(each.mean()) for each in correct])
  return {
    'matrix': matrix,
    'correct': by_label(tasks.test, correct),
    'tasks': [task.name for task in tasks.train],
    'cost': {'memory_bytes': fmeta.tree.num_bytes(state)},
    'trainable': 0,
  }


def measure(
  config: Config, context: Context, tasks_of: Callable[[int], Labelled]
) -> dict[str, Measured]:
  """All of them, one run per order.

  Args:
    config: of the experiment.
    context: of the job.
    tasks_of: `order -> tasks`, with the column `feature`.
  """
  key = jax.random.key(config.seed.init)
  found = {}
  for name in config.frozen:
    runs = []
    for seed in range(config.seeds):

      def run(name=name, seed=seed):
        tasks = tasks_of(seed)
        made, strength = classifier(name, tasks, config.random_features, key)
        return {**taught(made, tasks, config.scenario), 'strength': strength}

      where = f'{config.scenario}/{name}/seed_{seed}'
      runs.append(trial(context, where, run))
    average, _ = standard_error(runs)
    print(f'{name}: {100 * average:.2f} %', flush=True)
    found[name] = Measured(_row(TITLES[name]), 0.0, runs)
  return found


def _row(title: str) -> rows.Row:
  def no_learner(recipe, strength):
    raise fmeta.UsageError(f'{title} learns without a step')

  return rows.Row(title, no_learner)
