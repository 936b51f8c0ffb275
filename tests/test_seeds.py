"""Seeds side by side are the runs that they would be one after the other."""

import functools

import continual_zoo as zoo
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fmeta
from fmeta import optim, train
from fmeta.seeds import abreast, matrices, one_seed, over_seeds
from fmeta.testing import assert_close, assert_same

SEEDS, TASKS, STEPS = 3, 2, 6
ROOTS = jax.vmap(jax.random.key)(jnp.arange(SEEDS))
# After twelve Adam steps: a stacked product may be another kernel. Measured
# over the zoo's methods: 1.3e-7 to 8.2e-7, here at most 5e-7 (2026-11-26).
TO_ROUNDING = 1e-6
KERNELS = 'body/.*kernel'


def start(key):
  """Parameters of a seed."""
  return jax.tree.map(
    lambda x: x + 0.1 * jax.random.normal(key, x.shape), zoo.PARAMS
  )


def batch(seed, task, index):
  """Every seed has rows, and hence an order, of its own."""
  return zoo.batch(10 * seed + task, index)


def accuracies(params, state, stage):
  """Numbers that depend on every leaf, one per task so far."""
  return zoo.row_of_matrix(params, state, stage)


def accuracies_of_all(params, state, stage):
  return [
    value
    for k in range(SEEDS)
    for value in accuracies(
      jax.tree.map(lambda x, k=k: x[k], params), state, stage
    )
  ]


def stages(method, seeds):
  """The stages of one seed, or of several side by side."""
  side = abreast if len(seeds) > 1 else lambda each: each[0]
  return [
    train.Stage(
      f'task_{t}',
      side([functools.partial(batch, k, t) for k in seeds]),
      STEPS,
      [
        side([functools.partial(batch, k, t) for k in seeds])(i)
        for i in range(2 if method.remembers else 0)
      ],
      ends_task=method.ends_task,
    )
    for t in range(TASKS)
  ]


def fit(learner, params, keys, method, measure, seeds, **options):
  return train.fit(
    learner,
    learner.init(params, keys),
    stages(method, seeds),
    keys,
    forward=zoo.FORWARD,
    after_stage=measure,
    steps_per_dispatch=3,
    quiet=True,
    **options,
  )


def fit_all(single, method, **options):
  learner = over_seeds(single, SEEDS)
  params = jax.vmap(start)(ROOTS)
  measure = accuracies_of_all
  return fit(learner, params, ROOTS, method, measure, range(SEEDS), **options)


# Keys at a task's end and in dropout; logits in a memory; a place per task.
@pytest.mark.parametrize('name', ['ewc sampled', 'der++', 'gem'])
def test_each_seed_is_its_sequential_run(name):
  method = zoo.METHODS[name]
  single = method.learner()
  together = fit_all(single, method)
  assert together.traces == 1
  found = matrices(together.matrix, SEEDS)
  program, losses = train.Program(single), []
  for k in range(SEEDS):
    alone = fit(
      single, start(ROOTS[k]), ROOTS[k], method, accuracies, [k],
      program=program,
    )  # fmt: skip
    mine = one_seed(together.state, k)
    assert_close(alone.state, mine, f'seed {k}', TO_ROUNDING)
    if name != 'ewc sampled':
      rows, own = alone.state.memory['rows'], mine.memory['rows']
      for key in ('x', 'label'):
        assert_same(rows[key], own[key], f'seed {k} {key}')
      assert_same(
        alone.state.memory['priority'], mine.memory['priority'], 'order'
      )
      assert np.asarray(own['x']).any()
    assert [len(row) for row in found[k]] == [1, 2]
    for row, other in zip(alone.matrix, found[k], strict=True):
      np.testing.assert_allclose(row, other, rtol=TO_ROUNDING)
    losses.append([record['loss'] for record in alone.history])
    np.testing.assert_allclose(
      [record[f'seed_{k}/loss'] for record in together.history],
      losses[-1],
      rtol=TO_ROUNDING,
    )
  np.testing.assert_allclose(
    [record['loss'] for record in together.history],
    np.mean(losses, 0),
    rtol=TO_ROUNDING,
  )
  # Each seed went a way of its own.
  assert np.ptp(np.array(losses), axis=0).min() > 1e-3


def test_a_resumed_run_of_all_seeds_is_bitwise_the_same(tmp_path):
  method = zoo.METHODS['er']
  single = method.learner()
  learner = over_seeds(single, SEEDS)
  program, params = train.Program(learner), jax.vmap(start)(ROOTS)
  options = {'program': program, 'checkpoint_every': 3}

  def run(measure, **more):
    return fit(
      learner, params, ROOTS, method, measure, range(SEEDS), **options, **more
    )

  def dies(params, state, stage):
    if stage == 1:
      raise InterruptedError
    return accuracies_of_all(params, state, stage)

  whole = run(accuracies_of_all)
  with pytest.raises(InterruptedError):
    run(dies, workdir=tmp_path)
  again = run(accuracies_of_all, workdir=tmp_path, resume=True)
  assert_same(whole.state, again.state, 'resumed')
  assert whole.matrix == again.matrix
  with pytest.raises(fmeta.UsageError, match='random key'):
    fit(
      learner, params, ROOTS[::-1], method, accuracies_of_all, range(SEEDS),
      workdir=tmp_path, resume=True, **options,
    )  # fmt: skip


def adapted(**options):
  """Low-rank factors and a head move; the rest is the same for all seeds."""
  single = zoo.finetune(tuning=fmeta.lora(KERNELS, rank=1, also=('head/.*',)))
  learner = over_seeds(single, SEEDS, shared=('body/.*',), **options)
  head = jax.vmap(start)(ROOTS)['head']
  return single, learner, {**zoo.PARAMS, 'head': head}


@pytest.mark.parametrize('batch_axis', [0, None])
def test_frozen_leaves_that_seeds_share_have_no_copy(batch_axis):
  single, learner, params = adapted(batch_axis=batch_axis)
  state = learner.init(params, ROOTS)
  shapes = jax.tree.map(jnp.shape, zoo.PARAMS['body'])
  assert jax.tree.map(jnp.shape, state.frozen['body']) == shapes
  rows = [batch(k, 0, 0) for k in range(SEEDS)]
  given = abreast([lambda i, r=r: r for r in rows])(0)
  given = given if batch_axis == 0 else rows[0]
  after, aux = jax.jit(learner.step)(state, given, ROOTS)
  after, _ = jax.jit(learner.step)(after, given, ROOTS)
  assert_same(state.frozen, after.frozen, 'frozen')
  merged = learner.params(after)
  step, gradient = jax.jit(single.step), jax.jit(single.gradient)
  slopes = jax.jit(learner.gradient)(state, given, ROOTS)
  for k in range(SEEDS):
    row = rows[k if batch_axis == 0 else 0]
    alone = single.init(
      {**zoo.PARAMS, 'head': start(ROOTS[k])['head']}, ROOTS[k]
    )
    slope = gradient(alone, row, ROOTS[k])
    own = jax.tree.map(lambda x, k=k: x[k], slopes)
    assert_close(slope, own, f'gradient {k}', TO_ROUNDING)
    for _ in range(2):
      alone, single_aux = step(alone, row, ROOTS[k])
    mine = one_seed(after, k, ('body/.*',))
    assert_close(alone, mine, f'seed {k}', TO_ROUNDING)
    own = jax.tree.map(lambda x, k=k: x[k], merged)
    assert_close(single.params(alone), own, f'merged {k}', TO_ROUNDING)
  outputs = aux.outputs.shape
  assert outputs == (SEEDS, *single_aux.outputs.shape)
  assert aux.weight == SEEDS * single_aux.weight
  with learner.using(after) as used:
    assert_same(merged, used, 'using')


def test_a_step_holds_a_shared_kernel_once():
  """Bytes of the compiled program: five seeds, one frozen kernel of 1 MiB."""
  width = 512

  def forward(params, model_state, batch, rng):
    hidden = jnp.tanh(batch['x'] @ params['body']['kernel'])
    return hidden @ params['head']['kernel'], model_state

  loss = fmeta.supervised(forward, fmeta.softmax_cross_entropy)
  single = fmeta.finetune(loss, optim.sgd(0.1), tuning=fmeta.select('head/.*'))
  learner = over_seeds(single, 5, shared=('body/.*',))
  params = {
    'body': {'kernel': jax.ShapeDtypeStruct((width, width), np.float32)},
    'head': {'kernel': jax.ShapeDtypeStruct((5, width, 2), np.float32)},
  }
  keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 5))
  state = jax.eval_shape(learner.init, params, keys)
  rows = {
    'x': jax.ShapeDtypeStruct((5, 2, width), np.float32),
    'label': jax.ShapeDtypeStruct((5, 2), np.int32),
  }
  jitted = jax.jit(
    lambda moving, frozen, rows, keys: learner.step(
      moving.replace(frozen=frozen), rows, keys
    )[0].replace(frozen={})
  )
  compiled = jitted.lower(
    state.replace(frozen={}), state.frozen, rows, keys
  ).compile()
  used = compiled.memory_analysis()
  kernel = 4 * width * width
  assert kernel < used.argument_size_in_bytes < 1.2 * kernel
  assert used.temp_size_in_bytes < kernel


def test_a_phase_that_thaws_passes_over_all_seeds():
  def learner_of(tuning):
    return fmeta.finetune(zoo.LOSS, fmeta.adamw_per_leaf(1e-2), tuning=tuning)

  phases = fmeta.lp_ft('head/.*', probe_steps=2, full_steps=3)
  alone = train.Phased(phases, learner_of)
  stacked = train.Phased(
    phases, lambda tuning: over_seeds(learner_of(tuning), SEEDS)
  )

  def run(phased, params, keys, batches):
    first = phased.learners[0]
    return train.fit(
      first,
      first.init(params, keys),
      phased.stages('task', batches),
      keys,
      quiet=True,
    )

  sources = [functools.partial(batch, k, 0) for k in range(SEEDS)]
  found = run(stacked, jax.vmap(start)(ROOTS), ROOTS, abreast(sources))
  expected = run(alone, start(ROOTS[1]), ROOTS[1], sources[1])
  assert_close(expected.state, one_seed(found.state, 1), 'seed 1', TO_ROUNDING)


def jolted(**options):
  """Only the head moves, but a task's beginning moves the body."""

  def begin(state, forward, batches, rng):
    shift = batches[0]['x'].mean() + jax.random.normal(rng)
    return state.replace(
      frozen=jax.tree.map(lambda x: x + 0.1 * shift, state.frozen)
    )

  single = zoo.finetune(tuning=fmeta.select('head/.*'))
  single = single._replace(begin_task=begin)
  return single, over_seeds(single, SEEDS, **options)


def test_what_a_task_begins_with_is_each_seeds_own():
  single, learner = jolted()
  sources = [functools.partial(batch, k, 0) for k in range(SEEDS)]

  def run(taken, params, keys, batches):
    stage = train.Stage('task', batches, 2, prepare=[batches(0)])
    state = taken.init(params, keys)
    return train.fit(
      taken, state, [stage], keys, forward=zoo.FORWARD, quiet=True
    ).state

  found = run(learner, jax.vmap(start)(ROOTS), ROOTS, abreast(sources))
  for k in range(SEEDS):
    alone = run(single, start(ROOTS[k]), ROOTS[k], sources[k])
    assert_close(alone, one_seed(found, k), f'seed {k}', TO_ROUNDING)


def test_an_end_of_a_task_hands_frozen_leaves_on():
  learner = over_seeds(
    zoo.finetune(tuning=fmeta.select('head/.*')), SEEDS, shared=('.*/bias',)
  )
  params = fmeta.tree.map_with_name(
    lambda n, x: x if n.endswith('bias') else jnp.stack([x] * SEEDS),
    zoo.PARAMS,
  )
  state = learner.init(params, ROOTS)
  after = learner.end_task(state, zoo.FORWARD, [], ROOTS)
  leaves = zip(
    jax.tree.leaves(state.frozen), jax.tree.leaves(after.frozen), strict=True
  )
  # By identity: `fit` writes leaves that a task's end has changed anew.
  assert [a is b for a, b in leaves] == [True] * 4


def test_a_diverged_seed_stops_the_run_and_is_named():
  learner = over_seeds(zoo.finetune(), SEEDS)

  def batches(i):
    rows = abreast([functools.partial(batch, k, 0) for k in range(SEEDS)])(i)
    if i == 4:
      rows['x'][1] = np.nan
    return rows

  with pytest.raises(train.Diverged, match='seed_1/loss is nan at step 5'):
    train.fit(
      learner,
      learner.init(jax.vmap(start)(ROOTS), ROOTS),
      [train.Stage('task', batches, 6)],
      ROOTS,
      steps_per_dispatch=3,
      quiet=True,
    )


def of_its_own_key():
  """A tuning whose frozen leaf each seed draws."""

  def init(params, rng):
    trainable, frozen = fmeta.select('head/.*').init(params, rng)
    noisy = jax.tree.map(lambda x: x + jax.random.normal(rng), frozen)
    return trainable, noisy

  return fmeta.select('head/.*')._replace(init=init)


def test_what_cannot_lie_side_by_side_is_refused():
  single, learner, params = adapted()
  everything = jax.vmap(start)(ROOTS)
  drawn = zoo.finetune(tuning=of_its_own_key())
  state = learner.init(params, ROOTS)
  whole = batch(0, 0, 0)
  rows = abreast([functools.partial(batch, k, 0) for k in range(SEEDS)])(0)
  disagreeing = jolted(shared=('body/.*',))[1]
  cases = [
    ('0 seeds', lambda: over_seeds(single, 0)),
    ('batch_axis=1', lambda: over_seeds(single, 2, batch_axis=1)),
    (
      "no parameter matches 'bdy",
      lambda: over_seeds(single, SEEDS, shared=('bdy',)).init(params, ROOTS),
    ),
    ('for 3 seeds', lambda: learner.init(params, ROOTS[0])),
    ('for 3 seeds', lambda: learner.init(zoo.PARAMS, ROOTS)),
    ('for 2 seeds', lambda: over_seeds(single, 2).init(everything, ROOTS)),
    ('for 3 seeds', lambda: learner.step(state, whole, ROOTS)),
    (
      'for 3 seeds',
      lambda: learner.end_task(state, zoo.FORWARD, [whole], ROOTS),
    ),
    (
      'differs between seeds',
      lambda: over_seeds(drawn, SEEDS, shared=('body/.*',)).init(params, ROOTS),
    ),
    (
      'differs between seeds',
      lambda: disagreeing.begin_task(state, zoo.FORWARD, [rows], ROOTS),
    ),
    ('row 1 has 3 accuracies', lambda: matrices([[1, 2], [1, 2, 3]], 2)),
  ]
  for match, call in cases:
    with pytest.raises(fmeta.UsageError, match=match):
      call()


def test_flat_rows_come_apart_seed_after_seed():
  rows = [[1, 2], [3, 4, 5, 6]]
  assert matrices(rows, 2) == [[[1], [3, 4]], [[2], [5, 6]]]
