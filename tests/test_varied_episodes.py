"""Tasks of any size: the draw, and that padding changes nothing."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import toys

from fmeta import controls, evaluate, fewshot, losses, meta, models, optim
from fmeta.errors import UsageError
from fmeta.fewshot.varied_episodes import _shots
from fmeta.learner import finetune
from fmeta.testing import assert_close

KEY = jax.random.key(9)
LIMITS = fewshot.Limits(
  min_ways=3, max_ways=6, max_queries=4, max_support=20, max_contribution=8
)
COUNTS = [5, 9, 12, 30, 7, 8, 21, 6, 10, 15]


def columns(features=4, groups=2):
  random = np.random.default_rng(0)
  label = np.repeat(np.arange(len(COUNTS), dtype=np.int32), COUNTS)
  centre = 3 * random.normal(size=(len(COUNTS), features))
  x = centre[label] + random.normal(size=(len(label), features))
  return {
    'x': x.astype(np.float32),
    'label': label,
    'original': label,
    'row': np.arange(len(label), dtype=np.int32),
    'group': label % groups,
  }


def source(**options):
  return fewshot.varied_episodes(columns(), 1, LIMITS, **options)


def real(part, task):
  """A part's rows of one task without padding."""
  keep = part['weight'][task] > 0
  return {name: array[task][keep] for name, array in part.items()}


def test_support_and_query_share_no_example_and_one_shape():
  made = source(tasks=4)
  for i in range(25):
    out = made(i)
    assert out['support']['x'].shape == (4, 20, 4)
    assert out['query']['x'].shape == (4, 24, 4)
    for task in range(4):
      support, query = real(out['support'], task), real(out['query'], task)
      rows = np.concatenate([support['row'], query['row']])
      assert len(np.unique(rows)) == len(rows)


def test_a_label_is_one_class_and_a_row_keeps_its_columns():
  given, out = columns(), source(tasks=8)(3)
  for task in range(8):
    owner = {}
    for part in out.values():
      rows = real(part, task)
      np.testing.assert_array_equal(rows['x'], given['x'][rows['row']])
      for label, original in zip(rows['label'], rows['original'], strict=True):
        assert owner.setdefault(int(label), int(original)) == original
    assert sorted(owner) == list(range(len(owner)))
    assert len(set(owner.values())) == len(owner)


def test_sizes_follow_the_rules_of_the_paper():
  made = source()
  for task in range(300):
    classes, queries, shots = made.sizes(task)
    counts = np.array(COUNTS)[classes]
    assert 3 <= len(classes) <= 6
    assert queries == min(4, counts.min() // 2)
    assert shots.min() >= 1 and np.all(shots <= counts - queries)
    assert shots.sum() <= 20
    support, label, query, asked = made.rows(task)
    np.testing.assert_array_equal(np.bincount(label), shots)
    np.testing.assert_array_equal(np.bincount(asked), [queries] * len(classes))
    assert (len(support), len(query)) == (len(label), len(asked))


def test_shots_by_hand():
  # |S| = min(20, ceil(.5 * 8) + ceil(.5 * 4) + ceil(.5 * 7)) = 10, of which
  # three are given and seven shared as 20 : 3 : 18.
  counts, limits = np.array([20, 6, 9]), LIMITS
  log_weights = np.log([1.0, 0.5, 2.0])
  found = _shots(counts, 2, limits, 0.5, log_weights)
  shares = [7 * 20 / 41, 7 * 3 / 41, 7 * 18 / 41]
  np.testing.assert_array_equal(found, [int(x) + 1 for x in shares])
  np.testing.assert_array_equal(found, [4, 1, 4])
  # No class gives more than it has: 2 rest of the second.
  tight = _shots(np.array([20, 4]), 2, limits, 0.99, np.log([0.5, 2.0]))
  assert tight[1] == 2


def test_ways_are_uniform_and_tasks_differ_in_size():
  made = source()
  sizes = [made.sizes(task) for task in range(400)]
  ways = np.bincount([len(s.classes) for s in sizes], minlength=7)[3:]
  assert scipy.stats.chisquare(ways).pvalue > 0.01
  assert len({int(s.shots.sum()) for s in sizes}) > 8
  drawn = np.bincount(np.concatenate([s.classes for s in sizes]))
  assert scipy.stats.chisquare(drawn).pvalue > 0.01


def test_tasks_are_pure_in_seed_and_index_whatever_the_meta_batch():
  one, many = source(), source(tasks=3)
  whole = many(2)
  for task in range(3):
    alone = one(6 + task)
    for part in ('support', 'query'):
      for name, array in alone[part].items():
        np.testing.assert_array_equal(array[0], whole[part][name][task])
  other = fewshot.varied_episodes(columns(), 2, LIMITS)
  assert not np.array_equal(
    one(0)['support']['row'], other(0)['support']['row']
  )


RECORDED = (
  [107, 101, 61, 59, 5, 11, 13, 20, 15, 23, 94, 96],
  [0, 0, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4],
  [102, 100, 104, 56, 57, 60, 8, 7, 9, 21, 19, 14, 93, 92, 97],
)


def test_varied_episodes_are_the_same_forever():
  # Recorded 2026-11; a change would silently break every resumed run.
  support, label, query, _ = source().rows(5)
  assert (support.tolist(), label.tolist(), query.tolist()) == RECORDED


def test_classes_of_a_task_come_from_one_group():
  made = source(within='group', tasks=8)
  groups = set()
  for i in range(5):
    out = made(i)
    for task in range(8):
      found = set(real(out['support'], task)['group'].tolist())
      assert len(found) == 1
      groups |= found
  assert groups == {0, 1}


def test_a_bert_like_collate_sees_rows_with_labels_and_weights():
  seen = []

  def collate(batch):
    seen.append(set(batch))
    return {**batch, 'twice': 2 * batch['x']}

  out = source(collate=collate)(0)
  np.testing.assert_array_equal(out['query']['twice'], 2 * out['query']['x'])
  assert seen[0] >= {'x', 'label', 'weight'}


def test_each_meta_batch_is_of_one_domain_in_the_stated_shares():
  sources = [lambda i, k=k: (k, i) for k in range(3)]
  made = fewshot.from_domains(sources, 4, (1, 2, 5))
  drawn = [made(i) for i in range(800)]
  assert [i for _, i in drawn] == list(range(800))
  counts = np.bincount([k for k, _ in drawn])
  assert scipy.stats.chisquare(counts, [100, 200, 500]).pvalue > 0.01
  assert made(17) == drawn[17]
  equal = fewshot.from_domains(sources[:2], 4)
  counts = np.bincount([equal(i)[0] for i in range(400)])
  assert scipy.stats.chisquare(counts).pvalue > 0.01
  other = fewshot.from_domains(sources, 5, (1, 2, 5))
  assert [other(i) for i in range(50)] != drawn[:50]


@pytest.mark.parametrize('shares', [(1,), (1, 0), (1, 1, 1)])
def test_shares_that_do_not_fit_the_domains_are_refused(shares):
  with pytest.raises(UsageError, match='for 2 sources; give at least one'):
    fewshot.from_domains([lambda i: i] * 2, 0, shares)


class NormNet(nn.Module):
  """A norm by the statistics of the batch, then a head if there is one."""

  classes: int | None

  @nn.compact
  def __call__(self, x, weight=None, *, deterministic=True):
    x = nn.Dense(5, use_bias=False, name='body')(x)
    x = models.BatchNorm(True, name='norm')(x, deterministic, weight)
    x = nn.tanh(x)
    return x if self.classes is None else nn.Dense(self.classes, name='head')(x)


def learners(inputs):
  """(parameters, their losses by name) of a 6-way network."""
  classify = models.forward(NormNet(6), inputs)
  embed = models.forward(NormNet(None), inputs)
  loss = losses.supervised(classify, losses.softmax_cross_entropy)
  inner = finetune(loss, optim.sgd(0.3))
  maml = meta.episode_loss(inner, loss, 2)
  start = fewshot.prototype_start(embed, 6)
  return {
    'prototypes': fewshot.head_loss(fewshot.prototypes, embed, 6),
    'proto-maml': fewshot.starting_from(start, maml),
  }


def slope(loss, params, batch):
  run = lambda p, b: loss(p, {}, b, None)[0]
  return jax.jit(jax.value_and_grad(run))(params, batch)


@pytest.mark.parametrize('name', ['prototypes', 'proto-maml'])
def test_a_padded_task_is_the_task_alone(name, x64):
  names = ('x', 'label', 'weight')
  padded = source()(2)
  padded = {p: {k: padded[p][k] for k in names} for p in padded}
  alone = {p: real(padded[p], 0) for p in padded}
  alone = {p: {k: v[k][None] for k in names[:2]} for p, v in alone.items()}
  assert alone['support']['x'].shape[1] < 20
  assert alone['query']['x'].shape[1] < 24
  params, _ = models.init(
    NormNet(6), KEY, {'x': np.zeros((2, 4), np.float32)}, ('x',)
  )
  params = toys.double(params)
  found = slope(learners(('x', 'weight'))[name], params, toys.double(padded))
  expected = slope(learners(('x',))[name], params, toys.double(alone))
  assert_close(expected, found, name, 1e-10)
  if name == 'prototypes':
    # Of what the norm sees, padding would be a part.
    wrong = slope(learners(('x',))[name], params, toys.double(padded))
    assert abs(wrong[0] - expected[0]) > 1e-3


def test_tasks_of_all_sizes_share_one_compiled_step():
  outer = finetune(learners(('x', 'weight'))['prototypes'], optim.adam(0.01))
  traces = []

  @jax.jit
  def step(state, batch):
    traces.append(batch)
    return outer.step(state, batch, KEY)[0]

  params, _ = models.init(
    NormNet(6), KEY, {'x': np.zeros((2, 4), np.float32)}, ('x',)
  )
  state, made = outer.init(params, KEY), source(tasks=2)
  for i in range(6):
    state = step(state, made(i))
  assert len(traces) == 1
  assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(state.trainable))


def embed(params, model_state, batch, rng):
  return batch['x'], model_state


def test_renamed_support_classes_leave_chance_and_true_ones_do_not():
  predict = fewshot.predict_head(fewshot.prototypes, embed, 6)
  made = source(tasks=10)

  def control(i):
    return controls.rename_support_classes(made(i), 3)

  true = evaluate.evaluate_episodes(predict, {}, made, 600)
  renamed = evaluate.evaluate_episodes(predict, {}, control, 600)
  chance = np.array([1 / len(made.sizes(t).classes) for t in range(600)])
  gap = evaluate.summarize(renamed - chance)
  assert gap.ci95[0] < 0 < gap.ci95[1]
  assert true.mean() > 0.85


def test_renaming_permutes_whole_classes_and_is_pure():
  out = source(tasks=4)(1)
  renamed = controls.rename_support_classes(out, 3)
  again = controls.rename_support_classes(out, 3)
  before, after = out['support'], renamed['support']
  np.testing.assert_array_equal(after['label'], again['support']['label'])
  assert renamed['query'] is out['query']
  assert np.any(before['label'] != after['label'])
  for task in range(4):
    pairs = set(
      zip(
        before['label'][task].tolist(),
        after['label'][task].tolist(),
        strict=True,
      )
    )
    # One to one, within the classes of the task.
    for side in zip(*pairs, strict=True):
      assert sorted(side) == list(range(len(pairs)))


def test_queries_of_weight_zero_do_not_count_in_the_accuracy():
  # Right on all of the real rows of task 0, on half of those of task 1.
  label = np.array([[0, 1, 2, 0, 0], [0, 1, 2, 0, 0]])
  weight = np.array([[1, 1, 1, 0, 0], [1, 1, 0, 0, 0]], np.float32)
  said = np.array([[0, 1, 2, 1, 1], [0, 2, 0, 0, 0]])
  episode = {'query': {'label': label, 'weight': weight}}
  found = evaluate.evaluate_episodes(
    lambda params, episode, rng: params, jnp.eye(3)[said], lambda i: episode, 2
  )
  np.testing.assert_array_equal(found, [1.0, 0.5])


def test_what_no_task_fits_is_refused_in_one_line():
  given, limits = columns(), fewshot.Limits
  make = fewshot.varied_episodes
  with pytest.raises(UsageError, match='11 ways need 11 classes, there are 10'):
    make(given, 0, limits(min_ways=11))
  with pytest.raises(UsageError, match='do not grow; every class needs a supp'):
    make(given, 0, limits(min_ways=5, max_ways=4))
  with pytest.raises(UsageError, match='max_queries 0 is not positive'):
    make(given, 0, limits(max_queries=0))
  with pytest.raises(
    UsageError, match=r'no group has 6 classes, the largest h'
  ):
    make(given, 0, limits(min_ways=6), within='group')
  single = {k: v[:6] for k, v in given.items()}
  with pytest.raises(
    UsageError, match=r'class 1 has 1 example\(s\), a support'
  ):
    make(single, 0, limits(min_ways=1))
