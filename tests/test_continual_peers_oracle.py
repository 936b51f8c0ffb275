"""What Avalanche 0.6.0 computes where the analytic suite has an equation.

Needs `./launch/peers.sh` besides --oracles; see fmeta/continual/README.md.
"""

import importlib.util
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmeta import fisher, penalty

pytestmark = [
  pytest.mark.oracle,
  pytest.mark.skipif(
    importlib.util.find_spec('avalanche') is None,
    reason='Avalanche is not installed: ./launch/peers.sh',
  ),
]
ROWS, FEATURES, CLASSES = 64, 5, 3
RNG = np.random.default_rng(0)
X = RNG.normal(size=(ROWS, FEATURES)).astype(np.float32)
LABEL = RNG.integers(0, CLASSES, ROWS).astype(np.int32)
KERNEL = RNG.normal(size=(FEATURES, CLASSES)).astype(np.float32)
PARAMS = {'kernel': jnp.asarray(KERNEL)}


def forward(params, model_state, batch, rng):
  return batch['x'] @ params['kernel'], model_state


def batches(size):
  return [
    {'x': X[k : k + size], 'label': LABEL[k : k + size]}
    for k in range(0, ROWS, size)
  ]


def ours(importance):
  return [
    importance(forward, PARAMS, PARAMS, {}, batches(size), jax.random.key(0))
    for size in (1, 8, 64)
  ]


def theirs(plugin_of, importances_of, size):
  """Avalanche's importance after an epoch at rate zero."""
  import torch

  from experiments.benchmarks.continual_in_torch import without_operators

  without_operators()
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')
    from avalanche.benchmarks import benchmark_from_datasets
    from avalanche.benchmarks.utils import (
      _make_taskaware_classification_dataset as dataset_of,
    )
    from avalanche.training import plugins
    from avalanche.training.supervised import Naive

    label = torch.from_numpy(LABEL).long()
    data = torch.utils.data.TensorDataset(torch.from_numpy(X), label)
    data.targets = label.tolist()
    stream = benchmark_from_datasets(
      train=[dataset_of(data, task_labels=0)]
    ).train_stream
    model = torch.nn.Linear(FEATURES, CLASSES, bias=False)
    with torch.no_grad():
      model.weight.copy_(torch.from_numpy(KERNEL.T.copy()))
    plugin = plugin_of(plugins)
    Naive(
      model=model,
      optimizer=torch.optim.SGD(model.parameters(), lr=0.0),
      criterion=torch.nn.CrossEntropyLoss(),
      train_mb_size=size,
      train_epochs=1,
      evaluator=None,
      plugins=[plugin],
    ).train(stream[0])
  (found,) = importances_of(plugin)
  return found.data.numpy().T


def avalanche_ewc(size):
  return theirs(
    lambda plugins: plugins.EWCPlugin(ewc_lambda=1.0),
    lambda plugin: plugin.importances[0].values(),
    size,
  )


def avalanche_mas(size):
  return theirs(
    lambda plugins: plugins.MASPlugin(lambda_reg=1.0, alpha=0.5),
    lambda plugin: plugin.importance.values(),
    size,
  )


def test_ewc_importances_of_avalanche_shrink_with_the_batch_size():
  one, eight, whole = (avalanche_ewc(size) for size in (1, 8, 64))
  empirical = ours(fisher.empirical_fisher)
  np.testing.assert_allclose(one, empirical[0]['kernel'], rtol=1e-4)
  assert eight.sum() < one.sum() / 4 and whole.sum() < one.sum() / 10
  for other in empirical[1:]:
    np.testing.assert_allclose(
      other['kernel'], empirical[0]['kernel'], rtol=1e-5
    )


def test_at_no_batch_size_are_they_the_fisher():
  exact = ours(fisher.exact_fisher)[0]['kernel']
  for size in (1, 8, 64):
    assert np.abs(avalanche_ewc(size) / exact - 1).max() > 0.2


def test_mas_importances_of_avalanche_depend_on_the_batch_size():
  one, whole = avalanche_mas(1), avalanche_mas(64)
  mine = ours(penalty.output_sensitivity)
  np.testing.assert_allclose(one, mine[0]['kernel'], rtol=1e-4)
  np.testing.assert_allclose(mine[2]['kernel'], mine[0]['kernel'], rtol=1e-5)
  assert whole.sum() < 0.9 * one.sum()
