"""What `fmeta.train.fit` takes and gives, and where its loop is."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from fmeta.errors import UsageError
from fmeta.phases import Phase
from fmeta.train.stopping import Best, Monitor
from fmeta.types import Batch, Forward, Learner, Params, TrainState, Tuning


class Stage(NamedTuple):
  """A task of a stream, or a phase of one; plain training is one stage.

  Attributes:
    name: appears in the log.
    batches: `i -> batch`, pure; i counts from the stage's start.
    num_steps: at least 1.
    remember: what `learner.end_task` consolidates on; nothing: no
      consolidation. EWC, MAS, LwF and what else reads data at a task's end
      hold nothing back without it.
    ends_task: whether `learner.end_task` is called although there is nothing
      to remember: SI and RWalk take stock, a memory with a place per task
      moves on to the next.
    learner: takes this stage's steps; that of `fit` by default. Where it
      changes, `fmeta.retune` takes the state over.
    prepare: what `learner.begin_task` looks at before the first step; nothing:
      it is not called.
  """

  name: str
  batches: Callable[[int], Batch]
  num_steps: int
  remember: Sequence[Batch] = ()
  learner: Learner | None = None
  ends_task: bool = False
  prepare: Sequence[Batch] = ()


class Phased:
  """Phases with a learner each, ready to become the stages of any task.

    phased = train.Phased(
      fmeta.lp_ft('head/.*', probe_steps=100, full_steps=200),
      lambda tuning: fmeta.finetune(loss, optimizer, tuning=tuning),
    )
    first = phased.learners[0]
    state = first.init(params, key)
    fitted = train.fit(first, state, phased.stages('trec', batches), key)

  Args:
    phases: from `fmeta.phases`, `gradual_unfreezing`, `chain_thaw`, `lp_ft`.
    learner_of: called once per phase, whatever the number of tasks.

  Attributes:
    learners: one per phase.
  """

  def __init__(
    self, phases: Sequence[Phase], learner_of: Callable[[Tuning], Learner]
  ):
    self.phases = tuple(phases)
    self.learners = tuple(learner_of(phase.tuning) for phase in phases)

  def stages(
    self,
    name: str,
    batches: Callable[[int], Batch],
    remember: Sequence[Batch] = (),
  ) -> list[Stage]:
    """The stages of a task, named `<name>/phase_<k>`.

    Args:
      name: of the task.
      batches: `i -> batch`; i counts through all phases of the task.
      remember: consolidated at the end of the task, not of its phases.
    """
    made, first = [], 0
    for k, (phase, learner) in enumerate(
      zip(self.phases, self.learners, strict=True)
    ):
      made.append(
        Stage(
          f'{name}/phase_{k}',
          lambda i, first=first: batches(first + i),
          phase.num_steps,
          learner=learner,
        )
      )
      first += phase.num_steps
    return [*made[:-1], made[-1]._replace(remember=remember)]


class Fitted(NamedTuple):
  """What `fit` returns.

  Attributes:
    state: the last state; with `restore_best`, its trainable leaves and model
      state are those of the best evaluation.
    params: the merged parameters of `state`.
    history: a dict of floats per logged step (`step`, `stage`, `loss`, ...),
      those of before a resume included.
    evaluations: `{'step', 'stage', 'evaluation': {name: value}}` each.
    matrix: row i is what `after_stage` gave after stage i.
    steps: value of `state.step`.
    examples_per_second: rows of the leading batch axis per second (episodes:
      tasks), without compilation, evaluations and saves; 0 if no step ran.
    stopped_early: whether patience ended the last stage.
    best_step: step of the last stage's best evaluation.
    flops_per_step: of the last stage, see `Program`.
    peak_bytes: of the largest program, see there.
    traces: programs compiled.
  """

  state: TrainState
  params: Params
  history: list[dict[str, Any]]
  evaluations: list[dict[str, Any]]
  matrix: list[list[float]]
  steps: int
  examples_per_second: float
  stopped_early: bool
  best_step: int | None
  flops_per_step: float | None
  peak_bytes: int | None
  traces: int


class Diverged(UsageError):
  """A loss or an update is not finite; no checkpoint has been overwritten."""


@dataclasses.dataclass(frozen=True)
class Settings:
  """The arguments of `fit` that the loop reads."""

  forward: Forward | None
  evaluate: Callable[[Params, Any], Mapping[str, float]] | None
  evaluate_every: int
  monitor: Monitor
  restore_best: bool
  after_stage: Callable[[Params, Any, int], Sequence[float]] | None
  checkpoint_every: int
  steps_per_dispatch: int
  log_every: int
  place_state: Callable[[TrainState], TrainState]
  place_batches: Callable[[Batch], Batch]

  def check(self, stages: Sequence[Stage]) -> None:
    """Refuses settings that contradict each other.

    Raises:
      UsageError: naming the first that does.
    """
    if not stages:
      raise UsageError('fit was given no stages; give at least one')
    for name in ('steps_per_dispatch', 'log_every'):
      if getattr(self, name) < 1:
        raise UsageError(f'{name}={getattr(self, name)}; give at least 1')
    for stage in stages:
      if stage.num_steps < 1:
        raise UsageError(
          f'stage {stage.name!r} has num_steps={stage.num_steps}; give >= 1'
        )
      for name in ('remember', 'prepare'):
        if isinstance(getattr(stage, name), Mapping):
          raise UsageError(
            f'`{name}` of stage {stage.name!r} is one batch; give a list of '
            'batches, such as data.eval_batches(columns, size)'
          )
      if (stage.remember or stage.prepare) and self.forward is None:
        raise UsageError(
          f'stage {stage.name!r} has batches to remember or to prepare with; '
          'give the `forward` to run on them'
        )
    if self.evaluate is None and self.restore_best:
      raise UsageError('restore_best needs `evaluate`')
    if self.monitor.patience is not None and not (
      self.evaluate and self.evaluate_every
    ):
      raise UsageError('patience needs `evaluate` and evaluate_every >= 1')


@dataclasses.dataclass
class Progress:
  """Where the loop is; saved as JSON beside the state.

  `learner` numbers the learner whose state it is, see `Boundaries`: at a
  stage's end still that of the stage. `rewritten` names the frozen leaves that
  a task's beginning or end has changed: a resume loads them.
  """

  step: int
  stage: int = 0
  learner: int = 0
  index: int = 0
  best: Best = dataclasses.field(default_factory=Best)
  stopped_early: bool = False
  matrix: list[list[float]] = dataclasses.field(default_factory=list)
  rewritten: list[str] = dataclasses.field(default_factory=list)

  @classmethod
  def from_json(cls, json: dict) -> 'Progress':
    """The inverse of `dataclasses.asdict`."""
    return cls(**{**json, 'best': Best(**json['best'])})
