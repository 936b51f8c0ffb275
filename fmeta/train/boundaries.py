"""Which learner takes which stage, and how a state crosses between them."""

from collections.abc import Callable, Sequence
from itertools import pairwise

import jax
import jax.numpy as jnp

from fmeta import tree
from fmeta.errors import UsageError
from fmeta.retune import retune
from fmeta.train.dispatch import Program
from fmeta.train.stages import Stage
from fmeta.types import Array, Learner, Params, TrainState

# Beside the streams of `fmeta.learner`, folded into the step's key.
RETUNE = 5


def folded(rng: Array, number: Array | int) -> Array:
  """`fold_in` of a root key, or of each of those of several seeds."""
  fold = jax.random.fold_in
  return (
    jax.vmap(fold, (0, None))(rng, number) if rng.ndim else fold(rng, number)
  )


class Boundaries:
  """The learners of a run and what lies between them.

  Learner 0 is the one that made the state, learner k + 1 takes stage k.

  Args:
    learner: of the state, and of stages without their own.
    stages: in order.
    rng: root key of the run.
    programs: compiled steps to share with other runs.
    place: puts a state where it shall lie, in buffers of its own.

  Raises:
    UsageError: if a program is of a learner that no stage has.
  """

  def __init__(
    self,
    learner: Learner,
    stages: Sequence[Stage],
    rng: Array,
    programs: Program | Sequence[Program] | None,
    place: Callable[[TrainState], TrainState],
  ):
    self.learners = [learner, *(stage.learner or learner for stage in stages)]
    self._rng, self._place = rng, place
    given = programs or ()
    given = [given] if isinstance(given, Program) else given
    # By identity: a learner is equal to none but itself.
    self.programs = {id(program.learner): program for program in given}
    strangers = set(self.programs) - {id(each) for each in self.learners}
    if strangers:
      raise UsageError(
        'a program is of another learner than the stages; build it from the '
        'very learner that fit or a stage is given'
      )

  def program(self, number: int) -> Program:
    """The compiled steps of learner `number`, one for equal learners."""
    learner = self.learners[number]
    if id(learner) not in self.programs:
      self.programs[id(learner)] = Program(learner)
    return self.programs[id(learner)]

  def cross(self, state: TrainState, start: int, stop: int) -> TrainState:
    """Takes a state of learner `start` to learner `stop`, and places it."""
    crossed = self._retuned(state, start, stop)
    return state if crossed is state else self._place(crossed)

  def _retuned(self, state: TrainState, start: int, stop: int) -> TrainState:
    for old, new in pairwise(self.learners[start : stop + 1]):
      if old is not new:
        rng = folded(folded(self._rng, state.step), RETUNE)
        state = retune(state, old, new, rng)
    return state

  def check(self, state: TrainState) -> None:
    """Crosses every boundary in shapes only, before anything is trained.

    Raises:
      UsageError: as `retune`.
    """
    last = len(self.learners) - 1
    jax.eval_shape(lambda start: self._retuned(start, 0, last), state)

  def rebuild(self, state: TrainState, stop: int) -> tuple[TrainState, set]:
    """Shapes a state of learner 0 like one of learner `stop`.

    Returns:
      The state, placed, and the names of its frozen leaves that every phase
      up to there leaves as they are: neither trained nor merged into. All
      other values are meaningless until they are loaded.
    """
    shaped, fixed = state, _named(state.frozen)
    for number in range(stop):
      shaped = self._retuned(shaped, number, number + 1)
      now = _named(shaped.frozen)
      # By identity: a merge makes a new array.
      fixed = {n: leaf for n, leaf in fixed.items() if now.get(n) is leaf}
    return (state if shaped is state else self._place(shaped)), set(fixed)


def rewritten(before: TrainState, after: TrainState) -> list[str]:
  """Names of the frozen leaves that `after` has others of.

  Raises:
    UsageError: if a leaf of the state has come, gone or changed its shape: the
      compiled step would be another.
  """
  old, new = _kinds(before), _kinds(after)
  for name in [*old, *new]:
    if old.get(name) != new.get(name):
      raise UsageError(
        f'between two steps {name!r} went from {old.get(name)} to '
        f'{new.get(name)}; keep the shapes of a state, or give the next stage '
        'a learner of its own'
      )
  held = _named(before.frozen)
  # By identity: an unchanged leaf is handed on.
  return [n for n, leaf in _named(after.frozen).items() if leaf is not held[n]]


def _kinds(state: TrainState) -> dict[str, str]:
  flat = jax.tree_util.tree_flatten_with_path(state)[0]
  return {
    jax.tree_util.keystr(path): f'{jnp.result_type(x)}{list(jnp.shape(x))}'
    for path, x in flat
  }


def _named(frozen: Params) -> dict[str, Array]:
  return dict(zip(tree.names(frozen), jax.tree.leaves(frozen), strict=True))
