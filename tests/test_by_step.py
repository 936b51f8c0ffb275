"""Answers after each inner step, and accuracies and calibration from them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fmeta
from fmeta import evaluate, fewshot, metrics, optim
from tests import toys

STEPS = 3
KEY = jax.random.key(0)
FORWARD = toys.forward_of(toys.Net())
LOSS = fmeta.supervised(FORWARD, fmeta.softmax_cross_entropy)


@pytest.fixture(scope='module')
def params():
  return toys.Net().init(jax.random.key(3), jnp.zeros((1, 4)))['params']


def episode(tasks=2, rows=6):
  random = np.random.default_rng(0)

  def part():
    return {
      'x': random.normal(size=(tasks, rows, 4)).astype(np.float32),
      'label': random.integers(0, 3, (tasks, rows)).astype(np.int32),
    }

  return {'support': part(), 'query': part()}


@pytest.mark.parametrize(
  'tuning', [fmeta.full(), fmeta.lora('body/.*/kernel', rank=2)]
)
def test_each_step_is_a_loop_of_so_many_steps(params, tuning):
  inner = fmeta.finetune(LOSS, optim.sgd(0.5), tuning=tuning)
  batch = episode()
  found = fewshot.predict_by_step(inner, FORWARD, STEPS)(params, batch, KEY)
  assert found.shape == (2, STEPS + 1, 6, 3)
  for k in range(STEPS + 1):
    alone = fmeta.predict_episodes(inner, FORWARD, k)(params, batch, KEY)
    np.testing.assert_allclose(found[:, k], alone, rtol=1e-5, atol=1e-6)
  assert np.abs(found[:, -1] - found[:, 0]).max() > 1e-3


def answers(steps=4):
  random = np.random.default_rng(1)
  labels = random.integers(0, 3, (5, 7))
  weight = (random.random((5, 7)) < 0.7).astype(float)
  weight[:, 0] = 1
  return evaluate.Answers(random.normal(size=(5, steps, 7, 3)), labels, weight)


def test_accuracies_leave_padding_out_after_every_step():
  given = answers()
  assert given.accuracies.shape == (5, 4)
  for task in range(5):
    kept = given.weight[task] > 0
    for k in range(4):
      right = given.logits[task, k].argmax(-1) == given.labels[task]
      assert given.accuracies[task, k] == pytest.approx(right[kept].mean())


def test_calibration_is_that_of_all_queries():
  given = answers()
  kept = given.weight.ravel() > 0
  errors = given.calibration_error
  assert errors.shape == (4,)
  for k in range(4):
    probabilities = jax.nn.softmax(given.logits[:, k].reshape(-1, 3))
    by_hand = metrics.expected_calibration_error(
      probabilities[kept], given.labels.ravel()[kept]
    )
    assert errors[k] == pytest.approx(by_hand, abs=1e-6)


def test_answers_of_all_steps_come_in_one_call(params):
  inner = fmeta.finetune(LOSS, optim.sgd(0.5))
  by_step = fewshot.predict_by_step(inner, FORWARD, STEPS)
  found = evaluate.answer_episodes(by_step, params, lambda i: episode(), 3)
  assert found.logits.shape == (3, STEPS + 1, 6, 3)
  last = fmeta.predict_episodes(inner, FORWARD, STEPS)
  expected = evaluate.evaluate_episodes(last, params, lambda i: episode(), 3)
  np.testing.assert_array_equal(found.accuracies[:, -1], expected)
