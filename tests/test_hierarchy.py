"""Tasks below the nodes of a hierarchy, and of several domains."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from fmeta import evaluate, fewshot
from fmeta.errors import UsageError

LIMITS = fewshot.Limits(
  min_ways=2, max_ways=4, max_queries=2, max_support=12, max_contribution=10
)
# A class may be below several nodes, and the last node has too few.
NODES = {
  'all': range(8),
  'left': (0, 1, 2),
  'right': (2, 5, 6, 7),
  'leaf': (3,),
}


def columns(seed=0, classes=8, width=3):
  random = np.random.default_rng(seed)
  label = np.repeat(np.arange(classes, dtype=np.int32), 9)
  centre = 4 * random.normal(size=(classes, width))
  x = centre[label] + random.normal(size=(len(label), width))
  return {'x': x.astype(np.float32), 'label': label, 'original': label}


def classes_of(source, num):
  """The true classes of the first `num` tasks."""
  found = []
  for i in range(num):
    part = source(i)['support']
    found.append(set(part['original'][0][part['weight'][0] > 0].tolist()))
  return found


def test_all_classes_of_a_task_are_below_one_node():
  source = fewshot.varied_episodes(columns(), 1, LIMITS, within=NODES)
  drawn = classes_of(source, 300)
  below = [set(NODES[name]) for name in ('all', 'left', 'right')]
  assert all(any(task <= node for node in below) for task in drawn)
  # A third of the tasks each; what is below no small node tells `all` apart.
  mixed = sum(not (task <= below[1] or task <= below[2]) for task in drawn)
  assert 0 < mixed < 100 + 3 * 8.2
  # Not only the node of all: its tasks of two or more rarely fit a small one.
  assert sum(task <= below[1] for task in drawn) > 60
  assert not any(task == {3} for task in drawn)


def test_nodes_are_drawn_with_equal_chance():
  nodes = {'a': (0, 1), 'b': (2, 3), 'c': (4, 5, 6, 7)}
  source = fewshot.varied_episodes(columns(), 3, LIMITS, within=nodes)
  drawn = classes_of(source, 600)
  counts = [sum(t <= set(below) for t in drawn) for below in nodes.values()]
  assert sum(counts) == 600
  assert scipy.stats.chisquare(counts).pvalue > 0.01


def test_a_hierarchy_is_cut_to_the_classes_of_a_split():
  chosen = (0, 1, 5, 6)
  source = fewshot.varied_episodes(
    columns(), 1, LIMITS, within=NODES, classes=chosen
  )
  assert len(source.pools) == 3
  assert set().union(*classes_of(source, 100)) == set(chosen)


def test_one_node_of_all_classes_is_no_hierarchy():
  plain = fewshot.varied_episodes(columns(), 1, LIMITS)
  below = fewshot.varied_episodes(
    columns(), 1, LIMITS, within={'root': np.arange(8)}
  )
  for i in range(5):
    jax.tree.map(np.testing.assert_array_equal, plain(i), below(i))


def test_what_no_hierarchy_is_is_refused():
  make = fewshot.varied_episodes
  with pytest.raises(
    UsageError, match=r'1 class\(es\) without examples, such a'
  ):
    make(columns(), 0, LIMITS, within={'root': range(9)})
  with pytest.raises(UsageError, match='no group has 2 classes, the largest h'):
    make(columns(), 0, LIMITS, within={'leaf': (3,)})
  mixed = {**columns(), 'group': np.arange(72) % 2}
  with pytest.raises(UsageError, match=r'class 0 is in the groups \[0, 1\]'):
    make(mixed, 0, LIMITS, within='group')


def test_a_step_trained_on_two_domains_is_tested_on_a_third_unchanged():
  made = [
    fewshot.varied_episodes(columns(seed, num), seed, LIMITS, tasks=2)
    for seed, num in enumerate((8, 5, 11))
  ]
  source = fewshot.from_domains(made[:2], 0)
  traces = []

  def predict(params, episode, rng):
    del rng
    traces.append(1)

    def one(support, query):
      return fewshot.prototypes(
        support['x'] @ params,
        support['label'],
        query['x'] @ params,
        LIMITS.max_ways,
        support['weight'],
      )

    return jax.vmap(one)(episode['support'], episode['query'])

  seen = evaluate.evaluate_episodes(predict, jnp.eye(3), source, 40)
  other = evaluate.evaluate_episodes(predict, jnp.eye(3), made[2], 40)
  assert len(traces) == 1  # three domains, one program
  assert seen.mean() > 0.8 and other.mean() > 0.8
