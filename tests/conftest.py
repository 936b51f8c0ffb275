"""Fixtures and the switches every test runs under."""

import os
import sys

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
if 'host_platform_device_count' not in os.environ.get('XLA_FLAGS', ''):
  os.environ['XLA_FLAGS'] = (
    os.environ.get('XLA_FLAGS', '')
    + ' --xla_force_host_platform_device_count=8'
  )
if '--oracles' in sys.argv:  # The workers of pytest-xdist have other arguments.
  os.environ['FMETA_ORACLES'] = '1'
if 'FMETA_ORACLES' not in os.environ:
  # Compiling is most of what tests do, and XLA's fusion emitters 40 % of that
  # (2026-11-24). With --oracles, which also repeats the tests that want code
  # as users get it (`optimised`), they stay on.
  os.environ['XLA_FLAGS'] += ' --xla_cpu_use_fusion_emitters=false'

import pathlib

import jax
import pytest

# Several host devices and an unblocked loop deadlock (see BUILD.md).
jax.config.update('jax_cpu_enable_async_dispatch', False)
jax.config.update('jax_numpy_rank_promotion', 'raise')
# Compiling is most of what tests do; LLVM's passes double it. HLO passes, and
# so FLOPs and fusions, stay; the `optimised` fixture brings the rest back.
jax.config.update('jax_disable_most_optimizations', True)


def pytest_addoption(parser):
  parser.addoption(
    '--oracles', action='store_true', help='also compare with peer libraries'
  )


@pytest.hookimpl(tryfirst=True)  # before `-m` selects
def pytest_collection_modifyitems(config, items):
  for item in items:
    if 'optimised' in item.fixturenames:
      item.add_marker('optimised')
  if config.getoption('--oracles'):
    return
  skip = pytest.mark.skip(reason='compares with a peer library: --oracles')
  for item in items:
    if 'oracle' in item.keywords:
      item.add_marker(skip)


_BEFORE = {'optimised': False}


def pytest_runtest_setup(item):
  # A function that a test before compiled without the passes differs in the
  # last bit, and a cache that is full drops it in the middle of the next test.
  now = 'optimised' in item.fixturenames
  if now and not _BEFORE['optimised']:
    jax.clear_caches()
  _BEFORE['optimised'] = now


@pytest.fixture
def optimised():
  """Compiles as users do."""
  jax.config.update('jax_disable_most_optimizations', False)
  yield
  jax.config.update('jax_disable_most_optimizations', True)


@pytest.fixture
def as_users(optimised):
  """Compiles exactly as users do; skips where XLA_FLAGS forbid it.

  For what is bitwise only so: without XLA's fusion emitters a scanned and a
  looped step may differ in the last bit.
  """
  if 'fusion_emitters=false' in os.environ.get('XLA_FLAGS', ''):
    pytest.skip('needs code compiled as for users: --oracles')


@pytest.fixture
def x64():
  """Runs a test in float64."""
  with jax.enable_x64(True):
    yield


@pytest.fixture(scope='session')
def tiny_bert(tmp_path_factory) -> pathlib.Path:
  """A checkpoint folder: BERT of width 16, random, MiniLM's tokenizer."""
  import numpy as np

  from fmeta import models, pretrained
  from fmeta.errors import UsageError

  try:
    tokenizer = pretrained.find(pretrained.MINILM)
  except UsageError as error:
    pytest.skip(str(error))
  config = models.BertConfig(
    hidden_size=16, num_layers=2, num_heads=2, intermediate_size=32
  )
  ids = jax.ShapeDtypeStruct((1, 4), 'int32')
  shapes = jax.eval_shape(
    models.BertClassifier(config).init, jax.random.key(0), ids, ids
  )
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda x: rng.normal(0, 0.1, x.shape).astype(np.float32), shapes['params']
  )
  folder = tmp_path_factory.mktemp('bert') / 'model'
  pretrained.save_bert(folder, params, config, tokenizer)
  return folder


@pytest.fixture(scope='session')
def shared_data() -> pathlib.Path:
  """The folder with real data and weights; skips the test without it."""
  beside = (
    pathlib.Path(__file__).resolve().parents[1].parent / 'shared' / 'data'
  )
  folder = pathlib.Path(os.environ.get('FMETA_SHARED_DATA', beside))
  if not folder.is_dir():
    pytest.skip(f'no real data at {folder}; set FMETA_SHARED_DATA')
  return folder


@pytest.fixture
def drawn(monkeypatch):
  """Sixty made-up characters wherever Omniglot is loaded."""
  from characters import drawn_characters

  from fmeta.datasets import omniglot

  monkeypatch.setattr(omniglot, 'load', lambda folder: drawn_characters())
