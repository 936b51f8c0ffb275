"""EASE's learner: what its bank keeps, fresh tasks, resume, misuse."""

import functools

import flax.linen as nn
import jax
import numpy as np
import optax
import pytest
import toys
from eased import (
  ANSWER,
  CLASSES,
  EMBED,
  GROUPS,
  HEAD,
  KEY,
  LEARNER,
  LOSS,
  PARAMS,
  STEP,
  STEPS,
  TASKS,
  batch,
  cosine,
  finetune,
  fit,
  queries,
  remembered,
  streamed,
  wrapped,
)

import fmeta
from fmeta import adapters, continual, losses, models, optim, train, tree
from fmeta.continual.ease.learner import BIRTH
from fmeta.errors import UsageError
from fmeta.fewshot import cosine_classifier
from fmeta.testing import assert_same, check_learner


def test_banked_adapters_never_move_again():
  ended, trained = streamed()
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


def test_a_task_begins_as_a_fresh_learner_does():
  inner, state = finetune(), streamed()[0][0]
  key = jax.random.fold_in(jax.random.fold_in(KEY, 0), BIRTH)
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


def test_the_model_beside_the_bank_is_the_model_without_it():
  state = streamed()[0][1]
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


def test_the_bank_crosses_into_another_phase():
  state = streamed()[0][1]
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
