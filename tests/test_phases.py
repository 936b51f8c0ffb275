"""Phases: what the factories make, and `fit` across their boundaries."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toys

import fmeta
from fmeta import optim, sharding, train, tree
from fmeta.errors import UsageError
from fmeta.testing import assert_close, assert_same

KEY = jax.random.key(2)
LOSS = fmeta.supervised(toys.three_layers, fmeta.softmax_cross_entropy)
BLOCKS = ['body/layer_0/.*', 'body/layer_1/.*', 'head/.*']
KERNELS = ('body/layer_0/kernel', 'body/layer_1/kernel', 'head/kernel')
NUM_STEPS = 3


def batches(index):
  return toys.batch_of(seed=100 + index)


def learner_of(tuning, optimizer=None, **options):
  optimizer = optimizer or fmeta.adamw_per_leaf(0.01)
  return fmeta.finetune(LOSS, optimizer, tuning=tuning, **options)


def fit(stages, learner=None, state=None, **options):
  learner = learner or stages[0].learner
  state = state or learner.init(toys.three_kernels(), jax.random.key(1))
  options = {'steps_per_dispatch': NUM_STEPS, 'quiet': True, **options}
  return train.fit(learner, state, stages, KEY, **options)


def moving(phases):
  params = toys.three_kernels()
  return [tree.names(phase.tuning.init(params, KEY)[0]) for phase in phases]


class Chain:
  """Chain-thaw, whose blocks freeze again: the hardest for a restore."""

  def __init__(self):
    phased = train.Phased(fmeta.chain_thaw(BLOCKS, NUM_STEPS), learner_of)
    self.stages = phased.stages('task', batches)
    self.programs = [train.Program(learner) for learner in phased.learners]
    self.num_steps = NUM_STEPS * len(self.stages)

  def run(self, **options):
    options = {'steps_per_dispatch': 1, 'program': self.programs, **options}
    return fit(self.stages, **options)


@pytest.fixture(scope='module')
def chain(tmp_path_factory):
  """The chain, its uninterrupted run and that run's folder."""
  chain = Chain()
  seen = []

  def after_stage(params, model_state, index):
    seen.append(jax.tree.map(np.array, params))
    return [index]

  chain.folder = tmp_path_factory.mktemp('chain') / 'run'
  chain.whole = chain.run(
    workdir=chain.folder,
    checkpoint_every=1,
    keep=100,
    after_stage=after_stage,
  )
  chain.seen = seen
  return chain


def test_gradual_unfreezing_adds_a_block_per_phase_from_the_last():
  phases = fmeta.gradual_unfreezing(BLOCKS, [2, 3, 4])
  assert moving(phases) == [[*KERNELS[2:]], [*KERNELS[1:]], [*KERNELS]]
  assert [phase.num_steps for phase in phases] == [2, 3, 4]


def test_chain_thaw_moves_the_head_then_each_block_alone_then_all():
  phases = fmeta.chain_thaw(BLOCKS, 5)
  first, second, head = KERNELS
  assert moving(phases) == [[head], [first], [second], [*KERNELS]]
  assert [phase.num_steps for phase in phases] == [5] * 4


def test_lp_ft_moves_the_head_then_everything():
  phases = fmeta.lp_ft('head/.*', probe_steps=2, full_steps=3)
  assert moving(phases) == [[KERNELS[2]], [*KERNELS]]
  assert [phase.num_steps for phase in phases] == [2, 3]


@pytest.mark.parametrize(
  'make, word',
  [
    (lambda: fmeta.phases([]), 'no pair'),
    (lambda: fmeta.phases([(0, fmeta.full())]), 'num_steps=0'),
    (lambda: fmeta.gradual_unfreezing('head/.*', 1), 'list of patterns'),
    (lambda: fmeta.chain_thaw([], 1), 'list of patterns'),
    (lambda: fmeta.gradual_unfreezing(BLOCKS, [1, 2]), 'one per block'),
    (lambda: fmeta.chain_thaw(BLOCKS, [1, 2, 3]), 'one for all'),
    (lambda: fmeta.lp_ft(probe_steps=1, full_steps=1), 'no head'),
  ],
)
def test_phases_that_make_no_sense_are_refused_in_one_line(make, word):
  with pytest.raises(UsageError, match=word) as error:
    make()
  assert '\n' not in str(error.value)


def test_lp_ft_through_fit_is_the_hand_written_loop():
  phased = train.Phased(
    fmeta.lp_ft('head/.*', probe_steps=3, full_steps=3),
    lambda tuning: learner_of(
      tuning,
      fmeta.adamw_per_leaf(0.05, weight_decay=0.0, clip_norm=None),
    ),
  )
  fitted = fit(phased.stages('lp_ft', batches))
  grad = jax.jit(jax.grad(lambda p, batch: LOSS(p, {}, batch, None)[0]))
  adam = optax.adam(0.05)
  params = toys.three_kernels()
  ages = {'head': adam.init(params['head'])}
  for step in range(6):
    if step == 3:
      ages['body'] = adam.init(params['body'])
    grads = grad(params, batches(step))
    for part in ages:
      updates, ages[part] = adam.update(grads[part], ages[part])
      params[part] = optax.apply_updates(params[part], updates)
  assert_close(params, fitted.params, 'LP-FT', 1e-6)
  assert [line['stage'] for line in fitted.history][2:4] == [
    'lp_ft/phase_0',
    'lp_ft/phase_1',
  ]


def test_each_phase_is_traced_once_and_moves_its_leaves_only(chain):
  assert chain.whole.traces == 4 and chain.run().traces == 4
  assert [program.traces for program in chain.programs] == [1] * 4
  params = [toys.three_kernels(), *chain.seen]
  phases = fmeta.chain_thaw(BLOCKS, NUM_STEPS)
  for k, names in enumerate(moving(phases)):
    for name in KERNELS:
      before, after = (tree.get(params[j], name) for j in (k, k + 1))
      assert np.array_equal(before, after) == (name not in names), (k, name)
  assert chain.whole.steps == chain.num_steps


def rewound(source, step, folder):
  """The run's folder as a kill right after that step would leave it."""
  shutil.copytree(source, folder)
  for path in (folder / 'checkpoints' / 'steps').iterdir():
    if int(path.name) > step:
      shutil.rmtree(path)
  return folder


@pytest.mark.parametrize('step', [1, 3, 5, 6, 8, 9, 10, 12])
def test_resume_from_boundaries_and_between_is_bitwise(chain, step, tmp_path):
  folder = rewound(chain.folder, step, tmp_path / 'run')
  resumed = chain.run(workdir=folder, resume=True, after_stage=lambda *_: [])
  assert_same(chain.whole.state, resumed.state, 'resumed')
  assert resumed.history == chain.whole.history
  assert resumed.history[-1]['step'] == chain.num_steps


def test_resume_after_factors_were_merged_into_a_frozen_kernel(tmp_path):
  # Never trainable, and yet not the caller's any more.
  lora = fmeta.lora_merged('body/.*', rank=2)
  phases = fmeta.phases([(2, lora), (2, fmeta.select(BLOCKS[0]))])
  phased = train.Phased(phases, learner_of)
  options = {
    'program': [train.Program(learner) for learner in phased.learners],
    'steps_per_dispatch': 1,
  }
  stages = phased.stages('task', batches)
  whole = fit(stages, workdir=tmp_path / 'whole', checkpoint_every=1, **options)
  folder = rewound(tmp_path / 'whole', 3, tmp_path / 'run')
  resumed = fit(stages, workdir=folder, resume=True, **options)
  assert_same(whole.state, resumed.state, 'resumed')
  start = toys.three_kernels()['body']['layer_1']['kernel']
  merged = whole.state.frozen['body']['layer_1']['kernel']
  assert not np.array_equal(merged, start)


def test_a_frozen_leaf_is_written_once_per_content(chain):
  held = train.checkpoint.Checkpoints(chain.folder / 'checkpoints')
  names = sorted(name for name, _ in held._held())
  held.close()
  # Both blocks as they came, the probed head, the first block as it became.
  assert names == sorted([*KERNELS, KERNELS[0]])


def test_other_pretrained_weights_are_refused_in_a_later_phase(chain, tmp_path):
  params = toys.three_kernels()
  params['body']['layer_1'] = {
    'kernel': params['body']['layer_1']['kernel'] + 1
  }
  state = chain.stages[0].learner.init(params, jax.random.key(1))
  folder = rewound(chain.folder, 5, tmp_path / 'run')
  with pytest.raises(UsageError, match="'body/layer_1/kernel' differs"):
    chain.run(state=state, workdir=folder, resume=True)


def test_a_boundary_is_refused_before_the_first_step():
  phased = train.Phased(
    fmeta.lp_ft('head/.*', probe_steps=3, full_steps=3),
    lambda tuning: learner_of(tuning, optim.adamw(0.1)),
  )

  def never(index):
    raise AssertionError('a step was taken')

  with pytest.raises(UsageError, match='fmeta.per_leaf'):
    fit(phased.stages('lp_ft', never))


def test_a_program_of_another_learner_is_refused(chain):
  program = train.Program(learner_of(fmeta.full()))
  with pytest.raises(UsageError, match='another learner'):
    fit(chain.stages, program=program)


def test_a_stage_with_the_same_learner_changes_nothing():
  learner = learner_of(fmeta.full())
  program = train.Program(learner)
  plain = [train.Stage('a', batches, 3), train.Stage('b', batches, 3)]
  named = [stage._replace(learner=learner) for stage in plain]
  expected = fit(plain, learner, program=program)
  found = fit(named, learner, program=[program])
  assert_same(expected.state, found.state, 'state')
  assert expected.history == found.history and found.traces == 1


def test_tasks_share_learners_and_consolidate_at_their_end_only():
  made = []

  def build(tuning):
    made.append(learner_of(tuning, optim.sgd(0.1), penalty=fmeta.ewc(1.0)))
    return made[-1]

  phased = train.Phased(
    fmeta.lp_ft('head/.*', probe_steps=2, full_steps=2), build
  )
  stages = [
    *phased.stages('first', batches, [batches(0)]),
    *phased.stages('second', batches, [batches(1)]),
  ]
  options = {
    'forward': toys.three_layers,
    'steps_per_dispatch': 2,
    'program': [train.Program(learner) for learner in made],
  }
  fitted = fit(stages, **options)
  assert len(made) == 2 and fitted.traces == 2
  # In the second probe only the head is held, then everything is again.
  pulled = [line['penalty'] > 1e-9 for line in fitted.history]
  assert pulled == [False] * 5 + [True] * 3
  after = fitted.state.penalty_state
  once = fit(stages[:2], **options)
  for name in KERNELS:
    first = tree.get(once.state.penalty_state['importance'], name)
    both = tree.get(after['importance'], name)
    # Consolidation only adds: nothing of the frozen body was forgotten.
    assert jnp.all(both >= first) and float((both - first).sum()) > 0


def test_phases_on_eight_devices_equal_one():
  def build(tuning):
    return learner_of(tuning, penalty=fmeta.l2_sp(0.1))

  probe = build(fmeta.select('head/.*'))
  lora = fmeta.lora_merged('body/.*', rank=2, also=('head/.*',))
  phases = fmeta.phases([(2, lora), (2, fmeta.full())])
  stages = train.Phased(phases, build).stages('task', batches)
  mesh = sharding.make_mesh(sharding.parse_mesh('data:8'))
  # The state is the probe's: factors are born on the mesh before step 1.
  one = fit(stages, probe, steps_per_dispatch=2)
  eight = fit(stages, probe, steps_per_dispatch=2, mesh=mesh)
  assert_close(one.params, eight.params, '8 devices = 1', 1e-5)
  assert_close(one.state.opt_state, eight.state.opt_state, 'slots', 1e-5)
  assert {len(x.devices()) for x in jax.tree.leaves(eight.state)} == {8}
