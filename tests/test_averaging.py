"""Averages of the weights against sums written out by hand, and torch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toys

from fmeta import adapters, averaging, optim, train, tuning
from fmeta.errors import UsageError
from fmeta.learner import adapt, finetune

KEY = jax.random.key(3)
LOSS, PARAMS, BATCH, _ = toys.problem()
TOTAL = 12


@functools.cache
def compiled(make):
  """(*numbers) -> the leaves and the average after 1, 2, ... steps."""

  @jax.jit
  def run(*numbers):
    inner = optim.sgd(0.3)
    learner = finetune(LOSS, make(inner, *numbers) if make else inner)

    def every(state, aux):
      kept = averaging.find_averages(state.opt_state)
      return state.trainable, kept[0].average if kept else {}

    return adapt(
      learner,
      learner.init(PARAMS, KEY),
      lambda i: BATCH,
      KEY,
      num_steps=TOTAL,
      every=every,
    )[1]

  return run


def run(make=None, *numbers):
  """The leaves after 0, 1, ... steps, and what `make` averaged after each."""
  path, averages = compiled(make)(*numbers)
  first = jax.tree.map(lambda p, rest: jnp.stack([p, *rest]), PARAMS, path)
  return jax.tree.map(np.float64, (first, averages))


EMA = averaging.ema, 0.8
SWA = averaging.swa, 4, 3


def assert_near(found, expected, rtol=2e-6):
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=rtol),
    found,
    expected,
  )


def weighted(path, weights):
  """sum_t w_t p_t / sum_t w_t over the steps in `weights`."""
  total = sum(weights.values())
  return jax.tree.map(
    lambda p: sum(w * p[t] for t, w in weights.items()) / total, path
  )


@pytest.mark.parametrize('which', [EMA, SWA], ids=['ema', 'swa'])
def test_an_average_does_not_change_the_steps(which):
  jax.tree.map(np.testing.assert_array_equal, run(*which)[0], run()[0])


def test_ema_is_the_weighted_sum_of_all_weights_so_far():
  path, averages = run(*EMA)
  for t in range(1, TOTAL + 1):
    weights = {i: 0.8 ** (t - i) for i in range(1, t + 1)}
    now = jax.tree.map(lambda x, t=t: x[t - 1], averages)
    assert_near(now, weighted(path, weights))


def test_the_starting_point_has_no_share_bitwise():
  path, averages = run(averaging.ema, 0.9999)
  jax.tree.map(
    lambda p, a: np.testing.assert_array_equal(a[0], p[1]), path, averages
  )
  path, averages = run(averaging.ema, 0.0)
  jax.tree.map(
    lambda p, a: np.testing.assert_array_equal(a, p[1:]), path, averages
  )


def test_ema_equals_optax_on_the_path_of_the_weights():
  path, averages = run(*EMA)
  track = optax.ema(0.8, debias=True)
  state = track.init(PARAMS)
  for t in range(1, TOTAL + 1):
    point = jax.tree.map(lambda x, t=t: jnp.float32(x[t]), path)
    expected, state = track.update(point, state)
  assert_near(jax.tree.map(lambda x: x[-1], averages), expected)


@pytest.mark.parametrize(
  'numbers, taken',
  [
    ((4, 3), {1: [1], 3: [3], 4: [4], 6: [4], 7: [4, 7], 12: [4, 7, 10]}),
    ((0, 5), {1: [0], 4: [0], 5: [0, 5], 12: [0, 5, 10]}),
  ],
)
def test_swa_is_the_mean_of_the_weights_it_takes(numbers, taken):
  path, averages = run(averaging.swa, *numbers)
  for t, members in taken.items():
    now = jax.tree.map(lambda x, t=t: x[t - 1], averages)
    assert_near(now, weighted(path, dict.fromkeys(members, 1.0)))


def test_before_its_start_the_average_is_the_current_weights_bitwise():
  path, averages = run(*SWA)
  jax.tree.map(
    lambda p, a: np.testing.assert_array_equal(a[:4], p[1:5]), path, averages
  )


def test_numbers_may_live_in_the_state():
  def factory(decay, rate):
    return averaging.ema(optim.sgd(rate), decay)

  learner = finetune(
    LOSS, optax.inject_hyperparams(factory)(decay=0.1, rate=0.3)
  )
  state = optim.set_hyper(learner.init(PARAMS, KEY), decay=0.8)
  after, _ = jax.eval_shape(learner.step, state, BATCH, KEY)
  assert optax.tree.get(state.opt_state, 'decay') == 0.8
  averages = averaging.averaged(after).trainable
  assert jax.tree.structure(averages) == jax.tree.structure(PARAMS)


def test_averaged_replaces_the_trainable_leaves_only():
  tuned = adapters.lora('body/.*/kernel', rank=2, also=('head/.*',))
  learner = finetune(LOSS, averaging.ema(optim.sgd(0.1), 0.5), tuning=tuned)
  state = learner.init(PARAMS, KEY)
  moved = jax.tree.map(lambda x: np.asarray(x) + 0.5, state.trainable)
  kept = [averaging.AverageState(jnp.int32(3), moved)]
  state = state.replace(opt_state=averaging.put_averages(state.opt_state, kept))
  there = averaging.averaged(state)
  assert there.trainable is moved
  assert there.frozen is state.frozen and there.opt_state is state.opt_state
  # A learner that shows what it is asked for: adapters enter as ever.
  shown = learner._replace(using=lambda state: state)
  smooth = averaging.with_average(shown)
  assert smooth.using(state).trainable is moved
  assert smooth.step is learner.step and smooth.end_task is learner.end_task
  jax.tree.map(
    np.testing.assert_array_equal,
    smooth.params(state),
    tuned.merge(moved, state.frozen),
  )


def fit(scores, seen, learner, **options):
  """Six steps; the second of three evaluations is the best."""
  scores = iter(scores)

  def evaluate(params, model_state):
    seen.append(jax.tree.map(np.array, params))
    return {'accuracy': next(scores)}

  return train.fit(
    learner,
    learner.init(PARAMS, KEY),
    [train.Stage('train', lambda i: toys.batch_of(seed=i), 6)],
    KEY,
    evaluate=evaluate,
    evaluate_every=2,
    restore_best=True,
    checkpoint_every=2,
    quiet=True,
    **options,
  )


def test_fit_evaluates_restores_and_resumes_the_best_average(tmp_path):
  learner = averaging.with_average(
    finetune(LOSS, averaging.ema(optim.sgd(0.3), 0.5))
  )
  program, seen = train.Program(learner), []
  options = {'learner': learner, 'program': program}
  fitted = fit([0.1, 0.9, 0.3], seen, **options)
  jax.tree.map(np.testing.assert_array_equal, fitted.params, seen[1])
  assert np.any(fitted.params['head']['bias'] != seen[2]['head']['bias'])
  # The raw weights of that moment come with their average.
  found = averaging.find_averages(fitted.state.opt_state)[0]
  assert fitted.best_step == found.count == 4
  raw = fitted.state.trainable['head']['bias']
  assert np.any(raw != fitted.params['head']['bias'])
  # Killed at the third evaluation, after the best was saved.
  with pytest.raises(StopIteration):
    fit([0.1, 0.9], [], **options, workdir=tmp_path)
  again = fit([0.3], [], **options, workdir=tmp_path, resume=True)
  jax.tree.map(np.testing.assert_array_equal, again.state, fitted.state)


def test_statistics_of_other_weights_are_refused():
  state = finetune(LOSS, averaging.ema(optim.sgd(0.1), 0.5)).init(
    PARAMS, KEY, {'batch_stats': {'mean': jnp.zeros(3)}}
  )
  with pytest.raises(UsageError, match='recompute_statistics'):
    averaging.averaged(state)
  assert averaging.averaged(state.replace(model_state={})).model_state == {}


@pytest.mark.parametrize('times', [0, 2])
def test_one_average_is_needed(times):
  optimizer = optim.sgd(0.1)
  for _ in range(times):
    optimizer = averaging.ema(optimizer, 0.5)
  state = finetune(LOSS, optimizer).init(PARAMS, KEY)
  with pytest.raises(UsageError, match=f'keeps {times} averages'):
    averaging.averaged(state)


def test_numbers_out_of_range_are_refused():
  for make in (
    lambda: averaging.ema(optim.sgd(0.1), 1.0),
    lambda: averaging.ema(optim.sgd(0.1), -0.1),
    lambda: averaging.swa(optim.sgd(0.1), -1),
    lambda: averaging.swa(optim.sgd(0.1), 0, 0),
  ):
    with pytest.raises(UsageError, match='give'):
      make()
  tracked = averaging.ema(optim.sgd(0.1), 0.5)
  with pytest.raises(UsageError, match='needs `params`'):
    tracked.update(PARAMS, tracked.init(PARAMS))


def test_only_selected_leaves_have_an_average():
  learner = finetune(
    LOSS,
    averaging.swa(optim.sgd(0.1), 1),
    tuning=tuning.select('head/.*'),
  )
  state = learner.init(PARAMS, KEY)
  found = averaging.find_averages(state.opt_state)[0]
  assert list(found.average) == ['head']


@pytest.mark.oracle
def test_ema_and_swa_equal_torch():
  import torch
  from torch.optim import swa_utils

  path, averages = run(*EMA)
  leaf = path['head']['kernel']
  module = torch.nn.Linear(3, 4, bias=False)

  def averaged_by(model, steps):
    for t in steps:
      module.weight.data = torch.tensor(leaf[t])
      model.update_parameters(module)
    return model.module.weight.detach().numpy()

  plain = swa_utils.AveragedModel(module)
  expected = averaged_by(plain, [4, 7, 10])
  found = run(*SWA)[1]['head']['kernel'][-1]
  np.testing.assert_allclose(found, expected, rtol=2e-6, atol=1e-7)
  # Torch starts at p_1 with its full share; ours has no such bias:
  # torch_T = (1 - d^T) ours_T + d^T p_1.
  moving = swa_utils.AveragedModel(
    module, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.8)
  )
  there = averaged_by(moving, range(1, TOTAL + 1))
  rest = 0.8**TOTAL
  ours = averages['head']['kernel'][-1]
  np.testing.assert_allclose(
    (1 - rest) * ours + rest * leaf[1], there, rtol=2e-6, atol=1e-7
  )
