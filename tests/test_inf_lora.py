"""InfLoRA: a task moves kernels where earlier inputs are not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_methods as methods
import toys
from test_gpm import by_hand, columns, linear, low_rank

import fmeta
from fmeta import (
  UsageError,
  adapters,
  continual,
  losses,
  models,
  optim,
  penalty,
  train,
  tree,
)
from fmeta.learner import finetune
from fmeta.testing import assert_same

LOSS, PARAMS, BATCH, FORWARD = toys.problem(dropout=0.2)
KEY = jax.random.key(8)
EVERY = '.*/kernel'
FIRST = 'body/layer_0/kernel'


def learner_of(
  forward=FORWARD, tuning=None, optimizer=None, tasks=3, hold=None, **options
):
  tuning = tuning or adapters.lora_fa(EVERY, rank=2, alpha=3.0)
  inner = finetune(
    losses.supervised(forward, losses.softmax_cross_entropy),
    optimizer or optim.sgd(0.3),
    tuning=tuning,
    penalty=hold,
  )
  return continual.inf_lora(inner, tasks, **options)


def a_of(state, kernel=FIRST):
  return np.asarray(tree.get(state.frozen, f'{kernel}.lora_a'), float)


def basis_of(state, kernel=FIRST):
  return columns(state.penalty_state['basis'][kernel])


def task(learner, state, batch, forward=FORWARD, steps=0):
  """The states as the task has begun, after its steps and after its end."""
  begun = learner.begin_task(state, forward, [batch], KEY)
  step, last = jax.jit(learner.step), begun
  for _ in range(steps):
    last, _ = step(last, batch, KEY)
  return begun, last, learner.end_task(last, forward, [batch], KEY)


def answers(learner, state, batch, forward):
  return np.asarray(forward(learner.params(state), {}, batch, None)[0])


def test_a_network_of_adapted_layers_keeps_its_outputs_on_old_inputs(x64):
  """Two rows span two directions in every layer, tanh or not."""
  old, new = low_rank(6, rows=2), low_rank(6, rows=8, seed=1)
  learner = learner_of(epsilon=1.0)
  state = learner.init(toys.double(PARAMS), KEY)
  _, last, state = task(learner, state, old, steps=3)
  first = np.asarray(FORWARD(toys.double(PARAMS), {}, old, None)[0])
  before = answers(learner, state, old, FORWARD)
  assert np.abs(before - first).max() > 0.1  # it learned the first task
  np.testing.assert_allclose(
    before, answers(learner, last, old, FORWARD), rtol=0, atol=1e-14
  )
  far = answers(learner, state, new, FORWARD)
  _, last, after = task(learner, state, new, steps=20)
  for each in (last, after):
    np.testing.assert_allclose(
      answers(learner, each, old, FORWARD), before, rtol=0, atol=1e-12
    )
  assert np.abs(answers(learner, after, new, FORWARD) - far).max() > 0.1


def test_plain_lora_does_change_them(x64):
  """So the test above could fail."""
  old, new = low_rank(6, rows=2), low_rank(6, rows=8, seed=1)
  loss = losses.supervised(FORWARD, losses.softmax_cross_entropy)
  tuning = adapters.lora_fa(EVERY, rank=2, alpha=3.0)
  learner = finetune(loss, optim.sgd(0.3), tuning=tuning)
  state = learner.init(toys.double(PARAMS), KEY)
  before = answers(learner, state, old, FORWARD)
  for _ in range(3):
    state, _ = jax.jit(learner.step)(state, new, KEY)
  assert np.abs(answers(learner, state, old, FORWARD) - before).max() > 1e-3


def test_it_is_gradient_descent_on_kernels_within_the_span_of_a(x64):
  """W <- W - rate s^2 A A' dL/dW, with s = alpha / rank."""
  forward, params = linear()
  params = toys.double(params)
  learner = learner_of(forward)
  loss = losses.supervised(forward, losses.softmax_cross_entropy)
  slope = jax.jit(jax.grad(lambda p, b: loss(p, {}, b, None)[0]))
  state, expected = learner.init(params, KEY), params
  for seed in range(2):
    batch = low_rank(3, seed=seed)
    begun, _, state = task(learner, state, batch, forward, steps=4)
    for _ in range(4):
      grads = slope(expected, batch)

      def moved(name, leaf, grad, begun=begun):
        if not name.endswith('kernel'):
          return leaf
        a = a_of(begun, name)
        return leaf - 0.3 * 1.5**2 * a @ (a.T @ np.asarray(grad))

      expected = tree.map_with_name(moved, expected, grads)
    jax.tree.map(
      lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=1e-12),
      learner.params(state),
      expected,
    )


@pytest.mark.parametrize('traced', [False, True])
def test_factors_and_bases_of_three_tasks_are_those_of_the_equations(
  traced, x64
):
  learner = learner_of(epsilon=0.6)
  state, expected = learner.init(toys.double(PARAMS), KEY), np.zeros((6, 0))
  begin = lambda s, b: learner.begin_task(s, FORWARD, [b], KEY)
  end = lambda s, b: learner.end_task(s, FORWARD, [b], KEY)
  if traced:
    begin, end = jax.jit(begin), jax.jit(end)
  for k, energy in enumerate([0.6, 0.6 + 0.4 / 3, 0.6 + 0.8 / 3]):
    batch = toys.double(toys.batch_of(8, seed=k))
    x = np.asarray(batch['x'])
    state = begin(state, batch)
    rest = x.T - expected @ expected.T @ x.T
    leading = np.linalg.svd(rest)[0][:, :2]
    a = a_of(state)
    np.testing.assert_allclose(a.T @ a, np.eye(2), rtol=0, atol=1e-12)
    np.testing.assert_allclose(expected.T @ a, 0, rtol=0, atol=1e-12)
    np.testing.assert_allclose(a @ a.T, leading @ leading.T, rtol=0, atol=1e-12)
    state = end(state, batch)
    expected = by_hand(expected, x, energy)
    found = basis_of(state)
    np.testing.assert_allclose(
      found @ found.T, expected @ expected.T, rtol=0, atol=1e-12
    )
  assert 1 < expected.shape[1] <= 6


def test_a_later_task_than_announced_has_threshold_one():
  learner = learner_of(tasks=1, epsilon=0.1)
  state = learner.init(PARAMS, KEY)
  sizes = []
  for k in range(2):
    state = task(learner, state, toys.batch_of(3, seed=k))[-1]
    sizes.append(basis_of(state).shape[1])
  assert sizes == [1, 4]


def test_where_all_inputs_were_seen_nothing_is_left_to_move():
  learner = learner_of(epsilon=1.0)
  state = task(learner, learner.init(PARAMS, KEY), BATCH)[-1]
  assert basis_of(state).shape == (6, 6)
  begun, last, _ = task(learner, state, toys.batch_of(9, seed=4), steps=2)
  assert not np.any(a_of(begun))
  assert_same(begun.trainable, last.trainable, 'B')


def test_fewer_directions_than_the_rank_leave_columns_of_zeros():
  learner = learner_of(
    tuning=adapters.lora_fa('body/.*/kernel', rank=4), epsilon=1.0
  )
  state = task(learner, learner.init(PARAMS, KEY), low_rank(2))[-1]
  begun, last, _ = task(learner, state, low_rank(3, 3, seed=1), steps=2)
  a = a_of(begun)
  np.testing.assert_allclose(
    a.T @ a, np.diag([1.0, 1, 1, 0]), rtol=0, atol=1e-6
  )
  b = np.asarray(tree.get(last.trainable, f'{FIRST}.lora_b'))
  assert np.all(np.any(b[:3], 1)) and not np.any(b[3])


@pytest.mark.parametrize('large', [0.0, 1.0])
def test_a_direction_that_is_hardly_new_is_orthogonal_to_the_basis(large):
  """Beside old inputs only, and beside a direction that is new and large."""
  learner = learner_of(epsilon=1.0)
  old, small, new = (low_rank(k, seed=k)['x'] for k in (3, 2, 1))
  label = jnp.zeros(len(old), jnp.int32)
  state = learner.init(PARAMS, KEY)
  state = task(learner, state, {'x': old, 'label': label})[-1]
  near = {'x': old + 3e-4 * small + large * new, 'label': label}
  a = a_of(learner.begin_task(state, FORWARD, [near], KEY))
  np.testing.assert_allclose(a.T @ a, np.eye(2), rtol=0, atol=1e-6)
  np.testing.assert_allclose(basis_of(state).T @ a, 0, rtol=0, atol=1e-6)


def test_passes_draw_nothing_and_leave_statistics_alone():
  module = toys.NormNet()
  forward = toys.forward_of(module)
  params, model_state = toys.init_of(module)
  tuning = adapters.lora_fa(EVERY, rank=2, also=('body/norm/.*',))
  learner = learner_of(forward, tuning)
  state = learner.init(params, KEY, model_state)
  begun, last, ended = task(learner, state, BATCH, forward, steps=1)
  assert_same(model_state, begun.model_state, 'begun')
  assert_same(last.model_state, ended.model_state, 'ended')
  learner, other = learner_of(), jax.random.key(99)  # with dropout
  state = learner.init(PARAMS, KEY)
  first = learner.begin_task(state, FORWARD, [BATCH], KEY)
  again = learner.begin_task(first, FORWARD, [BATCH], other)
  assert np.any(a_of(first))
  assert_same(first, again, 'begun twice')


def test_a_penalty_inside_learns_as_it_does_alone():
  tuning = adapters.lora_fa(EVERY, rank=2)
  hold = penalty.ewc(2.0)
  learner = learner_of(tuning=tuning, hold=hold)
  _, last, state = task(learner, learner.init(PARAMS, KEY), BATCH, steps=2)
  inside = last.penalty_state['inner']
  params = learner.params(last)
  given = last.trainable, params, {}, FORWARD, [BATCH], KEY
  expected = hold.consolidate(inside, *given)
  assert_same(expected, state.penalty_state['inner'], 'consolidated')
  fresh = learner.begin_task(state, FORWARD, [toys.batch_of(seed=7)], KEY)
  moved = learner.step(fresh, BATCH, KEY)[0]
  pull = lambda state: learner.step(state, BATCH, KEY)[1].metrics['penalty']
  assert pull(fresh) < 1e-8 < pull(moved)


PADDED = {
  'input_ids': jnp.asarray([[1, 2, 3], [4, 5, 0], [3, 0, 0]]),
  'attention_mask': jnp.asarray([[1, 1, 1], [1, 1, 0], [1, 0, 0]]),
  'label': jnp.asarray([0, 1, 2]),
}
WHERE = 'body/layer_0/(attention/(key|value)|mlp/down)/kernel'


def of_text(real):
  inner = finetune(
    methods.OF_TEXT,
    fmeta.adamw_per_leaf(0.01),
    tuning=adapters.lora_fa(WHERE, rank=2, also=('head/.*',)),
  )
  return continual.inf_lora(inner, 3, epsilon=0.5, real=real)


def mask_of(batch):
  return batch['attention_mask']


def test_padding_of_texts_is_no_input():
  learner = of_text(mask_of)
  params, _ = models.init(methods.BERT, KEY, PADDED)
  state = learner.init(methods.grown(params), KEY)
  forward = models.forward(methods.BERT)

  def projectors(batches):
    begun = learner.begin_task(state, forward, batches, KEY)
    ended = learner.end_task(begun, forward, batches, KEY)
    kernels = sorted(ended.penalty_state['basis'])
    return [
      x @ x.T
      for kernel in kernels
      for x in (a_of(begun, kernel), basis_of(ended, kernel))
    ]

  alone = [jax.tree.map(lambda x, k=k: x[k : k + 1], PADDED) for k in range(3)]
  short = [
    {**row, **{key: row[key][:, :n] for key in ('input_ids', 'attention_mask')}}
    for row, n in zip(alone, (3, 2, 1), strict=True)
  ]
  for x, y in zip(projectors([PADDED]), projectors(short), strict=True):
    assert np.any(x)
    np.testing.assert_allclose(x, y, rtol=0, atol=1e-4)


def test_one_program_serves_all_tasks_of_a_text_model():
  learner = of_text(mask_of)
  params, _ = models.init(methods.BERT, KEY, PADDED)
  stages = [
    train.Stage(f't{k}', lambda i: PADDED, 3, [PADDED], prepare=[PADDED])
    for k in range(3)
  ]
  fitted = train.fit(
    learner,
    learner.init(methods.grown(params), KEY),
    stages,
    KEY,
    forward=models.forward(methods.BERT),
    steps_per_dispatch=3,
    quiet=True,
  )
  assert fitted.traces == 1
  assert fitted.state.penalty_state['ended'] == 3


def test_bad_requests_are_refused():
  with pytest.raises(UsageError, match='num_tasks=0'):
    learner_of(tasks=0)
  with pytest.raises(UsageError, match='there is none.*tuning=lora_fa'):
    learner_of(tuning=adapters.lora(EVERY, rank=2)).init(PARAMS, KEY)
  conv = {**PARAMS, 'conv': {'kernel': jnp.ones((3, 3, 2, 4))}}
  with pytest.raises(UsageError, match=r"'conv/kernel' \[3, 3, 2, 4\] is no"):
    learner_of().init(conv, KEY)
  learner = learner_of()
  state = learner.init(PARAMS, KEY)
  with pytest.raises(UsageError, match='batches to `prepare`'):
    learner.begin_task(state, FORWARD, [], KEY)
  with pytest.raises(UsageError, match='task 0 ends without having begun'):
    learner.end_task(state, FORWARD, [BATCH], KEY)
  with pytest.raises(UsageError, match='batches to `remember`'):
    learner.end_task(state, FORWARD, [], KEY)
  odd = {**BATCH, 'weight': jnp.ones(3)}
  with pytest.raises(UsageError, match='rows are not those of a batch of 3'):
    learner.begin_task(state, FORWARD, [odd], KEY)


def test_without_having_begun_factors_rest():
  learner = learner_of()
  state = learner.init(PARAMS, KEY)
  assert not np.any(a_of(state))
  after = jax.jit(learner.step)(state, BATCH, KEY)[0]
  assert_same(state.trainable, after.trainable, 'B')
