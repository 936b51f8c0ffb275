"""The loop behind `fmeta.train.fit`.

Its state is three things: the moving leaves on the device, the frozen leaves,
and `Progress`, a few numbers on the host. Metrics of a dispatch are fetched
after the next one has been started, so the device does not wait for the host.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from typing import Any

import jax
from jax.experimental import multihost_utils

from fmeta.averaging import find_averages, put_averages
from fmeta.train.boundaries import Boundaries, folded, rewritten
from fmeta.train.dispatch import Program, chunks, own, require_finite
from fmeta.train.log import Live, Metrics, step_record
from fmeta.train.saver import Saver
from fmeta.train.stages import Fitted, Progress, Settings, Stage
from fmeta.train.stopping import Best
from fmeta.types import Array, Batch, Learner, Params, TrainState

# Beside the streams of `fmeta.learner`, folded into the step's key.
END_TASK, BEGIN_TASK = 4, 6
SIGTERM_STATUS = 143  # 128 + 15, what a shell reports


class Loop:
  """One run of `fit`; see there."""

  moving: TrainState
  frozen: Params
  dormant: Any
  progress: Progress
  metrics: Metrics
  live: Live
  saver: Saver | None = None

  def __init__(
    self,
    learner: Learner,
    stages: Sequence[Stage],
    rng: Array,
    settings: Settings,
    programs: Program | Sequence[Program] | None = None,
  ):
    self.stages, self.rng, self.settings = stages, rng, settings
    self.boundaries = Boundaries(
      learner, stages, rng, programs, settings.place_state
    )
    self.kept: Any = None  # the leaves of the best evaluation
    self.told_to_stop = False
    self.dispatches = 0
    self.pending: tuple[int, dict[str, Array]] | None = None
    self.seconds, self.examples = 0.0, 0
    # Two sharded programs in flight on one CPU can wait for each other
    # forever, so there each dispatch is awaited.
    cpu = jax.default_backend() == 'cpu'
    self.wait = cpu and jax.device_count() > 1

  def start(self, state: TrainState) -> None:
    """Takes over a copy of a state."""
    self.boundaries.check(state)
    self._take(self.settings.place_state(state))
    self.progress = Progress(int(state.step))

  def _take(self, state: TrainState) -> None:
    """Makes a state the loop's own: what moves in it will be donated."""
    self.frozen, self.dormant = state.frozen, state.dormant
    # Dormant leaves come and go by phase: in a program they would recompile it.
    self.moving = dataclasses.replace(state, frozen={}, dormant={})

  def restore(self) -> None:
    """Continues from the last checkpoint, if there is one."""
    assert self.saver is not None
    found = self.saver.progress()
    if found is None:
      return
    self.progress = Progress.from_json(found)
    # The structure of that phase; its values come from the checkpoint.
    at = self.progress.learner
    shaped, fixed = self.boundaries.rebuild(self._state(), at)
    self._take(shaped)
    fixed -= set(self.progress.rewritten)
    state, self.kept = self.saver.restore(shaped, self._leaves(), fixed)
    self._take(state)

  def terminate(self) -> None:
    """Asks for a save and an end after the current dispatch."""
    self.told_to_stop = True

  def last_step(self) -> int:
    """`state.step` at the end, unless a stage stops early."""
    left = sum(s.num_steps for s in self.stages[self.progress.stage :])
    return self.progress.step + left - self.progress.index

  def run(self) -> Fitted:
    """All stages that are left."""
    while self.progress.stage < len(self.stages):
      self._run_stage(self.stages[self.progress.stage])
    state = self._state()
    records = self.metrics.records
    programs = self.boundaries.programs.values()
    return Fitted(
      state=state,
      params=self.learner.params(state),
      history=[r for r in records if 'evaluation' not in r],
      evaluations=[r for r in records if 'evaluation' in r],
      matrix=self.progress.matrix,
      steps=self.progress.step,
      examples_per_second=self._rate(),
      stopped_early=self.progress.stopped_early,
      best_step=self.progress.best.step,
      flops_per_step=self.program.flops_per_step,
      peak_bytes=max((p.peak_bytes or 0 for p in programs), default=0) or None,
      traces=sum(p.traces for p in programs),
    )

  @property
  def learner(self) -> Learner:
    """The learner whose state it is."""
    return self.boundaries.learners[self.progress.learner]

  @property
  def program(self) -> Program:
    """The compiled steps of that learner."""
    return self.boundaries.program(self.progress.learner)

  def _enter(self) -> None:
    """Takes the state to the learner of the stage that begins."""
    before, stage = self._state(), self.progress.stage + 1
    after = self.boundaries.cross(before, self.progress.learner, stage)
    if after is not before:
      self._take(after)
      if self.saver is not None:
        self.saver.hold(self.frozen)
    self.progress.learner = stage

  def _run_stage(self, stage: Stage) -> None:
    progress = self.progress
    self._enter()
    if progress.index == 0:
      progress.best, progress.stopped_early = Best(), False
      self.kept = None
      if stage.prepare:
        self._between(self.learner.begin_task, stage.prepare, BEGIN_TASK)
    source = chunks(stage.batches, progress.index, stage.num_steps, self._limit)
    with closing(source):
      began = time.perf_counter()
      for length, batches in source:
        self._dispatch(length, batches, began)
        ended = self._after_dispatch(stage)
        if ended:
          return
        began = time.perf_counter()

  def _limit(self, index: int) -> int:
    """Steps from `index` to where something else has to happen."""
    settings = self.settings
    limit = settings.steps_per_dispatch
    for every in (self._evaluate_every(), settings.checkpoint_every):
      if every:
        limit = min(limit, every - index % every)
    return limit

  def _evaluate_every(self) -> int:
    return self.settings.evaluate_every if self.settings.evaluate else 0

  def _dispatch(self, length: int, batches: Batch, began: float) -> None:
    compiled = self.program.compile_seconds
    # Packed texts have fewer rows of tokens than labels.
    leaves = jax.tree.leaves(batches)
    rows = max((x.shape[1] for x in leaves if x.ndim > 1), default=1)
    self.moving, metrics = self.program(
      self.moving,
      self.frozen,
      self.settings.place_batches(batches),
      self.rng,
    )
    self._flush()
    self.pending = (self.progress.step, metrics)
    self.progress.step += length
    self.progress.index += length
    self._listen()
    if self.wait or self._at_boundary():
      self._flush()
    compiled = self.program.compile_seconds - compiled
    self.seconds += time.perf_counter() - began - compiled
    self.examples += length * rows

  def _listen(self) -> None:
    """Several processes stop after one and the same dispatch.

    jax.distributed hears a SIGTERM of any of them and agrees on the next call
    that all will make.
    """
    self.dispatches += 1
    if jax.process_count() > 1:
      reached = multihost_utils.reached_preemption_sync_point
      self.told_to_stop = reached(self.dispatches)

  def _at_boundary(self) -> bool:
    return self.told_to_stop or self._due() or self._stage_is_over()

  def _due(self) -> bool:
    index = self.progress.index
    every = (self._evaluate_every(), self.settings.checkpoint_every)
    return any(n and index % n == 0 for n in every)

  def _stage_is_over(self) -> bool:
    stage = self.stages[self.progress.stage]
    return self.progress.index >= stage.num_steps

  def _after_dispatch(self, stage: Stage) -> bool:
    """Evaluates, ends the stage and saves when due; True at its end."""
    index, every = self.progress.index, self._evaluate_every()
    over = self._stage_is_over()
    if self.settings.evaluate and (over or (every and index % every == 0)):
      self._evaluate(stage)
      over = over or self.progress.stopped_early
    if over:
      self._end_stage(stage)
    every = self.settings.checkpoint_every
    if over or (every and index % every == 0) or self.told_to_stop:
      self._flush()
      self._save()
    if self.told_to_stop:
      raise SystemExit(SIGTERM_STATUS)
    return over

  def _evaluate(self, stage: Stage) -> None:
    settings, progress = self.settings, self.progress
    assert settings.evaluate is not None
    state = self._state()
    values = settings.evaluate(self.learner.params(state), state.model_state)
    values = {name: float(value) for name, value in values.items()}
    record = {'step': progress.step, 'stage': stage.name, 'evaluation': values}
    self.metrics.write(record)
    names = {f'evaluation/{name}': value for name, value in values.items()}
    self.metrics.scalars(progress.step, names)
    if settings.monitor.patience is None and not settings.restore_best:
      return
    value = settings.monitor.value(values)
    if progress.best.update(settings.monitor, value, progress.step):
      self.kept = own(self._leaves()) if settings.restore_best else None
    progress.stopped_early = progress.best.exhausted(settings.monitor)

  def _end_stage(self, stage: Stage) -> None:
    if self.kept is not None:
      self._return(self.kept)
      self.kept = None
    if stage.remember or stage.ends_task:
      self._between(self.learner.end_task, stage.remember, END_TASK)
    state = self._state()
    if self.settings.after_stage is not None:
      row = self.settings.after_stage(
        self.learner.params(state), state.model_state, self.progress.stage
      )
      self.progress.matrix.append([float(x) for x in row])
    self.progress.stage, self.progress.index = self.progress.stage + 1, 0

  def _between(
    self, act: Callable[..., TrainState], batches: Sequence[Batch], number: int
  ) -> None:
    """Lets the learner act between two steps, at an end of a task."""
    rng = folded(folded(self.rng, self.progress.step), number)
    before = self._state()
    after = act(before, self.settings.forward, batches, rng)
    changed = rewritten(before, after)
    # What it remembers may be the very leaves that move on: copied there.
    placed = self.settings.place_state(after)
    self._take(placed if changed else placed.replace(frozen=self.frozen))
    if changed:
      self.progress.rewritten = sorted({*self.progress.rewritten, *changed})
      if self.saver is not None:
        self.saver.hold(self.frozen)

  def _save(self) -> None:
    if self.saver is not None:
      self.metrics.sync()
      progress = dataclasses.asdict(self.progress)
      state = dataclasses.replace(self.moving, dormant=self.dormant)
      self.saver.save(self.progress.step, state, self.kept, progress)

  def _flush(self) -> None:
    """Fetches, checks and logs the metrics of the last dispatch."""
    if self.pending is None:
      return
    first, device_metrics = self.pending
    self.pending = None
    fetched = jax.device_get(device_metrics)
    require_finite(first, fetched, self._last_good)
    stage = self.stages[self.progress.stage].name
    length = len(fetched['loss'])
    last = self.last_step()
    for i in range(length):
      step = first + i + 1
      values = {name: column[i] for name, column in fetched.items()}
      record = step_record(step, stage, values)
      if step % self.settings.log_every == 0 or step == last:
        self.metrics.write(record)
      if i == length - 1:
        self.metrics.scalars(step, record)
        self.live.update(record, self._rate(), last=step == last)

  def _last_good(self) -> str:
    step = None if self.saver is None else self.saver.last_saved()
    if self.saver is None or step is None:
      return 'there is no checkpoint'
    return f'last good checkpoint: {self.saver.path(step)}'

  def _state(self) -> TrainState:
    return dataclasses.replace(
      self.moving, frozen=self.frozen, dormant=self.dormant
    )

  def _leaves(self) -> dict[str, Any]:
    return {
      'trainable': self.moving.trainable,
      'model_state': self.moving.model_state,
      'averages': find_averages(self.moving.opt_state),
    }

  def _return(self, kept: dict[str, Any]) -> None:
    """Puts back what `_leaves` gave at the best evaluation."""
    averages = kept['averages']
    self.moving = dataclasses.replace(
      self.moving,
      trainable=kept['trainable'],
      model_state=kept['model_state'],
      opt_state=put_averages(self.moving.opt_state, averages),
    )

  def _rate(self) -> float:
    return self.examples / self.seconds if self.seconds else 0.0
