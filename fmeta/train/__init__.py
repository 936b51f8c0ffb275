"""`fit`, the only training loop.

It repeats `learner.step` and nothing else: plain training is one stage,
meta-learning a learner whose batches are episodes, a continual stream several
stages with a consolidation between them. What a step needs is in the train
state, what the loop needs is a few numbers beside it; both are saved together,
so a killed run continues bit by bit where it was.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import jax
from jax.sharding import Mesh

from fmeta import sharding
from fmeta.errors import UsageError
from fmeta.sharding import Rules
from fmeta.train.dispatch import Program, Unrolled, own, strong
from fmeta.train.log import Live, Metrics, refuse_used
from fmeta.train.loop import Loop
from fmeta.train.resident import Resident
from fmeta.train.saver import Saver, on_sigterm
from fmeta.train.stages import Diverged, Fitted, Phased, Settings, Stage
from fmeta.train.stopping import Monitor
from fmeta.types import Array, Batch, Forward, Learner, Params, TrainState

__all__ = [
  'Diverged',
  'Fitted',
  'Phased',
  'Program',
  'Resident',
  'Stage',
  'Unrolled',
  'fit',
]


def fit(
  learner: Learner,
  state: TrainState,
  stages: Sequence[Stage],
  rng: Array,
  *,
  forward: Forward | None = None,
  evaluate: Callable[[Params, Any], Mapping[str, float]] | None = None,
  evaluate_every: int = 0,
  monitor: str = 'accuracy',
  patience: int | None = None,
  min_delta: float = 0.0,
  restore_best: bool = False,
  after_stage: Callable[[Params, Any, int], Sequence[float]] | None = None,
  workdir: str | pathlib.Path | None = None,
  checkpoint_every: int = 0,
  keep: int = 2,
  resume: bool = False,
  steps_per_dispatch: int = 1,
  log_every: int = 1,
  mesh: Mesh | None = None,
  rules: Rules | None = None,
  quiet: bool = False,
  program: Program | Sequence[Program] | None = None,
) -> Fitted:
  """Trains through the stages.

  Results depend neither on `steps_per_dispatch` nor on where a run was killed
  and resumed, bit by bit on the same devices. The order at a step is: log,
  evaluate, and at a stage's end restore the best, consolidate and measure;
  then save. A stage with another learner then begins with `fmeta.retune`;
  every boundary is tried in shapes before the first step. With a workdir,
  SIGTERM finishes the current dispatch, saves and raises `SystemExit(143)`;
  of several processes one that hears it stops all, after the same dispatch.

  Args:
    learner: any learner; an outer one trains on episodes. Stages may bring
      their own, see `Phased`.
    state: from `learner.init`; it is copied, so it stays valid.
    stages: in order.
    rng: typed root key, or those of several seeds for `over_seeds`; a resumed
      run needs the same.
    forward: what `end_task` runs; needed when a stage remembers.
    evaluate: `(params, model_state) -> {name: value}`, at the end of each
      stage. Its arguments are donated afterwards: copy what you keep.
    evaluate_every: also evaluate every so many steps of a stage; 0: only at
      its end.
    monitor: the number early stopping looks at, see `Monitor`.
    patience: evaluations without improvement that end a stage.
    min_delta: an improvement is larger than this.
    restore_best: end a stage with the leaves of its best evaluation.
    after_stage: `(params, model_state, stage number) -> row` of the matrix.
    workdir: gets `metrics.jsonl`, TensorBoard events and `checkpoints/`; none:
      nothing is written.
    checkpoint_every: save every so many steps of a stage; 0: only at stage
      ends.
    keep: checkpoints kept; 2 leaves one if the last is damaged.
    resume: continue from the last checkpoint of the workdir, if it has one.
    steps_per_dispatch: steps in one call of the device. Evaluations, saves,
      stage ends and changes of batch shape shorten a chunk; each length is
      compiled once.
    log_every: steps between records.
    mesh: devices to run on, see `fmeta.sharding`; one device by default.
    rules: ordered `(pattern, PartitionSpec)` for the parameters on the mesh.
    quiet: no live line.
    program: `Program(learner)` shared by several calls, so that each shape is
      compiled once for all of them; what differs between them (rates, seeds)
      has to be in the state, see `optim.set_hyper`. One per learner if the
      stages bring several. `Resident(learner, columns)` keeps the data on the
      device.

  Raises:
    UsageError: for settings that contradict each other, a used workdir without
      `resume`, a checkpoint of something else, or a phase boundary that
      `fmeta.retune` refuses.
    Diverged: at the first loss or update that is not finite.
  """
  settings = Settings(
    forward=forward,
    evaluate=evaluate,
    evaluate_every=evaluate_every,
    monitor=Monitor(monitor, patience, min_delta),
    restore_best=restore_best,
    after_stage=after_stage,
    checkpoint_every=checkpoint_every if workdir is not None else 0,
    steps_per_dispatch=steps_per_dispatch,
    log_every=log_every,
    place_state=lambda state: _placed(state, mesh, rules),
    place_batches=_placer(mesh),
  )
  settings.check(stages)
  with ExitStack() as stack:
    loop = Loop(learner, stages, rng, settings, program)
    loop.start(state)
    folder = None
    if workdir is not None:
      folder = _make_workdir(pathlib.Path(workdir), resume)
      if jax.process_count() == 1:  # Several listen to jax.distributed.
        stack.enter_context(on_sigterm(loop.terminate))
      loop.saver = Saver(folder / 'checkpoints', keep, rng, stages, loop.frozen)
      stack.callback(loop.saver.close)
      loop.restore()
    first = loop.progress.step
    main = jax.process_index() == 0
    loop.metrics = Metrics(folder, first, main)
    stack.callback(loop.metrics.close)
    loop.live = Live(first, loop.last_step(), quiet=quiet or not main)
    stack.callback(loop.live.close)
    return loop.run()


def _placed(
  state: TrainState, mesh: Mesh | None, rules: Rules | None
) -> TrainState:
  if mesh is not None:
    return sharding.place_state(strong(state), mesh, rules)
  # Moving leaves in buffers of their own; frozen ones are never donated.
  moving = own(dataclasses.replace(state, frozen={}))
  return dataclasses.replace(moving, frozen=jax.device_put(state.frozen))


def _placer(mesh: Mesh | None) -> Callable[[Batch], Batch]:
  if mesh is None:
    return jax.device_put
  return lambda batch: sharding.place_batch(batch, mesh, stacked=True)


def _make_workdir(workdir: pathlib.Path, resume: bool) -> pathlib.Path:
  if not resume:
    refuse_used(workdir)
  try:
    workdir.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise UsageError(
      f'cannot make workdir {str(workdir)!r}: {error.strerror}; give a folder '
      'that can be written'
    ) from error
  return workdir
