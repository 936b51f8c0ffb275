"""Fixtures and the switches every test runs under."""

import os

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
if 'xla_force_host_platform_device_count' not in os.environ.get(
  'XLA_FLAGS', ''
):
  os.environ['XLA_FLAGS'] = (
    os.environ.get('XLA_FLAGS', '')
    + ' --xla_force_host_platform_device_count=8'
  )

import pathlib

import jax
import pytest

# Several host devices and an unblocked loop deadlock (see BUILD.md).
jax.config.update('jax_cpu_enable_async_dispatch', False)
jax.config.update('jax_numpy_rank_promotion', 'raise')


def pytest_addoption(parser):
  parser.addoption(
    '--oracles', action='store_true', help='also compare with peer libraries'
  )


def pytest_collection_modifyitems(config, items):
  if config.getoption('--oracles'):
    return
  skip = pytest.mark.skip(reason='compares with a peer library: --oracles')
  for item in items:
    if 'oracle' in item.keywords:
      item.add_marker(skip)


@pytest.fixture
def x64():
  """Runs a test in float64."""
  with jax.enable_x64(True):
    yield


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
