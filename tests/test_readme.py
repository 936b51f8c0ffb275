"""What the README shows is what the code does."""

import pathlib
import re

import pytest

from fmeta import metrics, tree

ROOT = pathlib.Path(__file__).resolve().parents[1]
DOCUMENTS = (
  'README.md',
  'BUILD.md',
  'experiments/README.md',
  'fmeta/continual/README.md',
)


def test_the_library_example_runs_and_learns():
  text = (ROOT / 'README.md').read_text()
  block, _ = re.findall(r'```python\n(.*?)```', text, re.DOTALL)
  names = {}
  exec(compile(block, 'README.md', 'exec'), names)
  first, last = names['fitted'].history[0], names['fitted'].history[-1]
  assert last['loss'] < 0.7 * first['loss']
  assert names['maml'].step is not names['learner'].step


def test_the_few_shot_example_runs_and_what_it_learns_helps():
  text = (ROOT / 'README.md').read_text()
  _, block = re.findall(r'```python\n(.*?)```', text, re.DOTALL)
  names = {}
  exec(compile(block, 'README.md', 'exec'), names)
  gain = metrics.paired_bootstrap(names['after'], names['before'])
  assert gain.low > 0.05
  factors = [x for x in tree.names(names['fitted'].params) if 'lora_a' in x]
  assert factors
  for name in factors:
    learned = tree.get(names['fitted'].params, name)
    assert (learned != tree.get(names['start'], name)).any()


def test_the_stream_of_ones_own_runs_and_replay_forgets_least():
  text = (ROOT / 'fmeta/continual/README.md').read_text()
  (block,) = re.findall(r'```python\n(.*?)```', text, re.DOTALL)
  names = {}
  exec(compile(block, 'README.md', 'exec'), names)
  lost = {
    name: metrics.forgetting_chaudhry(matrix)
    for name, matrix in names['matrices'].items()
  }
  assert lost['ER'] < 0.2 < lost['EWC'] < lost['none'] - 0.05
  assert names['picture'].startswith(b'\x89PNG')


@pytest.mark.parametrize('name', DOCUMENTS)
def test_files_that_documents_name_exist(name):
  text = (ROOT / name).read_text()
  pattern = r'(?:fmeta|experiments|tests|launch)/[\w/]+\.(?:py|sh|md)'
  mentioned = set(re.findall(pattern, text))
  assert mentioned
  assert [path for path in mentioned if not (ROOT / path).exists()] == []
