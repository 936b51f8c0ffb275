"""Learning without forgetting."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import streamed
import toys

from fmeta import UsageError, losses, optim, penalty, stream
from fmeta.learner import finetune

FORWARD = toys.three_layers
PARAMS = toys.three_kernels()
LOSS = losses.supervised(FORWARD, losses.softmax_cross_entropy)
BATCH = toys.batch_of(5, weight=[1, 2, 1, 0, 1])
ONE_HEAD = np.ones((1, 3), bool)
TWO_HEADS = stream.class_mask([[0, 2], [1]], 3)
TEMPERATURE = 3.0


def _labelled(*labels, **columns):
  batch = toys.batch_of(len(labels))
  return {**batch, 'label': jnp.asarray(labels), **columns}


def _taught(heads, batches, params=PARAMS):
  """The penalty, its state after a task, the teacher and a student."""
  made = penalty.lwf(FORWARD, 0.7, heads, TEMPERATURE)
  teacher = jax.tree.map(lambda x: x + 0.2, params)
  state = made.init(params, params)
  state = made.consolidate(
    state, teacher, teacher, {}, FORWARD, batches, streamed.KEY
  )
  return made, state, teacher, jax.tree.map(lambda x: 1.3 * x, params)


def _softmax(logits):
  high = np.exp(logits - logits.max(-1, keepdims=True))
  return high / high.sum(-1, keepdims=True)


def _by_hand(teacher, student, heads, batch):
  """Each head's logits cut out, its divergence row by row."""
  total = 0.0
  then, now = (
    np.asarray(FORWARD(p, {}, batch, None)[0], np.float64)
    for p in (teacher, student)
  )
  for head in heads:
    p, q = (_softmax(z[:, head] / TEMPERATURE) for z in (then, now))
    rows = (p * np.log(p / q)).sum(-1)
    total += np.average(rows, weights=batch['weight'])
  return 0.7 * TEMPERATURE**2 * total


SCENARIOS = {
  'task: the first head': (TWO_HEADS, [0, 2], [[0, 2]]),
  'task: both heads': (TWO_HEADS, [0, 1, 2], [[0, 2], [1]]),
  'class: the classes so far': (ONE_HEAD, [2, 0, 2], [[0, 2]]),
  'domain: the whole head': (ONE_HEAD, [0, 1, 2], [[0, 1, 2]]),
}


@pytest.mark.parametrize('name', SCENARIOS)
def test_value_is_the_divergence_over_what_the_teacher_knows(name, x64):
  heads, labels, known = SCENARIOS[name]
  params, batch = toys.double((PARAMS, BATCH))
  made, state, teacher, student = _taught(heads, [_labelled(*labels)], params)
  value = made.value(student, student, state, batch, None)
  by_hand = _by_hand(teacher, student, known, batch)
  np.testing.assert_allclose(value, by_hand, rtol=1e-12)
  assert value > 1e-3


def test_classes_become_known_batch_by_batch_and_task_by_task():
  padded = _labelled(1, 0, weight=jnp.asarray([0.0, 1.0]))
  made, state, teacher, student = _taught(ONE_HEAD, [padded])
  np.testing.assert_array_equal(state['known'], [[True, False, False]])
  later = [_labelled(2), _labelled(2)]
  after = made.consolidate(
    state, student, student, {}, FORWARD, later, streamed.KEY
  )
  np.testing.assert_array_equal(after['known'], [[True, False, True]])
  jax.tree.map(np.testing.assert_array_equal, after['teacher'], student)


def test_at_the_teacher_the_gradient_is_zero_and_the_value_too(x64):
  params, batch = toys.double((PARAMS, BATCH))
  made, state, teacher, student = _taught(ONE_HEAD, [_labelled(0, 1)], params)
  slope = jax.value_and_grad(lambda p: made.value(p, p, state, batch, None))
  value, grads = slope(teacher)
  np.testing.assert_allclose(value, 0, atol=1e-15)
  for g in jax.tree.leaves(grads):
    np.testing.assert_allclose(g, 0, atol=1e-15)
  # A minimum: every way off the teacher costs.
  assert slope(student)[0] > 0
  assert any(np.any(g) for g in jax.tree.leaves(slope(student)[1]))


def test_classes_that_the_teacher_does_not_know_get_no_gradient():
  made, state, _, student = _taught(ONE_HEAD, [_labelled(0, 2)])
  grads = jax.grad(lambda p: made.value(p, p, state, BATCH, None))(student)
  assert not np.any(grads['head']['kernel'][:, 1])
  assert np.any(grads['head']['kernel'][:, 0])


def test_the_gradient_is_that_of_the_cross_entropy_with_the_teacher(x64):
  params, batch = toys.double((PARAMS, BATCH))
  made, state, teacher, student = _taught(
    ONE_HEAD, [_labelled(0, 1, 2)], params
  )
  soft = jax.nn.softmax(FORWARD(teacher, {}, batch, None)[0] / TEMPERATURE)

  def cross_entropy(p):
    logits, _ = FORWARD(p, {}, batch, None)
    rows = -(soft * jax.nn.log_softmax(logits / TEMPERATURE)).sum(-1)
    mean = (rows * batch['weight']).sum() / batch['weight'].sum()
    return 0.7 * TEMPERATURE**2 * mean

  found = jax.grad(lambda p: made.value(p, p, state, batch, None))(student)
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-10, atol=1e-14),
    found,
    jax.grad(cross_entropy)(student),
  )


def test_before_a_task_has_ended_training_is_plain_bitwise():
  heads = np.ones((1, 3), bool)
  held = finetune(
    LOSS, optim.sgd(0.1), penalty=penalty.lwf(FORWARD, 5.0, heads)
  )
  plain = finetune(LOSS, optim.sgd(0.1))
  ((path, _),) = streamed.run(held, PARAMS, [[BATCH] * 3], FORWARD)
  ((free, _),) = streamed.run(plain, PARAMS, [[BATCH] * 3], FORWARD)
  jax.tree.map(
    np.testing.assert_array_equal, path[-1].trainable, free[-1].trainable
  )


def test_statistics_of_the_boundary_are_used_and_have_to_be_announced():
  module = toys.NormNet()
  forward = toys.forward_of(module)
  params, model_state = toys.init_of(module)
  batch = toys.batch_of(6)
  made = penalty.lwf(forward, 1.0, ONE_HEAD, model_state=model_state)
  state = made.init(params, params)
  moved = jax.tree.map(lambda x: x + 0.5, model_state)
  args = params, params, moved, forward, [batch], streamed.KEY
  state = made.consolidate(state, *args)
  jax.tree.map(np.testing.assert_array_equal, state['model_state'], moved)
  student = jax.tree.map(lambda x: x + 0.3, params)
  found = made.value(student, student, state, batch, None)
  q, p = (
    jax.nn.log_softmax(forward(each, moved, batch, None)[0] / 2)
    for each in (student, params)
  )
  by_hand = 4 * (jnp.exp(p) * (p - q)).sum(-1).mean()
  np.testing.assert_allclose(found, by_hand, rtol=1e-5)
  silent = penalty.lwf(forward, 1.0, ONE_HEAD)
  with pytest.raises(UsageError, match=r'pass model_state=\.\.\.'):
    silent.consolidate(silent.init(params, params), *args)


def test_shapes_and_labels_that_do_not_fit_are_refused():
  for heads in (np.ones(3, bool), np.ones((1, 3))):
    with pytest.raises(UsageError, match=r'give bool \[heads, classes\]'):
      penalty.lwf(FORWARD, 1.0, heads)
  for batch, said in (
    (_labelled(0, 3), 'label 3 with heads over 3 classes'),
    (_labelled(-1, 0), 'label -1 with heads over 3 classes'),
    ({**BATCH, 'label': jnp.ones((5, 3))}, 'consolidates class numbers'),
  ):
    with pytest.raises(UsageError, match=said):
      _taught(ONE_HEAD, [batch])
  made, state, _, student = _taught(np.ones((1, 4), bool), [_labelled(0)])
  with pytest.raises(UsageError, match='heads over 4 classes'):
    made.value(student, student, state, BATCH, None)
