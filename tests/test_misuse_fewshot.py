"""What a newcomer gets wrong with episodes is named, with what to do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

import fmeta
from fmeta import episodes, evaluate, fewshot, meta, optim, through
from fmeta.errors import UsageError

KEY = jax.random.key(2)
LOSS, PARAMS, _, FORWARD = toys.problem(sizes=(4,))
INNER = fmeta.finetune(LOSS, optim.sgd(0.1))
PULLED = fmeta.finetune(LOSS, optim.sgd(0.1), penalty=fmeta.l2_sp(1.0))


def batch():
  parts = {'support': toys.batch_of(4), 'query': toys.batch_of(3, seed=1)}
  return jax.tree.map(lambda x: jnp.stack([x, x]), parts)


def value(given=None, inner=INNER, num_steps=2, **options):
  loss = fmeta.episode_loss(inner, LOSS, num_steps, **options)
  return loss(PARAMS, {}, batch() if given is None else given, KEY)[0]


@pytest.mark.parametrize('num_steps', [-1, 2.5, '2', None])
def test_a_number_of_steps_that_counts_nothing_is_refused(num_steps):
  with pytest.raises(UsageError, match='give 0, 1, 2'):
    value(num_steps=num_steps)


def test_steps_may_be_counted_by_numpy():
  assert value(num_steps=np.int64(2)) == value(num_steps=2)


@pytest.mark.parametrize(
  'way',
  ['mixed', through.in_segments, fmeta.gradients.first_order(), None],
)
def test_what_is_no_way_through_a_loop_is_refused_with_those_that_are(way):
  with pytest.raises(UsageError, match='mixed, first_order, in_segments'):
    value(through=way)


@pytest.mark.parametrize('way', [through.implicit, through.mixed])
def test_implicit_without_its_solver_is_refused(way):
  with pytest.raises(UsageError, match=r'implicit\(cg\(num_steps\)\)'):
    if way is through.implicit:
      value(inner=PULLED, through=way)
    else:
      through.implicit(5)


def test_a_series_that_goes_nowhere_is_refused():
  with pytest.raises(UsageError, match='above 0'):
    through.neumann(3, -1.0)


def test_chunks_of_no_tasks_are_refused():
  with pytest.raises(UsageError, match='at least 1'):
    meta.in_chunks(0)


LOSSES = {
  'episode_loss': lambda b: value(b),
  'reptile_loss': lambda b: fmeta.reptile_loss(INNER, 1)(PARAMS, {}, b, KEY),
  'head_loss': lambda b: fewshot.head_loss(fewshot.prototypes, FORWARD, 3)(
    PARAMS, {}, b, KEY
  ),
  'predict_episodes': lambda b: fmeta.predict_episodes(INNER, FORWARD, 1)(
    PARAMS, b, KEY
  ),
  'predict_by_step': lambda b: fewshot.predict_by_step(INNER, FORWARD, 1)(
    PARAMS, b, KEY
  ),
  'starting_from': lambda b: fewshot.starting_from(
    fewshot.context_start(2), LOSS
  )(PARAMS, {}, b, KEY),
}


@pytest.mark.parametrize('name', LOSSES)
def test_a_batch_that_is_no_episode_is_refused(name):
  with pytest.raises(UsageError, match='leading task axis'):
    LOSSES[name](toys.batch_of(4))


@pytest.mark.parametrize('name', ['episode_loss', 'head_loss'])
def test_an_episode_without_a_task_axis_is_refused(name):
  with pytest.raises(UsageError, match='task axis in common'):
    LOSSES[name](jax.tree.map(lambda x: x[0], batch()))


def test_an_inner_learner_of_rates_asks_for_them():
  def inner(rate):
    return fmeta.finetune(LOSS, optim.sgd(rate))

  with pytest.raises(UsageError, match='"hyper": what is learned'):
    value(inner=inner)


def columns():
  x = np.random.default_rng(0).normal(size=(24, 3)).astype(np.float32)
  return {'x': x, 'label': np.repeat(np.arange(6), 4)}


def test_sizes_of_episodes_are_integers():
  with pytest.raises(UsageError, match='ways 5.0 is no integer'):
    episodes.episodes(columns(), 5.0, 1, 1, 0)  # pyright: ignore


def test_a_list_of_episodes_goes_where_episodes_go():
  listed = episodes.evaluation_episodes(columns(), 3, 1, 2, 0, 8, tasks=4)
  answer = fewshot.predict_head(fewshot.prototypes, identity, 3)
  found = evaluate.evaluate_episodes(answer, {}, listed, listed.num)
  same = evaluate.evaluate_episodes(answer, {}, listed.source, listed.num)
  np.testing.assert_array_equal(found, same)


def identity(params, model_state, batch, rng):
  del params, rng
  return batch['x'], model_state


def test_more_classes_than_logits_are_named():
  listed = episodes.evaluation_episodes(columns(), 5, 1, 2, 0, 4)
  answer = fewshot.predict_head(fewshot.prototypes, identity, 3)
  with pytest.raises(UsageError, match='label 4 and predict_fn gave 3 logits'):
    evaluate.evaluate_episodes(answer, {}, listed, 4)


def test_a_relation_without_units_is_refused():
  with pytest.raises(UsageError, match='4 features and 0 hidden units'):
    fewshot.relation_init(KEY, 4, 0)
