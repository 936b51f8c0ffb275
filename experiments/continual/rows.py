"""The rows of a table: what each method adds to the one step."""

from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import jax
import numpy as np

import fmeta
from experiments.continual.bench import Bench
from fmeta import continual, fisher, memory, optim, penalty

# Wide, because the right strength differs by ten decades between scenarios.
DECADES = tuple(10.0**k for k in range(1, 14, 2))


class Recipe(NamedTuple):
  """What all rows share.

  Attributes:
    bench: the stream.
    rate: of Adam, constant.
    batch_size: new rows a step; so many are replayed as well.
    memory_size: rows a memory holds.
    tuning: what moves; everything by default.
  """

  bench: Bench
  rate: float
  batch_size: int
  memory_size: int
  tuning: fmeta.Tuning | None = None

  def finetune(self, loss: Any = None, **options: Any) -> fmeta.Learner:
    """The step itself."""
    loss = self.bench.loss if loss is None else loss
    return fmeta.finetune(
      loss, optim.adam(self.rate), tuning=self.tuning, **options
    )

  def mix(self, how: Callable) -> Callable:
    """Old rows may answer what new ones may, where that is the classes seen."""
    return continual.today(how) if self.bench.scenario == 'class' else how

  def replay(
    self, learner: fmeta.Learner, size: int, how: Callable = fmeta.append
  ) -> fmeta.Learner:
    """Fed from a reservoir as well; `beside` also keeps the outputs."""
    spec = self.bench.spec()
    if how is fmeta.beside:
      classes = self.bench.tasks.allowed.shape[1]
      spec = {**spec, 'outputs': jax.ShapeDtypeStruct((classes,), np.float32)}
    held = fmeta.reservoir(self.memory_size, spec)
    return fmeta.rehearse(learner, held, size, mix=self.mix(how))


class Row(NamedTuple):
  """A method.

  Attributes:
    title: in the table.
    learner: `(recipe, strength) -> Learner`.
    grid: strengths to choose from; empty: none to choose.
    remembers: it looks at the task's data once more at its end.
    ends_task: it needs to be told of a task's end.
    share: of a batch that is new; the rest of the compute is replay's.
    replayed: `recipe -> remembered rows a step`.
    at_once: trained on all tasks together.
    tuning: name of what moves, where it is not the stream's own.
    folds: it needs a tuning with factors.
  """

  title: str
  learner: Callable[[Recipe, float], fmeta.Learner]
  grid: tuple[float, ...] = ()
  remembers: bool = False
  ends_task: bool = False
  share: float = 1.0
  replayed: Callable[[Recipe], int] = lambda recipe: 0
  at_once: bool = False
  tuning: str = ''
  folds: bool = False

  def new(self, recipe: Recipe) -> int:
    """Rows of the stream a step."""
    return int(recipe.batch_size * self.share)


def _plain(recipe: Recipe, strength: float) -> fmeta.Learner:
  return recipe.finetune()


def _ewc(recipe: Recipe, strength: float) -> fmeta.Learner:
  return recipe.finetune(penalty=penalty.ewc(strength))


def _sampled_ewc(recipe: Recipe, strength: float) -> fmeta.Learner:
  held = penalty.ewc(strength, fisher.sampled_fisher)
  return recipe.finetune(penalty=held)


def _online_ewc(recipe: Recipe, strength: float) -> fmeta.Learner:
  return recipe.finetune(penalty=penalty.online_ewc(strength))


def _o_lora(recipe: Recipe, strength: float) -> fmeta.Learner:
  # A count for each leaf: a task's new factors begin theirs, the head goes on.
  optimizer = fmeta.adamw_per_leaf(
    recipe.rate, weight_decay=0.0, clip_norm=None
  )
  held = continual.o_lora(strength, len(recipe.bench.tasks.train))
  return continual.fold(
    fmeta.finetune(
      recipe.bench.loss, optimizer, tuning=recipe.tuning, penalty=held
    )
  )


def _si(recipe: Recipe, strength: float) -> fmeta.Learner:
  return recipe.finetune(penalty=penalty.si(strength))


def _mas(recipe: Recipe, strength: float) -> fmeta.Learner:
  return recipe.finetune(penalty=penalty.mas(strength))


def _rwalk(recipe: Recipe, strength: float) -> fmeta.Learner:
  return recipe.finetune(penalty=penalty.rwalk(strength))


def _lwf(recipe: Recipe, strength: float) -> fmeta.Learner:
  bench = recipe.bench
  heads = bench.tasks.allowed
  if bench.scenario != 'task':
    heads = np.ones((1, heads.shape[1]), bool)
  return recipe.finetune(penalty=penalty.lwf(bench.forward, strength, heads))


def _er(recipe: Recipe, strength: float) -> fmeta.Learner:
  return recipe.replay(recipe.finetune(), recipe.batch_size)


def _er_for_half(recipe: Recipe, strength: float) -> fmeta.Learner:
  return recipe.replay(recipe.finetune(), _half(recipe))


def _half(recipe: Recipe) -> int:
  return recipe.batch_size // 2


def _as_many(recipe: Recipe) -> int:
  return recipe.batch_size


def _twice(recipe: Recipe) -> int:
  return 2 * recipe.batch_size  # logits of one half, labels of the other


def _der_plus_plus(recipe: Recipe, strength: float) -> fmeta.Learner:
  bench = recipe.bench
  # Half weight for labels: the value most of the paper's settings have.
  loss = continual.der_plus_plus(
    bench.forward, bench.criterion, strength, beta=0.5
  )
  return recipe.replay(recipe.finetune(loss), _twice(recipe), fmeta.beside)


def _er_ace(recipe: Recipe, strength: float) -> fmeta.Learner:
  bench = recipe.bench
  loss = continual.er_ace(bench.forward, bench.criterion)
  return recipe.replay(recipe.finetune(loss), recipe.batch_size, fmeta.beside)


def _a_gem(recipe: Recipe, strength: float) -> fmeta.Learner:
  learner = recipe.finetune(value_and_grad=continual.a_gem())
  return _per_task(recipe, learner, _by_task(recipe), _sampled(recipe))


def _gem(recipe: Recipe, strength: float) -> fmeta.Learner:
  learner = recipe.finetune(value_and_grad=continual.gem(strength))
  held = continual.task_by_task(_by_task(recipe))
  return _per_task(recipe, learner, held, _rows_per_task(recipe))


def _rows_per_task(recipe: Recipe) -> int:
  return max(recipe.memory_size // len(recipe.bench.tasks.train), 1)


def _by_task(recipe: Recipe) -> fmeta.Memory:
  tasks = len(recipe.bench.tasks.train)
  return memory.per_task(tasks, _rows_per_task(recipe), recipe.bench.spec())


def _per_task(
  recipe: Recipe, learner: fmeta.Learner, held: fmeta.Memory, size: int
) -> fmeta.Learner:
  mix = recipe.mix(fmeta.beside)
  return fmeta.rehearse(learner, held, size, mix=mix)


def _sampled(recipe: Recipe) -> int:
  return min(recipe.batch_size, _whole(recipe))


def _whole(recipe: Recipe) -> int:
  return len(recipe.bench.tasks.train) * _rows_per_task(recipe)


# What a method needs at a task's end.
LOOKS = {'remembers': True}
TOLD = {'ends_task': True}

ROWS = {
  'none': Row('none', _plain),
  'joint': Row('joint', _plain, at_once=True),
  'ewc': Row('EWC', _ewc, DECADES, **LOOKS),
  # A pass per batch and not one per class: for many classes.
  'sampled_ewc': Row('EWC, sampled Fisher', _sampled_ewc, DECADES, **LOOKS),
  'online_ewc': Row('online EWC', _online_ewc, DECADES, **LOOKS),
  'o_lora': Row('O-LoRA', _o_lora, (0.1, 0.5, 1.0, 5.0), **TOLD, folds=True),
  'si': Row('SI', _si, (0.1, 1.0, 10.0, 100.0, 1e3), **TOLD),
  'mas': Row('MAS', _mas, (0.01, 0.1, 1.0, 10.0), **LOOKS),
  'rwalk': Row('RWalk', _rwalk, (0.01, 0.1, 1.0, 10.0, 100.0), **TOLD),
  'lwf': Row('LwF', _lwf, (0.5, 1.0, 2.0, 4.0), **LOOKS),
  'er': Row('ER', _er, replayed=_as_many),
  'er_matched': Row('ER matched', _er_for_half, share=0.5, replayed=_half),
  'er_ace': Row('ER-ACE', _er_ace, replayed=_as_many),
  'der_plus_plus': Row(
    'DER++', _der_plus_plus, (0.1, 0.2, 0.5, 1.0), replayed=_twice
  ),
  'a_gem': Row('A-GEM', _a_gem, **TOLD, replayed=_sampled),
  'gem': Row('GEM', _gem, (0.0, 0.5), **TOLD, replayed=_whole),
}


def find(name: str, tunings: Collection[str] = ()) -> Row:
  """A row by its name: a method, or a method with what moves.

  `er@lora` is ER where the tuning called `lora` says what moves.

  Args:
    name: `method` or `method@tuning`.
    tunings: names that an experiment has.

  Raises:
    UsageError: for a method or a tuning that does not exist.
  """
  method, at, tuning = name.partition('@')
  if method not in ROWS:
    raise fmeta.UsageError(f'no method {method!r}; possible: {", ".join(ROWS)}')
  if not at and not ROWS[method].folds:
    return ROWS[method]
  if tuning not in tunings:
    raise fmeta.UsageError(
      f'{name!r} names no tuning; possible: ' + _with_tunings(method, tunings)
    )
  row = ROWS[method]
  return row._replace(title=f'{row.title}@{tuning}', tuning=tuning)


def _with_tunings(method: str, tunings: Collection[str]) -> str:
  if ROWS[method].folds and not tunings:
    return 'none here, the method is for low-rank factors'
  return ', '.join(f'{method}@{known}' for known in tunings) or method


def check_sizes(row: Row, recipe: Recipe) -> None:
  """Raises `UsageError` where a step would have no rows, or too many old."""
  if row.new(recipe) < 1:
    raise fmeta.UsageError(
      f'{row.title} takes {row.share:g} of a batch of {recipe.batch_size}; '
      'give at least 2'
    )
  if row.replayed(recipe) > recipe.memory_size:
    raise fmeta.UsageError(
      f'{row.title} replays {row.replayed(recipe)} rows a step from a memory '
      f'of {recipe.memory_size}; give a memory_size of at least as many'
    )
