"""EASE against its paper's equations in numpy, and what its bank must keep."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special
import toys

import fmeta
from fmeta import adapters, continual, losses, models, optim, train, tree
from fmeta.continual import streaming
from fmeta.continual.ease import complement, completed, ensemble, means
from fmeta.errors import UsageError
from fmeta.fewshot import cosine_classifier
from fmeta.testing import assert_same, check_learner

KEY = jax.random.key(13)
GROUPS = ((0, 3), (1, 2), (5,))  # nothing is of class 4
TASKS, CLASSES, DIM, STEPS = 3, 6, 4, 5
ALPHA = 0.3


class Features(nn.Module):
  """The body of the toy net."""

  @nn.compact
  def __call__(self, x, train=False):
    return toys.Body((5, DIM), 0.0, name='body')(x, train)


EMBED = adapters.entering(toys.forward_of(Features()))
HEAD = {'kernel': jax.random.normal(jax.random.key(1), (DIM, CLASSES))}
PARAMS = {**toys.init_of(Features())[0], 'head': HEAD}
TUNING = adapters.bottleneck(
  r'body/layer_\d/kernel', width=2, also=('head/.*',)
)
LOSS = losses.supervised(
  cosine_classifier(EMBED, 5.0),
  continual.masked(losses.softmax_cross_entropy),
)
ANSWER = jax.jit(continual.ease_forward(EMBED, ALPHA))


def finetune(tuning=TUNING, optimizer=None):
  optimizer = optim.adam(0.05) if optimizer is None else optimizer
  return fmeta.finetune(LOSS, optimizer, tuning=tuning)


def wrapped(learner=None, embed=EMBED, **options):
  options = {'tasks': TASKS, 'num_classes': CLASSES, 'dim': DIM} | options
  learner = finetune() if learner is None else learner
  return continual.ease(learner, embed, **options)


LEARNER = wrapped()
STEP = jax.jit(LEARNER.step)


def batch(task, index, shift=0.0):
  rng = np.random.default_rng([task, index])
  label = rng.choice(GROUPS[task], 8).astype(np.int32)
  x = np.eye(CLASSES)[label] + 0.5 * rng.normal(size=(8, CLASSES)) + shift
  allowed = np.tile(np.isin(np.arange(CLASSES), GROUPS[task]), (8, 1))
  return {'x': x.astype(np.float32), 'label': label, 'allowed': allowed}


def remembered(task, shift=0.0):
  """Two batches, the second with rows that are padding."""
  weight = np.array([1, 1, 1, 0, 1, 1, 0, 1], np.float32)
  ones = np.ones(8, np.float32)
  return [
    {**batch(task, 0, shift), 'weight': ones},
    {**batch(task, 1, shift), 'weight': weight},
  ]


def queries():
  rng = np.random.default_rng(99)
  return {'x': rng.normal(size=(7, CLASSES)).astype(np.float32)}


def stages(shift=(0.0, 0.0, 0.0)):
  return [
    train.Stage(
      f't{k}',
      lambda i, k=k: batch(k, i, shift[k]),
      STEPS,
      remember=remembered(k, shift[k]),
    )
    for k in range(TASKS)
  ]


def fit(learner=LEARNER, stream=None, **options):
  return train.fit(
    learner,
    learner.init(PARAMS, KEY),
    stages() if stream is None else stream,
    KEY,
    forward=EMBED,
    quiet=True,
    **options,
  )


def adapter_of(state):
  return {k: v for k, v in state.trainable.items() if k != 'head'}


@pytest.fixture(scope='module')
def streamed():
  """`(states after each task's end, the adapters as they were trained)`."""
  state, ended, trained = LEARNER.init(PARAMS, KEY), [], []
  for task in range(TASKS):
    for i in range(STEPS):
      state, _ = STEP(state, batch(task, i), KEY)
    trained.append(jax.tree.map(np.asarray, adapter_of(state)))
    key = jax.random.fold_in(KEY, task)
    state = LEARNER.end_task(state, EMBED, remembered(task), key)
    ended.append(state)
  return ended, trained


# The paper in numpy, float64, a loop for every index of its equations.


def features_by_hand(adapter, x):
  x = np.asarray(x, np.float64)
  whole = tree.combine(PARAMS['body'], adapter['body'])
  for name in ('layer_0', 'layer_1'):
    layer = {k: np.asarray(v, np.float64) for k, v in whole[name].items()}
    x = x @ layer['kernel'] + layer['bias']
    inner = x @ layer['kernel.adapter_down'] + layer['kernel.adapter_down_bias']
    inner = inner * scipy.special.ndtr(inner)
    x = x + inner @ layer['kernel.adapter_up'] + layer['kernel.adapter_up_bias']
    x = np.tanh(x)
  return x


def cosine(a, b):
  return a @ b / np.sqrt((a @ a) * (b @ b))


def complement_by_hand(old_old, new_old, new_new, temperature=1.0):
  made = []
  for i in range(len(old_old)):
    sims = np.array([cosine(old_old[i], new) for new in new_old])
    share = np.exp(sims / temperature) / np.exp(sims / temperature).sum()
    made.append(sum(share[j] * new_new[j] for j in range(len(new_new))))
  return np.array(made)


def true_prototypes(trained, groups=GROUPS):
  """{(class, subspace): prototype}, of the classes with rows there."""
  found = {}
  for task in range(len(trained)):
    rows = remembered(task)
    keep = np.concatenate([b['weight'] for b in rows]) > 0
    x = np.concatenate([b['x'] for b in rows])[keep]
    label = np.concatenate([b['label'] for b in rows])[keep]
    for c in groups[task]:
      for s in range(task + 1):
        found[c, s] = features_by_hand(trained[s], x[label == c]).mean(0)
  return found


def filled(found, groups, tasks):
  """The same with the entries above the diagonal of the paper's eq. 10."""
  found = dict(found)
  for s in range(tasks):
    for o in range(s):
      made = complement_by_hand(
        [found[c, o] for c in groups[o]],
        [found[c, o] for c in groups[s]],
        [found[c, s] for c in groups[s]],
      )
      found |= {(c, s): p for c, p in zip(groups[o], made, strict=True)}
  return found


def logits_by_hand(trained, x):
  tasks = len(trained)
  held = filled(true_prototypes(trained), GROUPS, tasks)
  features = [features_by_hand(adapter, x) for adapter in trained]
  logits = np.full((len(x), CLASSES), -np.inf)
  for task in range(tasks):
    for c in GROUPS[task]:
      for row in range(len(x)):
        cosines = [cosine(features[s][row], held[c, s]) for s in range(tasks)]
        others = sum(cosines) - cosines[task]
        logits[row, c] = cosines[task] + ALPHA * others
  return logits


# Facts.


def test_the_complement_is_the_papers_sum():
  rng = np.random.default_rng(0)
  old, new, moved = (
    rng.normal(size=(n, d)) for n, d in ((3, 5), (2, 5), (2, 4))
  )
  sims = np.array([[cosine(a, b) for b in new] for a in old])
  for temperature in (1.0, 0.2):
    np.testing.assert_allclose(
      complement(sims, moved, None, temperature),
      complement_by_hand(old, new, moved, temperature),
      rtol=1e-6,
    )


def test_a_copy_of_a_new_class_gets_its_prototype_in_the_sharp_limit():
  rng = np.random.default_rng(1)
  own = rng.normal(size=(3, 4, 6))  # [T, C, D]
  own[0, 0], rows = own[0, 2], np.zeros((3, 4))
  rows[[0, 1, 1, 2], [0, 1, 2, 3]] = 5
  sharp = completed(jnp.asarray(own), jnp.asarray(rows), 1e-3)
  np.testing.assert_allclose(sharp[1, 0], own[1, 2], rtol=1e-6)
  soft = completed(jnp.asarray(own), jnp.asarray(rows))
  assert np.abs(soft[1, 0] - own[1, 2]).max() > 0.1
  # A task of one class is all there is to be like.
  np.testing.assert_allclose(soft[2, :3], np.tile(own[2, 3], (3, 1)), rtol=1e-6)


def test_missing_prototypes_equal_loops_over_pairs_of_tasks():
  groups = ((4, 0), (1, 2, 6), (3,), (5, 7))
  rng = np.random.default_rng(2)
  own, rows, found = np.zeros((5, 9, 4)), np.zeros((5, 9)), {}
  for task, group in enumerate(groups):
    for c in group:
      rows[task, c] = 3
      own[: task + 1, c] = rng.normal(size=(task + 1, 4))
      found |= {(c, s): own[s, c] for s in range(task + 1)}
  made = completed(jnp.asarray(own), jnp.asarray(rows))
  expected = np.zeros_like(own)
  for (c, s), value in filled(found, groups, len(groups)).items():
    expected[s, c] = value
  np.testing.assert_allclose(made, expected, rtol=1e-5, atol=1e-6)


def test_logits_after_each_task_equal_the_papers_equations(streamed):
  ended, trained = streamed
  for k, state in enumerate(ended):
    found, _ = ANSWER(LEARNER.params(state), {}, queries(), None)
    expected = logits_by_hand(trained[: k + 1], queries()['x'])
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert np.isfinite(expected).any(0).sum() == (2, 4, 5)[k]


def test_one_task_is_the_nearest_prototype_by_cosine(streamed):
  ended, trained = streamed
  params = tree.combine(PARAMS, jax.tree.map(jnp.asarray, trained[0]))
  simple = streaming.simple_cil(CLASSES, DIM)
  sums = simple.init()
  for rows in remembered(0):
    features, _ = EMBED(params, {}, rows, None)
    sums = simple.update(sums, features, rows['label'], rows['weight'])
  expected = simple.scores(sums, EMBED(params, {}, queries(), None)[0])
  found, _ = ANSWER(LEARNER.params(ended[0]), {}, queries(), None)
  np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


def test_before_the_first_end_no_class_is_known():
  state = LEARNER.init(PARAMS, KEY)
  found, _ = ANSWER(LEARNER.params(state), {}, queries(), None)
  assert np.all(np.isneginf(found))


def test_banked_adapters_never_move_again(streamed):
  ended, trained = streamed
  names = {n + '.banked' for n in tree.names(trained[0])}
  for k, state in enumerate(ended):
    bank = state.frozen['ease']['adapters']
    assert set(tree.names(bank)) == names
    for s in range(TASKS):
      held = [np.asarray(leaf[s]) for leaf in jax.tree.leaves(bank)]
      expected = jax.tree.leaves(trained[s])
      if s > k:
        expected = [np.zeros_like(leaf) for leaf in expected]
      for a, b in zip(held, expected, strict=True):
        assert a.tobytes() == b.tobytes()
  assert any(
    np.any(a != b)
    for a, b in zip(*map(jax.tree.leaves, trained[:2]), strict=True)
  )


def test_a_task_begins_as_a_fresh_learner_does(streamed):
  inner, state = finetune(), streamed[0][0]
  key = jax.random.fold_in(jax.random.fold_in(KEY, 0), 1)
  fresh = inner.init(PARAMS, key)
  assert_same(fresh.trainable, state.trainable, 'fresh leaves')
  assert_same(fresh.opt_state, state.opt_state, 'fresh slots')
  other = inner.init(PARAMS, KEY).trainable['body']['layer_0']
  mine = state.trainable['body']['layer_0']
  assert np.any(mine['kernel.adapter_down'] != other['kernel.adapter_down'])
  assert int(state.step) == STEPS
  # What `fit` donates is not what the next task will begin with.
  held = state.frozen['ease']['start']['head']['kernel.banked']
  now = state.trainable['head']['kernel']
  assert now.unsafe_buffer_pointer() != held.unsafe_buffer_pointer()


def test_the_learner_inside_begins_and_ends_tasks_without_seeing_the_bank():
  def told(number):
    def act(state, forward, batches, rng):
      assert 'ease' not in state.frozen and forward is EMBED and rng is KEY
      return state.replace(penalty_state={'told': number + len(batches)})

    return act

  inner = finetune()._replace(begin_task=told(10), end_task=told(20))
  learner = wrapped(inner)
  start = learner.init(PARAMS, KEY)
  begun = learner.begin_task(start, EMBED, remembered(0)[:1], KEY)
  ended = learner.end_task(begun, EMBED, remembered(0), KEY)
  assert begun.penalty_state == {'told': 11}
  assert ended.penalty_state == {'told': 22}
  assert_same(start.frozen, begun.frozen, 'bank')


def test_a_schedule_goes_on_where_adam_begins_again():
  learner = wrapped(
    finetune(
      optimizer=optax.chain(
        optax.scale_by_adam(),
        optax.scale_by_schedule(lambda count: -0.01 / (1.0 + count)),
      )
    )
  )
  state, step = learner.init(PARAMS, KEY), jax.jit(learner.step)
  for i in range(2):
    state, _ = step(state, batch(0, i), KEY)
  adam, schedule = learner.end_task(state, EMBED, remembered(0), KEY).opt_state
  assert int(adam.count) == 0 and int(schedule.count) == 2
  assert all(np.all(leaf == 0) for leaf in jax.tree.leaves((adam.mu, adam.nu)))


def test_order_of_queries_does_not_matter(streamed):
  params = LEARNER.params(streamed[0][-1])
  order = np.random.default_rng(4).permutation(7)
  both, _ = ANSWER(params, {}, queries(), None)
  turned, _ = ANSWER(params, {}, {'x': queries()['x'][order]}, None)
  np.testing.assert_allclose(turned, both[order], rtol=1e-6, atol=1e-6)


def test_sums_do_not_depend_on_how_rows_are_cut(streamed):
  state = LEARNER.init(PARAMS, KEY)
  ended = LEARNER.end_task(state, EMBED, remembered(0), KEY)
  rows = jax.tree.map(lambda *x: np.concatenate(x)[::-1], *remembered(0))
  cut = [jax.tree.map(lambda x, k=k: x[k : k + 4], rows) for k in (12, 0, 8, 4)]
  other = LEARNER.end_task(state, EMBED, cut, KEY)
  for name in ('sum', 'rows'):
    np.testing.assert_allclose(
      other.frozen['ease'][name],
      ended.frozen['ease'][name],
      rtol=1e-6,
      atol=1e-6,
    )
  assert ended.frozen['ease']['rows'][0].sum() == 14


def test_other_data_in_task_three_change_nothing_from_before():
  kept = []

  def after_stage(params, model_state, stage):
    kept.append(jax.tree.map(np.array, params['ease']))
    return [
      float(x) for x in ANSWER(params, model_state, queries(), None)[0][0]
    ]

  one = fit(after_stage=after_stage)
  two = fit(stream=stages((0.0, 0.0, 1.0)), after_stage=after_stage)
  assert one.matrix[:2] == two.matrix[:2] and one.matrix[2] != two.matrix[2]
  first, second = kept[2], kept[5]
  for name in ('sum', 'rows'):
    old = (slice(None, 2), slice(None, 4))  # of tasks one and two
    np.testing.assert_array_equal(first[name][old], second[name][old])
  assert np.any(first['sum'][:, 5] != second['sum'][:, 5])


def test_a_class_that_comes_again_is_of_both_tasks():
  rows = np.array([[2.0, 0.0], [1.0, 3.0]])
  features = np.random.default_rng(5).normal(size=(2, 4, 3))
  prototypes = np.random.default_rng(6).normal(size=(2, 2, 3))
  found = ensemble(features, prototypes, jnp.asarray(rows), ALPHA)
  weight = [[1.0, ALPHA], [1.0, 1.0]]
  expected = [
    [
      sum(
        weight[s][c] * cosine(features[s, b], prototypes[s, c]) for s in (0, 1)
      )
      for c in (0, 1)
    ]
    for b in range(4)
  ]
  np.testing.assert_allclose(found, expected, rtol=1e-6)
  made = completed(jnp.asarray(prototypes), jnp.asarray(rows))
  np.testing.assert_array_equal(made, prototypes.astype(np.float32))
  # The first subspace saw the rows of both tasks.
  counts = np.array([[3.0, 3.0], [1.0, 3.0]])[:, :, None]
  found = means(jnp.asarray(counts * prototypes), jnp.asarray(rows))
  np.testing.assert_allclose(found, prototypes, rtol=1e-6)


def test_alpha_and_temperature_may_be_traced(streamed):
  params = LEARNER.params(streamed[0][-1])

  def answer(alpha, temperature):
    forward = continual.ease_forward(EMBED, alpha, temperature)
    return forward(params, {}, queries(), None)[0]

  pairs = jnp.array([0.0, 0.1, 1.0]), jnp.array([1.0, 0.5, 0.1])
  many = jax.jit(jax.vmap(answer))(*pairs)
  for k in range(3):
    np.testing.assert_allclose(
      many[k],
      answer(float(pairs[0][k]), float(pairs[1][k])),
      rtol=1e-5,
      atol=1e-6,
    )
  assert np.abs(many[0] - many[1])[:, :4].max() > 1e-2


def test_the_model_beside_the_bank_is_the_model_without_it(streamed):
  state = streamed[0][1]
  state, _ = STEP(state, batch(2, 0), KEY)
  params = LEARNER.params(state)
  bare = {k: v for k, v in params.items() if k != 'ease'}
  np.testing.assert_array_equal(
    EMBED(params, {}, queries(), None)[0], EMBED(bare, {}, queries(), None)[0]
  )
  with LEARNER.using(state) as entered:
    assert_same(params, entered, 'using')
  with pytest.raises(UsageError, match='no place for'):
    adapters.check_exportable(params, 'a file')


@pytest.mark.usefixtures('optimised')
def test_the_learner_conforms():
  check_learner(LEARNER, PARAMS, batch(0, 0))


def test_steps_and_gradients_are_those_of_the_learner_inside():
  inner, key = finetune(), jax.random.key(3)
  mine, plain = LEARNER.init(PARAMS, key), inner.init(PARAMS, key)
  step = jax.jit(inner.step)
  for i in range(3):
    mine, plain = (
      STEP(mine, batch(0, i), KEY)[0],
      step(plain, batch(0, i), KEY)[0],
    )
  assert_same(plain.trainable, mine.trainable, 'trainable')
  assert_same(plain.opt_state, mine.opt_state, 'opt_state')
  given = batch(0, 9), KEY
  assert_same(
    jax.jit(inner.gradient)(plain, *given),
    jax.jit(LEARNER.gradient)(mine, *given),
    'gradient',
  )


def test_a_traced_end_equals_the_end():
  state = LEARNER.init(PARAMS, KEY)
  rows = remembered(0)
  end = functools.partial(LEARNER.end_task, forward=EMBED, batches=rows)
  traced = jax.jit(lambda state, rng: end(state, rng=rng))(state, KEY)
  found = end(state, rng=KEY)
  for a, b in zip(jax.tree.leaves(traced), jax.tree.leaves(found), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)


def test_one_program_serves_all_tasks():
  assert fit(steps_per_dispatch=STEPS).traces == 1


class Normed(nn.Module):
  """A BatchNorm whose statistics move while its scale is trained."""

  @nn.compact
  def __call__(self, x, train=False):
    return toys.Normed('keyword', True, name='body')(x, train)


def test_statistics_are_kept_with_the_adapter_and_begin_again():
  params, model_state = toys.init_of(Normed())
  embed = toys.forward_of(Normed())
  loss = losses.supervised(
    cosine_classifier(embed), losses.softmax_cross_entropy
  )
  tuning = fmeta.select('body/norm/.*', 'head/.*')
  inner = fmeta.finetune(loss, optim.sgd(0.1), tuning=tuning)
  learner = wrapped(inner, embed)
  state = learner.init({**params, 'head': HEAD}, KEY, model_state)
  step, answer = jax.jit(learner.step), jax.jit(continual.ease_forward(embed))
  answers = []
  for task in range(2):
    for i in range(2):
      state, _ = step(state, batch(task, i, 3.0), KEY)
    moved = state.model_state
    trained = learner.params(state)
    state = learner.end_task(state, embed, remembered(task), KEY)
    held = state.frozen['ease']['model_state']
    assert_same(moved, jax.tree.map(lambda x, k=task: x[k], held), 'statistics')
    assert_same(model_state, state.model_state, 'start')
    answers.append(answer(learner.params(state), {}, queries(), None)[0])
    if task == 0:
      features, _ = embed(trained, moved, queries(), None)
      sums = state.frozen['ease']
      means = sums['sum'][0] / np.maximum(sums['rows'][0], 1)[:, None]
      expected = cosine(np.asarray(features[0]), np.asarray(means[3]))
      np.testing.assert_allclose(answers[0][0, 3], expected, rtol=1e-5)
  assert np.isneginf(answers[0][:, 1]).all()
  assert np.isfinite(answers[1][:, [0, 1, 2, 3]]).all()


def test_the_bank_crosses_into_another_phase(streamed):
  state = streamed[0][1]
  slower = wrapped(finetune(optimizer=optim.adam(0.01)))
  crossed = fmeta.retune(state, LEARNER, slower, KEY)
  assert_same(state.frozen, crossed.frozen, 'bank')
  assert_same(state.trainable, crossed.trainable, 'adapter')


# A random BERT, through `fit`.

CONFIG = models.BertConfig(
  vocab_size=11,
  hidden_size=8,
  num_layers=1,
  num_heads=2,
  intermediate_size=12,
  max_positions=9,
  dropout=0.1,
  attention_dropout=0.0,
)
BERT = models.BertClassifier(CONFIG, num_classes=None)
PLACES, TEXTS = 'body/layer_0/mlp/down/kernel', 4


def words(task, index):
  rng = np.random.default_rng([7, task, index])
  label = rng.choice(GROUPS[task], 4).astype(np.int32)
  ids = np.concatenate([label[:, None], rng.integers(0, 11, (4, 3))], axis=1)
  allowed = np.tile(np.isin(np.arange(CLASSES), GROUPS[task]), (4, 1))
  mask = np.ones((4, 4), np.int32)
  return {
    'input_ids': ids.astype(np.int32),
    'attention_mask': mask,
    'label': label,
    'allowed': allowed,
  }


class Stop(Exception):
  """Stands for a kill."""


def text_stages(cut=None):
  def batches(task, i):
    if cut == task * TEXTS + i:
      raise Stop
    return words(task, i)

  return [
    train.Stage(
      f't{k}',
      functools.partial(batches, k),
      TEXTS,
      remember=[words(k, i) for i in range(3)],
    )
    for k in range(TASKS)
  ]


def test_a_prefix_in_the_bank_is_not_entered():
  embed = models.forward(BERT, method='embed')
  params, _ = models.init(BERT, KEY, words(0, 0))
  tuning = adapters.prefix('body/.*/(key|value)/kernel', length=2)
  learner = wrapped(fmeta.finetune(LOSS, optim.sgd(0.1), tuning=tuning), embed)
  params = learner.params(learner.init(params, KEY))
  bare = {k: v for k, v in params.items() if k != 'ease'}
  run = jax.jit(lambda params: embed(params, {}, words(0, 0), None)[0])
  np.testing.assert_array_equal(run(params), run(bare))


@pytest.mark.usefixtures('optimised')
def test_bert_resumes_bitwise_within_a_task_and_at_its_end(tmp_path):
  embed = models.forward(BERT, method='embed')
  params, _ = models.init(BERT, KEY, words(0, 0))
  head = {'kernel': jax.random.normal(KEY, (8, CLASSES))}
  loss = losses.supervised(
    cosine_classifier(embed, 5.0),
    continual.masked(losses.softmax_cross_entropy),
  )
  tuning = adapters.bottleneck(PLACES, width=3, also=('head/.*',))
  learner = continual.ease(
    fmeta.finetune(loss, optim.adam(1e-2), tuning=tuning),
    embed,
    tasks=TASKS,
    num_classes=CLASSES,
    dim=8,
  )
  answer = jax.jit(continual.ease_forward(embed))
  program = train.Program(learner)

  def row(params, state, stage):
    logits, _ = answer(params, state, words(0, 9), None)
    return logits[0, : stage + 1]

  def run(cut=None, **options):
    return train.fit(
      learner,
      learner.init({**params, 'head': head}, KEY),
      text_stages(cut),
      KEY,
      forward=embed,
      after_stage=row,
      quiet=True,
      steps_per_dispatch=2,
      checkpoint_every=2,
      program=program,
      **options,
    )

  whole = run()
  assert int(whole.state.frozen['ease']['done']) == TASKS
  for cut in (TEXTS + 3, 2 * TEXTS):
    with pytest.raises(Stop):
      run(cut, workdir=tmp_path / str(cut))
    found = run(workdir=tmp_path / str(cut), resume=True)
    assert_same(whole.state, found.state, f'cut at {cut}')
    assert whole.matrix == found.matrix


# Misuse.


def ended(learner, batches=None):
  state = learner.init(PARAMS, KEY)
  batches = remembered(0) if batches is None else batches
  return learner, learner.end_task(state, EMBED, batches, KEY)


@pytest.mark.parametrize(
  ('misuse', 'says'),
  [
    (lambda: wrapped(tasks=0), 'ease over 0 tasks'),
    (
      lambda: wrapped(finetune(fmeta.lora('body/.*kernel', rank=1))).init(
        PARAMS, KEY
      ),
      'is merged into another parameter.*give the learner bottleneck',
    ),
    (
      lambda: wrapped(finetune(fmeta.select('head/.*'))).init(PARAMS, KEY),
      "only 'head' is trainable.*simple_cil",
    ),
    (lambda: ended(LEARNER, []), r'needs the rows.*remember=batches'),
    (lambda: ended(wrapped(dim=3)), r'features of shape \(8, 4\).*dim=3'),
    (lambda: ANSWER(PARAMS, {}, queries(), None), "have no 'ease' but"),
  ],
)
def test_misuse_is_refused(misuse, says):
  with pytest.raises(UsageError, match=says):
    misuse()


def test_one_task_too_many_is_refused():
  learner, state = ended(wrapped(tasks=1))
  with pytest.raises(UsageError, match='room for tasks=1.*give more'):
    learner.end_task(state, EMBED, remembered(0), KEY)
