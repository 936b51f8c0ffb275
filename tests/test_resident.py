"""Data that stay on the device are the data that were sent."""

import dataclasses

import jax
import numpy as np
import pytest
from test_train import KEY, LOSS, assert_same, forward, losses, parameters

import fmeta
from fmeta import data, episodes, fewshot, optim, sharding, train
from fmeta.errors import UsageError

WAYS, SHOTS, QUERIES, TASKS = 3, 2, 3, 8


def columns():
  random = np.random.default_rng(5)
  label = np.repeat(np.arange(7, dtype=np.int32), 9)
  x = random.normal(size=(len(label), 6)).astype(np.float32)
  name = np.array([f'row {k}' for k in range(len(label))], object)
  return {'x': x, 'label': label, 'name': name}


def source(**options):
  return episodes.episodes(
    columns(), WAYS, SHOTS, QUERIES, 11, tasks=TASKS, **options
  )


def maml():
  inner = fmeta.finetune(LOSS, optim.sgd(0.3))
  return fmeta.finetune(fmeta.episode_loss(inner, LOSS, 2), optim.adam(1e-2))


def fitted(learner, batches, **options):
  state = learner.init(parameters(), jax.random.key(1))
  stages = [train.Stage('meta', batches, 6)]
  return train.fit(learner, state, stages, KEY, quiet=True, **options)


def only_x():
  return {'x': columns()['x']}


def test_rows_and_labels_are_those_of_the_episodes():
  made, rows = source()(4), source().by_row(4)
  x = columns()['x']
  for part in ('support', 'query'):
    np.testing.assert_array_equal(x[rows[part]['row']], made[part]['x'])
    np.testing.assert_array_equal(rows[part]['label'], made[part]['label'])
    assert rows[part]['row'].dtype == np.int32
    assert set(rows[part]) == {'row', 'label'}


def test_tasks_of_any_size_are_named_by_row_too():
  limits = fewshot.Limits(2, 4, 2, 9)
  source = fewshot.varied_episodes(columns(), 3, limits, tasks=4)
  learner = fmeta.finetune(
    fewshot.head_loss(fewshot.prototypes, forward, 4), optim.adam(1e-2)
  )
  program = train.Resident(learner, only_x())
  found = fitted(learner, source.by_row, program=program)
  other = fmeta.finetune(
    fewshot.head_loss(fewshot.prototypes, forward, 4), optim.adam(1e-2)
  )
  expected = fitted(other, source)
  assert losses(found) == losses(expected)
  assert_same(found.state, expected.state)
  bare = dataclasses.replace(source, collate=lambda batch: batch)
  with pytest.raises(UsageError, match='cannot be given by row'):
    bare.by_row(0)


@pytest.mark.parametrize('dispatched', [1, 4])
def test_meta_training_by_row_is_meta_training_bitwise(dispatched):
  learner, other = maml(), maml()
  expected = fitted(learner, source())
  program = train.Resident(other, only_x())
  found = fitted(
    other, source().by_row, program=program, steps_per_dispatch=dispatched
  )
  assert_same(found.state, expected.state)
  assert losses(found) == losses(expected)
  assert found.traces == len({dispatched, 6 % dispatched} - {0})


def test_plain_batches_may_name_rows_too():
  learner = fmeta.finetune(LOSS, optim.sgd(0.1))
  three = {**columns(), 'label': columns()['label'] % 3}
  numbers = data.batches(three, 8, seed=3)
  found = fitted(
    learner,
    lambda i: {'row': numbers.rows(i).astype(np.int32)},
    program=train.Resident(learner, three),
  )
  assert_same(found.state, fitted(learner, numbers).state)


def test_each_device_of_a_mesh_has_the_rows():
  learner, mesh = maml(), sharding.make_mesh({'data': 8})
  program = train.Resident(learner, only_x(), mesh)
  assert program.resident['x'].sharding.is_fully_replicated
  found = fitted(learner, source().by_row, program=program, mesh=mesh)
  expected = fitted(learner, source(), mesh=mesh)
  assert_same(found.params, expected.params)


def test_a_killed_run_continues_by_row(tmp_path):
  learner = maml()
  expected = fitted(
    learner, source().by_row, program=train.Resident(learner, only_x())
  )

  def part(stop, **options):
    def batches(i):
      if i == stop:
        raise KeyboardInterrupt
      return source().by_row(i)

    return fitted(
      learner,
      batches,
      program=train.Resident(learner, only_x()),
      workdir=tmp_path / 'run',
      checkpoint_every=2,
      **options,
    )

  with pytest.raises(KeyboardInterrupt):
    part(5)
  assert_same(part(None, resume=True).state, expected.state)


def test_collated_rows_cannot_be_named():
  with pytest.raises(UsageError, match='pad the columns first'):
    source(collate=lambda batch: batch).by_row(0)


def test_unequal_columns_are_refused():
  with pytest.raises(UsageError, match='differ in length'):
    train.Resident(maml(), {'x': np.zeros((3, 6)), 'y': np.zeros(2)})
