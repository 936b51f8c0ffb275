"""The rows of a continual-learning table, for any model and stream.

naive: the step, nothing else. ewc: a quadratic penalty per finished task
(Kirkpatrick et al. 2017, https://arxiv.org/abs/1612.00796). replay: a
reservoir of earlier examples (Chaudhry et al. 2019,
https://arxiv.org/abs/1902.10486). joint: all tasks at once for as many steps,
the upper bound.

Rate and strength are data to the step (in the optimiser's and the penalty's
state), so every setting of a row runs the same compiled program.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

import fmeta
from fmeta import data, fisher, metrics, optim, penalty, stream, train

NAMES = ('naive', 'ewc', 'replay', 'joint')
Rows = dict[str, jax.ShapeDtypeStruct]

# Jitted here and not in each consolidation: one program for all tasks.
SAMPLED = jax.jit(fisher.sampled_fisher, static_argnums=0)
EXACT = jax.jit(fisher.exact_fisher, static_argnums=0)


class Setting(NamedTuple):
  """One point of a grid."""

  rate: float
  strength: float = 0.0

  def __str__(self):
    shown = f'rate {self.rate:g}'
    return shown + (f', strength {self.strength:g}' if self.strength else '')


class Recipe(NamedTuple):
  """What all rows share.

  Attributes:
    loss: of the model.
    tuning: what moves.
    multipliers: ordered `(pattern, multiplier)` rates.
    importance: `SAMPLED` or `EXACT`.
    batch_size: new examples per step.
    steps_per_task: `examples -> steps` of one task.
    memory_size: examples a reservoir holds.
    replayed: remembered examples per step.
    fisher_examples: first examples of a task that its Fisher is a mean over.
    collate: gives every batch one shape.
  """

  loss: fmeta.LossFn
  tuning: fmeta.Tuning
  importance: Any
  batch_size: int
  steps_per_task: Any
  memory_size: int
  replayed: int
  fisher_examples: int
  multipliers: fmeta.tree.Patterns = optim.EVERYWHERE
  collate: data.Collate | None = None

  def batches(self, columns: data.Columns, seed: int) -> data.Batches:
    """Shuffled batches of one shape."""
    return data.batches(columns, self.batch_size, seed, collate=self.collate)

  def row(self, columns: data.Columns) -> Rows:
    """What the memory holds of one example."""
    first = data.take(data.numeric(columns), slice(1))
    first = self.collate(first) if self.collate else first
    return {
      key: jax.ShapeDtypeStruct(x.shape[1:], x.dtype)
      for key, x in first.items()
    }


def check(names: tuple[str, ...]) -> None:
  """Raises `UsageError` for rows that are none, or come twice."""
  for name in names:
    if name not in NAMES:
      raise fmeta.UsageError(
        f'no method {name!r}; possible: {", ".join(NAMES)}'
      )
  if not names or len(set(names)) < len(names):
    raise fmeta.UsageError(
      f'config.methods is {names}; give some of {", ".join(NAMES)}, each once'
    )


def learner(
  recipe: Recipe, method: str, setting: Setting, rows: Rows
) -> fmeta.Learner:
  """The same step, with what the method adds to it."""
  optimizer = optax.inject_hyperparams(
    lambda rate: optim.adamw(rate, multipliers=recipe.multipliers)
  )(setting.rate)
  remembers = None
  if method == 'ewc':
    # strength/2 F d^2 = 1/2 (strength F) d^2, and the anchors' F-weighted
    # mean is the same for any multiple of F.
    remembers = fmeta.ewc(
      1.0,
      lambda *args: jax.tree.map(
        lambda f: setting.strength * f, recipe.importance(*args)
      ),
    )
  made = fmeta.finetune(
    recipe.loss, optimizer, tuning=recipe.tuning, penalty=remembers
  )
  if method == 'replay':
    memory = fmeta.reservoir(recipe.memory_size, rows)
    return fmeta.rehearse(made, memory, recipe.replayed)
  return made


def stages(
  recipe: Recipe, method: str, tasks: Sequence[stream.Task], seed: int
) -> list[train.Stage]:
  """One stage per task; joint: one stage with all their steps."""
  made = []
  for index, task in enumerate(tasks):
    remember = []
    # Nothing comes after the last task that would need it.
    if method == 'ewc' and index + 1 < len(tasks):
      rows = data.take(task.columns, slice(recipe.fisher_examples))
      size = recipe.fisher_examples
      remember = data.eval_batches(rows, size, collate=recipe.collate)
    steps = recipe.steps_per_task(len(task.columns['label']))
    batches = recipe.batches(task.columns, seed)
    made.append(train.Stage(task.name, batches, steps, remember))
  if method != 'joint':
    return made
  batches = recipe.batches(stream.joint(tasks).columns, seed)
  return [train.Stage('joint', batches, sum(s.num_steps for s in made))]


def divergence_product(
  recipe: Recipe, setting: Setting, fitted: train.Fitted
) -> float:
  """rate * strength * max F with the fastest leaf's rate, 0 without EWC.

  Plain gradient descent diverges above 2; AdamW's normalised steps are a
  milder case.
  """
  fastest = setting.rate * max(m for _, m in recipe.multipliers)
  # The state's importance holds the strength already.
  return fastest * float(penalty.max_importance(fitted.state.penalty_state))


def summary(matrices: Sequence[Sequence[Sequence[float]]]) -> dict[str, float]:
  """Mean over seeds of what accuracy matrices say; {} for a single row."""
  full = [metrics.accuracy_matrix(list(m)) for m in matrices]
  if len(full[0]) < 2:
    return {}
  kinds = {
    'average accuracy': metrics.average_accuracy,
    'backward transfer': metrics.backward_transfer,
    'forgetting (Chaudhry)': metrics.forgetting_chaudhry,
  }
  return {
    name: float(np.mean([measure(m) for m in full]))
    for name, measure in kinds.items()
  }


def remark(forgetting: float | None) -> str:
  """Says when a stream leaves little to forget (below two points)."""
  if forgetting is None or forgetting >= 0.02:
    return ''
  return (
    f' Naive training forgets {100 * forgetting:.1f} points here, so there is '
    'little for the others to save: all tasks share their classes.'
  )
