"""Omniglot: what is judged alone does not see the other queries."""

import importlib

import jax
import numpy as np
import pytest

from experiments.common import Seeds
from experiments.fewshot.omniglot import measure, task
from fmeta.datasets.omniglot import SIDE
from fmeta.workdir import Context

METHODS = 'protonet', 'maml', 'leo', 'pmf', 'baseline_plus_plus'


def method_of(name, folder):
  """What an experiment gives to `task.run`."""
  module = importlib.import_module(f'experiments.fewshot.omniglot.{name}')
  config, seen = module.Config(**module.SMALL, seed=Seeds()), []
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(
      task, 'run', lambda config, context, method, *_: seen.append(method)
    )
    module.run(config, Context(folder))
  return seen[0]


def episode(seed):
  """Five supports and six queries; the first query is always the same."""
  support, first = (np.random.default_rng(k) for k in range(2))
  others = np.random.default_rng(seed)
  image = lambda random, rows: random.random(
    (1, rows, SIDE, SIDE, 1), 'float32'
  )
  queries = np.concatenate([image(first, 1), image(others, 5)], 1)
  label = np.arange(6, dtype=np.int32)[None] % 5
  return measure.with_support(
    {
      'support': {'image': image(support, 5), 'label': label[:, :5]},
      'query': {'image': queries, 'label': label},
    }
  )


@pytest.mark.parametrize('name', METHODS)
def test_other_queries_change_an_answer_only_in_transduction(
  name, tmp_path, drawn
):
  method = method_of(name, tmp_path)

  def answers(predict):
    run = jax.jit(lambda params, batch: predict(params, batch, None))
    return [np.asarray(run(method.params, episode(k))) for k in (2, 3)]

  one, two = answers(method.predict_alone)
  np.testing.assert_array_equal(one[0, 0], two[0, 0])
  assert np.any(one[0, 1] != two[0, 1])
  one, two = answers(method.predict)
  gap = np.abs(one[0, 0] - two[0, 0]).max()
  assert gap > 1e-3 * np.abs(one).max()
