"""The rows of the table: what each method adds to the one step."""

from collections.abc import Callable
from typing import NamedTuple

import fmeta
from experiments.continual.bench import Bench, now_allowed
from fmeta import optim


class Recipe(NamedTuple):
  """What all rows share.

  Attributes:
    bench: the stream.
    rate: of Adam, constant.
    batch_size: new rows a step; so many are replayed as well.
    memory_size: rows a memory holds.
  """

  bench: Bench
  rate: float
  batch_size: int
  memory_size: int

  def finetune(self, **options: object) -> fmeta.Learner:
    """The step itself."""
    loss = options.pop('loss', self.bench.loss)
    return fmeta.finetune(loss, optim.adam(self.rate), **options)

  def replay(self, learner: fmeta.Learner, size: int) -> fmeta.Learner:
    """Fed from a reservoir as well."""
    by_stage = self.bench.scenario == 'class'
    return fmeta.rehearse(
      learner,
      fmeta.reservoir(self.memory_size, self.bench.spec()),
      size,
      mix=now_allowed if by_stage else fmeta.append,
    )


class Row(NamedTuple):
  """A method.

  Attributes:
    title: in the table.
    learner: `(recipe, strength) -> Learner`.
    grid: strengths to choose from; empty: none to choose.
    remembers: it looks at the task's data once more at its end.
    ends_task: it needs to be told of a task's end.
    share: of a batch that is new; the rest of the compute is replay's.
    at_once: trained on all tasks together.
  """

  title: str
  learner: Callable[[Recipe, float], fmeta.Learner]
  grid: tuple[float, ...] = ()
  remembers: bool = False
  ends_task: bool = False
  share: float = 1.0
  at_once: bool = False


def _plain(recipe: Recipe, strength: float) -> fmeta.Learner:
  return recipe.finetune()


def _ewc(recipe: Recipe, strength: float) -> fmeta.Learner:
  return recipe.finetune(penalty=fmeta.ewc(strength))


def _replay(recipe: Recipe, strength: float) -> fmeta.Learner:
  return recipe.replay(recipe.finetune(), recipe.batch_size)


def _replay_for_half(recipe: Recipe, strength: float) -> fmeta.Learner:
  return recipe.replay(recipe.finetune(), recipe.batch_size // 2)


ROWS = {
  'none': Row('none', _plain),
  'joint': Row('joint', _plain, at_once=True),
  'ewc': Row('EWC', _ewc, tuple(10.0**k for k in range(1, 12)), remembers=True),
  'er': Row('ER', _replay),
  'er_matched': Row('ER, equal compute', _replay_for_half, share=0.5),
}


def check(names: tuple[str, ...]) -> None:
  """Raises `UsageError` for a row that does not exist."""
  for name in names:
    if name not in ROWS:
      raise fmeta.UsageError(f'no method {name!r}; possible: {", ".join(ROWS)}')
