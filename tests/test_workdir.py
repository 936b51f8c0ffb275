import json
import os

import jax.numpy as jnp
import numpy as np
import pytest

from fmeta import result, workdir
from fmeta.errors import UsageError

# The schema of result.json, in its order.
SCHEMA = (
  'experiment metrics ci95 steps examples_per_second wall_seconds '
  'flops_per_step peak_bytes trainable_parameters total_parameters devices '
  'data_sha256 versions commit'
).split()


def test_numbers_go_up_from_the_highest(tmp_path):
  root = tmp_path / 'runs' / 'finetune' / 'toy'
  assert workdir.next_free(root).name == '001'
  assert workdir.next_free(root).name == '002'
  (root / '017').mkdir()
  (root / 'notes').mkdir()
  assert workdir.next_free(root).name == '018'


def test_two_runs_that_see_the_same_highest_get_two_folders(
  tmp_path, monkeypatch
):
  # Both look before either makes its folder.
  monkeypatch.setattr(type(tmp_path), 'iterdir', lambda self: iter(()))
  names = [workdir.next_free(tmp_path).name for _ in range(3)]
  assert names == ['001', '002', '003']


def test_a_new_or_empty_folder_is_claimed(tmp_path):
  assert workdir.claim(tmp_path / 'a' / 'b').is_dir()
  assert workdir.claim(tmp_path / 'a' / 'b').is_dir()


def test_a_folder_that_holds_something_is_left_alone(tmp_path):
  (tmp_path / 'thesis.tex').write_text('years')
  with pytest.raises(UsageError, match='not empty; .*--resume'):
    workdir.claim(tmp_path)
  assert [path.name for path in tmp_path.iterdir()] == ['thesis.tex']


@pytest.mark.parametrize('take', [workdir.claim, workdir.next_free])
def test_a_folder_under_a_file_cannot_be_written(tmp_path, take):
  (tmp_path / 'file').write_text('x')
  with pytest.raises(UsageError, match='cannot be written .*--workdir=DIR'):
    take(tmp_path / 'file' / 'run')


def test_a_read_only_folder_is_refused_before_anything_is_written(
  tmp_path, monkeypatch
):
  # Root may write everywhere, so the permission itself is simulated.
  monkeypatch.setattr(os, 'access', lambda path, mode: False)
  with pytest.raises(UsageError, match='cannot be written'):
    workdir.claim(tmp_path)
  assert not list(tmp_path.iterdir())


def test_what_was_asked_is_in_the_folder(tmp_path):
  source = tmp_path / 'toy.py'
  source.write_text('"""Toy."""\n')
  folder = workdir.claim(tmp_path / 'run')
  workdir.describe(folder, {'lr': 0.1}, 'finetune/toy', source)
  assert workdir.reopen(folder) == {'lr': 0.1}
  assert (folder / 'experiment.py').read_bytes() == source.read_bytes()
  run = json.loads((folder / 'run.json').read_text())
  assert run['experiment'] == 'finetune/toy'
  workdir.discard(folder)
  assert not folder.exists()


def test_a_folder_with_results_is_never_discarded(tmp_path):
  source = tmp_path / 'toy.py'
  source.write_text('')
  folder = workdir.claim(tmp_path / 'run')
  workdir.describe(folder, {}, 'toy', source)
  (folder / 'metrics.jsonl').write_text('{}')
  workdir.discard(folder)
  assert len(list(folder.iterdir())) == 4


@pytest.mark.parametrize(
  'content, words',
  [(None, 'cannot be read'), ('{"lr": ', 'is not JSON')],
)
def test_a_folder_without_a_good_config_is_not_resumed(
  tmp_path, content, words
):
  if content is not None:
    (tmp_path / 'config.json').write_text(content)
  with pytest.raises(UsageError, match=words) as caught:
    workdir.reopen(tmp_path)
  assert '\n' not in str(caught.value)


def test_a_run_that_does_not_exist_is_not_resumed(tmp_path):
  with pytest.raises(UsageError, match='without --resume'):
    workdir.reopen(tmp_path / 'nowhere')


def test_json_holds_numbers_and_never_nan(tmp_path):
  path = tmp_path / 'x.json'
  workdir.write_json(
    path,
    {
      'a': np.float32(0.5),
      'b': jnp.arange(2),
      'c': (float('inf'), np.nan),
      'd': {1: np.int64(3), 'e': None, 'f': True},
    },
  )
  assert json.loads(path.read_text()) == {
    'a': 0.5,
    'b': [0, 1],
    'c': [None, None],
    'd': {'1': 3, 'e': None, 'f': True},
  }


def test_a_failed_write_leaves_the_old_file(tmp_path):
  path = tmp_path / 'x.json'
  workdir.write_json(path, {'a': 1})
  with pytest.raises(TypeError):
    workdir.write_json(path, {'a': object()})
  assert json.loads(path.read_text()) == {'a': 1}


def test_the_result_has_exactly_the_fields_of_the_schema(tmp_path):
  outcome = {
    'metrics': {'accuracy': np.float32(0.75)},
    'ci95': {'accuracy': [0.5, 1.0]},
    'steps': 3,
    'peak_bytes': 12,
    'data_sha256': 'ab',
  }
  result.write(tmp_path, 'finetune/toy', outcome, 1.23456)
  stored = json.loads((tmp_path / 'result.json').read_text())
  assert list(stored) == SCHEMA
  assert stored['experiment'] == 'finetune/toy'
  assert stored['metrics'] == {'accuracy': 0.75}
  assert stored['ci95'] == {'accuracy': [0.5, 1.0]}
  assert stored['wall_seconds'] == 1.235
  assert stored['peak_bytes'] == 12
  assert stored['examples_per_second'] is None
  assert stored['devices']['count'] == 8
  assert stored['versions']['jax'].count('.') >= 2


def test_peak_bytes_is_measured_when_it_is_not_given(tmp_path):
  stored = result.write(tmp_path, 'toy', {'metrics': {}}, 0.0)
  # A Python that has imported jax holds more than 50 MB and less than 50 GB.
  assert 5e7 < stored['peak_bytes'] < 5e10


@pytest.mark.parametrize('outcome', [{'steps': 1}, {'metrics': {}, 'acc': 1}])
def test_an_outcome_out_of_the_schema_is_a_bug(tmp_path, outcome):
  with pytest.raises(ValueError, match='possible'):
    result.write(tmp_path, 'toy', outcome, 0.0)
  assert not list(tmp_path.iterdir())


def test_no_commit_is_claimed_outside_a_checkout(tmp_path, monkeypatch):
  monkeypatch.setattr(result, '__file__', str(tmp_path / 'fmeta' / 'x.py'))
  assert result.commit() is None
