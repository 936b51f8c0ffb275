"""What goes on, what is born and what waits at a phase boundary."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toys

import fmeta
from fmeta import optim, tree
from fmeta.errors import UsageError
from fmeta.testing import assert_close, assert_same, check_gradient
from fmeta.types import Tuning, merged

KEY = jax.random.key(4)
LOSS = fmeta.supervised(toys.three_layers, fmeta.softmax_cross_entropy)
FIRST, SECOND, HEAD = 'body/layer_0/.*', 'body/layer_1/.*', 'head/.*'
KERNELS = ('body/layer_0/kernel', 'body/layer_1/kernel', 'head/kernel')
OWN = fmeta.per_leaf(optax.scale_by_adam())


def learner_of(*moving, optimizer=OWN, tuning=None, **options):
  tuning = tuning or fmeta.select(*moving)
  return fmeta.finetune(LOSS, optimizer, tuning=tuning, **options)


def aged(learner, params=None):
  """A state whose every number differs from that of a fresh one."""
  state = learner.init(params or toys.three_kernels(), KEY)
  count = tree.size(state.opt_state)
  return state.replace(
    step=state.step + 7,
    trainable=jax.tree.map(lambda x: x + 0.25, state.trainable),
    opt_state=jax.tree.map(
      lambda x: x + jnp.asarray(count + 1, x.dtype), state.opt_state
    ),
  )


def named(arrays):
  return dict(zip(tree.names(arrays), jax.tree.leaves(arrays), strict=True))


def refusal(*args):
  with pytest.raises(UsageError) as error:
    fmeta.retune(*args)
  assert '\n' not in str(error.value)
  return str(error.value)


def test_slots_go_on_are_fresh_or_are_dropped_by_name():
  old, new = learner_of(SECOND, HEAD), learner_of(FIRST, HEAD)
  before = aged(old)
  after = fmeta.retune(before, old, new, KEY)
  assert_same(old.params(before), new.params(after), 'parameters')
  assert tree.names(after.trainable) == [KERNELS[0], KERNELS[2]]
  assert int(after.step) == 7
  there, here = named(before.opt_state), named(after.opt_state)
  fresh = named(new.init(new.params(after), KEY).opt_state)
  assert set(here) == set(fresh)
  for name, leaf in here.items():
    source = there if KERNELS[2] in name else fresh
    np.testing.assert_array_equal(leaf, source[name], err_msg=name)
  counts = {n: int(x) for n, x in here.items() if n.endswith('count')}
  assert sorted(counts.values())[0] == 0 and len(counts) == 2
  # Two moments and a count for every leaf that moves: a frozen one has none.
  floats = 2 * sum(x.size for x in jax.tree.leaves(after.trainable))
  assert tree.size(after.opt_state) == floats + 2


def test_a_thawed_leaf_moves_first_as_under_a_fresh_adam():
  adam = fmeta.adamw_per_leaf(0.01, weight_decay=0.0, clip_norm=None)
  old, new = (learner_of(*m, optimizer=adam) for m in ([HEAD], ['.*']))
  state = fmeta.retune(aged(old), old, new, KEY)
  batch = toys.batch_of()

  @jax.jit
  def first_updates(state):
    params = new.params(state)
    grads = jax.grad(lambda p: LOSS(p, {}, batch, None)[0])(params)
    fresh = optax.adam(0.01)
    late = optax.tree.set(fresh.init(params), count=1000)
    after, _ = new.step(state, batch, KEY)
    return (
      jax.tree.map(jnp.subtract, new.params(after), params),
      fresh.update(grads, fresh.init(params))[0],
      fresh.update(grads, late)[0],
    )

  found, expected, shared = first_updates(state)
  assert_close(expected['body'], found['body'], 'first update', 1e-5)
  ratio = jnp.abs(shared['body']['layer_0']['kernel']) / 0.01
  # .1 / sqrt(.001 / (1 - .999^1001)), written down to four digits: 2e-4.
  np.testing.assert_allclose(ratio, 2.515, rtol=2e-4)


def test_a_shared_count_is_refused_where_it_would_be_wrong():
  adam = optax.adam(0.1)
  old, new = (learner_of(*m, optimizer=adam) for m in ([HEAD], ['.*']))
  message = refusal(aged(old), old, new, KEY)
  assert "'0/count'" in message and 'fmeta.per_leaf' in message
  assert "'head/kernel'" in message and "'body/layer_0/kernel'" in message
  # Freezing more leaves no wrong age, nor do leaves that all thaw at once.
  state = aged(new)
  kept = fmeta.retune(state, new, old, KEY).opt_state[0]
  assert int(kept.count) == int(state.opt_state[0].count) > 0
  other = learner_of(FIRST, optimizer=adam)
  restarted = fmeta.retune(aged(old), old, other, KEY).opt_state[0]
  assert int(restarted.count) == 0


def test_a_count_of_the_run_and_a_hyper_parameter_go_on():
  rate = optim.warmup_linear(0.1, 10)
  optimizer = optax.inject_hyperparams(
    lambda scale: optax.chain(
      OWN, optax.scale_by_learning_rate(rate), optax.scale(scale)
    )
  )(scale=1.0)
  old, new = (learner_of(*m, optimizer=optimizer) for m in ([HEAD], ['.*']))
  before = optim.set_hyper(aged(old), scale=0.5)
  after = fmeta.retune(before, old, new, KEY).opt_state
  assert float(after.hyperparams['scale']) == 0.5
  schedule, there = after.inner_state[1], before.opt_state.inner_state[1]
  assert int(schedule.count) == int(there.count) > 0


def test_another_optimizer_starts_afresh():
  old = learner_of(HEAD, optimizer=optim.sgd(0.1, momentum=0.9))
  new = learner_of('.*', optimizer=optax.adam(0.1))
  after = fmeta.retune(aged(old), old, new, KEY)
  assert_same(
    new.init(toys.three_kernels(), KEY).opt_state, after.opt_state, ''
  )


def lora_of(*patterns, rank=2, also=(HEAD,)):
  return learner_of(tuning=fmeta.lora_merged(*patterns, rank=rank, also=also))


def test_factors_are_born_go_on_and_are_merged():
  probe, lora = learner_of(HEAD), lora_of('body/.*/kernel')
  state = aged(probe)
  born = fmeta.retune(state, probe, lora, KEY)
  assert_same(probe.params(state), lora.params(born), 'born without effect')
  factor = named(born.trainable)['body/layer_0/kernel.lora_a']
  expected = named(lora.init(toys.three_kernels(), KEY).trainable)
  assert_same(expected['body/layer_0/kernel.lora_a'], factor, 'from the key')
  wider = lora_of('body/.*/kernel', also=('head/.*', SECOND))
  moved = aged(lora)
  went_on = fmeta.retune(moved, lora, wider, KEY)
  assert_same(lora.params(moved), wider.params(went_on), 'go on')
  there, here = named(moved.opt_state), named(went_on.opt_state)
  factors = [name for name in there if 'lora' in name]
  assert len(factors) == 12
  for name in factors:
    np.testing.assert_array_equal(there[name], here[name], err_msg=name)
  for other in (learner_of(tuning=fmeta.full()), learner_of(FIRST)):
    after = fmeta.retune(moved, lora, other, KEY)
    assert_same(lora.params(moved), other.params(after), 'merged')
  more = fmeta.retune(aged(lora_of(KERNELS[0])), lora_of(KERNELS[0]), lora, KEY)
  assert len([n for n in tree.names(more.trainable) if 'lora' in n]) == 4


def test_adapters_that_cannot_cross_are_refused_with_the_reason():
  first, both = lora_of(KERNELS[0], KERNELS[1]), lora_of(KERNELS[1], 'head/.*')
  assert 'the same adapters' in refusal(aged(first), first, both, KEY)
  wide = lora_of(KERNELS[0], KERNELS[1], rank=3)
  message = refusal(aged(first), first, wide, KEY)
  assert '[6, 2]' in message and '[6, 3]' in message

  def init(params, rng):
    del rng
    return {'prompt': jnp.ones(3)}, params

  def merge(trainable, frozen):
    return frozen

  prompted = learner_of(
    tuning=Tuning(
      init,
      merge,
      lambda old, new, trainable, frozen: new,
      functools.partial(merged, merge),
    )
  )
  message = refusal(aged(prompted), prompted, learner_of(HEAD), KEY)
  assert "'prompt'" in message and 'no kernel' in message


def test_an_adapter_that_sets_its_kernel_at_birth_does_so_once():
  def init(params, rng):
    del rng
    kernel = params['head']['kernel'] / 2
    return {'head': {'kernel.rest': kernel}}, {
      **params,
      'head': {'kernel': kernel},
    }

  def merge(trainable, frozen):
    whole = frozen['head']['kernel'] + trainable['head']['kernel.rest']
    return {**frozen, 'head': {'kernel': whole}}

  halved = Tuning(
    init,
    merge,
    lambda old, new, trainable, frozen: new,
    functools.partial(merged, merge),
  )
  old, new = learner_of(tuning=halved), learner_of(tuning=halved)
  state = aged(old)
  after = fmeta.retune(state, old, new, KEY)
  assert_same(state.frozen, after.frozen, 'kernel')
  assert_same(state.trainable, after.trainable, 'rest')


def test_a_penalty_remembers_a_leaf_that_freezes_and_thaws():
  strengths = {'l2_sp': fmeta.l2_sp(0.1), 'ewc': fmeta.ewc(1.0)}
  for penalty in strengths.values():
    every = learner_of('.*', penalty=penalty)
    head = learner_of(HEAD, penalty=penalty)
    state = aged(every)
    state = state.replace(
      penalty_state=jax.tree.map(lambda x: x + 3.0, state.penalty_state)
    )
    probed = fmeta.retune(state, every, head, KEY)
    assert 'anchor/body/layer_0/kernel' in probed.dormant
    assert not [name for name in probed.dormant if 'head' in name]
    probed = probed.replace(
      penalty_state=jax.tree.map(lambda x: x * 2.0, probed.penalty_state)
    )
    back = fmeta.retune(probed, head, every, KEY)
    there, here = state.penalty_state, back.penalty_state
    assert not back.dormant
    assert_same(there['anchor']['body'], here['anchor']['body'], 'dormant')
    doubled = jax.tree.map(lambda x: 2 * x, there['anchor']['head'])
    assert_same(doubled, here['anchor']['head'], 'live')


def test_a_memory_goes_on_and_is_never_lost():
  spec = {
    'x': jax.ShapeDtypeStruct((6,), jnp.float32),
    'label': jax.ShapeDtypeStruct((), jnp.int32),
  }
  memory = fmeta.reservoir(8, spec)
  old, new = (
    fmeta.rehearse(learner_of(*m), memory, 2) for m in ([HEAD], [FIRST])
  )
  state = aged(old)
  state = state.replace(memory=jax.tree.map(lambda x: x + 1, state.memory))
  assert_same(state.memory, fmeta.retune(state, old, new, KEY).memory, '')
  assert 'rehearse' in refusal(state, old, learner_of(FIRST), KEY)


@pytest.mark.usefixtures('x64')
def test_a_meta_gradient_goes_through_a_boundary():
  sgd = optim.sgd(0.1, momentum=0.9)
  probe, whole = (learner_of(*m, optimizer=sgd) for m in ([HEAD], ['.*']))
  params, support = toys.double((toys.three_kernels(), toys.batch_of()))
  query = toys.double(toys.batch_of(seed=1))

  def objective(params):
    state = probe.init(params, KEY)
    state, _ = fmeta.adapt(probe, state, lambda i: support, KEY, num_steps=2)
    state = fmeta.retune(state, probe, whole, KEY)
    state, _ = fmeta.adapt(whole, state, lambda i: support, KEY, num_steps=2)
    return LOSS(whole.params(state), {}, query, None)[0]

  grads = check_gradient(objective, params)
  assert all(jnp.abs(g).max() > 0 for g in jax.tree.leaves(grads))
