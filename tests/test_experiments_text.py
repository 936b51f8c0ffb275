"""The fine-tuning tables on TREC-6 and SST-2, at their small settings."""

import json

import numpy as np
import pytest

from experiments import run as job
from experiments.finetune import sst2_few, trec
from experiments.finetune.text_table import Plan, compare
from experiments.finetune.text_task import hold_out
from fmeta import scores
from fmeta.errors import UsageError


def execute(module, workdir, *flags, **settings) -> int:
  argv = ['run', f'--config={module.__file__}', f'--workdir={workdir}', *flags]
  for name, value in settings.items():
    if isinstance(value, tuple):
      value = ','.join(map(str, value))
    argv.append(f'--config.{name}={value}')
  return job.main(argv)


def test_trec_compares_rows_in_pairs(shared_data, tiny_bert, tmp_path, capsys):
  small = {**trec.SMALL, 'model': tiny_bert}
  folder = tmp_path / 'run'
  assert execute(trec, folder, f'--data_dir={shared_data}', **small) == 0
  result = json.loads((folder / 'result.json').read_text())
  numbers, ci95 = result['metrics'], result['ci95']
  difference = numbers['trec/ulmfit minus full']
  kept = scores.load(folder)
  paired = scores.minus(kept['trec/ulmfit'], kept['trec/full'])
  assert paired == (difference, *ci95['trec/ulmfit minus full'])
  whole = numbers['trec/ulmfit'] - numbers['trec/full']
  np.testing.assert_allclose(difference, whole, atol=1e-12)
  low, high = ci95['trec/full']
  assert 0 <= low <= numbers['trec/full'] <= high <= 1
  # Four blocks: two epochs of two steps, every phase at least one.
  assert result['steps'] == 4
  assert 'ulmfit' in capsys.readouterr().out


def test_every_row_of_trec_lasts_equally_long():
  config = trec.Config()
  for row in trec.ROWS:
    phases = trec.recipe_of(config, row).phases(775)
    assert sum(phase.num_steps for phase in phases) == 775
  assert len(trec.recipe_of(config, 'ulmfit').phases(775)) == 8
  assert len(trec.recipe_of(config, 'chain_thaw').phases(775)) == 9


def test_discriminative_rates_shrink_by_2_6_towards_the_input():
  rates = dict(trec.recipe_of(trec.Config(), 'discr').multipliers)
  assert rates['head/.*'] == 10
  assert rates['body/layer_5/.*'] == 1
  np.testing.assert_allclose(rates['body/layer_4/.*'], 1 / 2.6)
  np.testing.assert_allclose(rates['body/embeddings/.*'], 2.6**-6)


def test_few_sentences_are_drawn_anew_by_seed(shared_data, tiny_bert, tmp_path):
  small = {**sst2_few.SMALL, 'model': tiny_bert}
  folder = tmp_path / 'run'
  assert execute(sst2_few, folder, f'--data_dir={shared_data}', **small) == 0
  numbers = json.loads((folder / 'result.json').read_text())['metrics']
  assert 'sst2_32/both minus short' in numbers
  assert sorted(scores.load(folder)) == ['sst2_32/both', 'sst2_32/short']


@pytest.mark.parametrize('module', [trec, sst2_few])
def test_an_unknown_row_is_one_line(module, tmp_path, capsys):
  assert execute(module, tmp_path / 'run', rows=('ful',)) == 2
  error = capsys.readouterr().err.strip()
  assert "'ful'" in error and '\n' not in error


def test_no_seeds_end_before_anything_is_trained():
  plan = Plan('none', {'full': None}, {}, lambda seed: {}, 0, 'full')
  with pytest.raises(UsageError, match='0 seeds of 1 rows; give at least one'):
    compare(None, plan, 'nothing?')  # Would fail at the first attribute.


def test_a_held_out_split_is_disjoint_and_seeded():
  columns = {'label': np.arange(10)}
  rest, held = hold_out(columns, 3, 1)
  assert sorted([*rest['label'], *held['label']]) == list(range(10))
  again = hold_out(columns, 3, 1)[1]['label']
  np.testing.assert_array_equal(held['label'], again)
  with pytest.raises(UsageError, match='10 validation examples of 10'):
    hold_out(columns, 10, 1)
