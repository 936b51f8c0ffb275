"""A stream killed twenty times equals one that was never killed, bitwise."""

import random

import continual_zoo as zoo
import jax
import numpy as np
import pytest

from fmeta import penalty, train
from fmeta.testing import assert_same

KEY = jax.random.key(17)
BATCH, LOOK, MEASURE = range(3)  # in the order of a task's end


class Died(Exception):
  """Stands for a kill: nothing after it runs."""


def points(method, seed):
  """Twenty points of a stream: within tasks, importance passes, at ends."""
  draw = random.Random(seed)
  end = zoo.STEPS
  every = [
    (task, step, BATCH, step)
    for task in range(zoo.TASKS)
    for step in range(end)
  ]
  ends = [(task, end, MEASURE, task) for task in range(zoo.TASKS)]
  if method.remembers:
    ends += [
      (task, end, LOOK, k) for task in range(zoo.TASKS) for k in range(2)
    ]
  return sorted(draw.sample(every, 20 - len(ends)) + ends)


class Fate:
  """Raises `Died` at each of the points, once."""

  def __init__(self, left):
    self.left, self.dead = list(left), False

  def meet(self, task, kind, number):
    if self.left and self.left[0][::2] == (task, kind):
      if self.left[0][3] == number and not self.dead:
        self.left.pop(0)
        self.dead = True
    if self.dead:  # What reads ahead may ask once more.
      raise Died

  def stage(self, task, stage):
    def batches(i):
      self.meet(task, BATCH, i)
      return stage.batches(i)

    fate = self

    class Looked(list):
      def __iter__(self):
        for k in range(len(self)):
          fate.meet(task, LOOK, k)
          yield self[k]

    looked = Looked(stage.remember)
    return stage._replace(batches=batches, remember=looked)

  def measure(self, params, state, stage):
    self.meet(stage, MEASURE, stage)
    return zoo.row_of_matrix(params, state, stage)


@pytest.mark.parametrize('name', zoo.METHODS)
@pytest.mark.usefixtures('optimised')
def test_twenty_deaths_change_no_bit(name, tmp_path):
  method = zoo.METHODS[name]
  learner = method.learner()
  program = train.Program(learner)
  start = learner.init(method.params, KEY)
  options = {
    'forward': zoo.FORWARD,
    'steps_per_dispatch': 3,
    'checkpoint_every': 5,
    'quiet': True,
    'program': program,
  }
  stages = zoo.stages(method)
  whole = train.fit(
    learner,
    start,
    stages,
    KEY,
    after_stage=zoo.row_of_matrix,
    workdir=tmp_path / 'whole',
    **options,
  )
  fate = Fate(points(method, name))
  doomed = [fate.stage(k, stage) for k, stage in enumerate(stages)]
  deaths, fitted = 0, None
  while fitted is None:
    fate.dead = False
    try:
      fitted = train.fit(
        learner,
        start,
        doomed,
        KEY,
        after_stage=fate.measure,
        workdir=tmp_path / 'killed',
        resume=deaths > 0,
        **options,
      )
    except Died:
      deaths += 1
  assert deaths == 20 and not fate.left
  assert_same(whole.state, fitted.state, name)
  assert whole.matrix == fitted.matrix
  losses = [record['loss'] for record in whole.history]
  assert losses == [record['loss'] for record in fitted.history]
  assert len(losses) == zoo.TASKS * zoo.STEPS
  # Of the model: factors that a task's end has folded are as at the start.
  first, last = (
    penalty.moving_leaves(state.trainable, learner.params(state))
    for state in (start, whole.state)
  )
  moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), first, last)
  assert all(jax.tree.leaves(moved))
