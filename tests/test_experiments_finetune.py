"""Panel A at its small setting, and the page around the three panels."""

import json

import numpy as np
import pytest

from experiments import docparams as main_job
from experiments import run as job
from experiments.finetune import docparams as panel_a
from experiments.finetune import lpft_theory
from fmeta import predict
from fmeta.explain import __main__ as explaining
from fmeta.explain import recipe
from fmeta.report import Panel, Row, bars
from fmeta.workdir import Context


def execute(module, workdir, *flags, **settings) -> int:
  argv = ['run', f'--config={module.__file__}', f'--workdir={workdir}', *flags]
  for name, value in settings.items():
    if isinstance(value, tuple):
      value = ','.join(map(str, value))
    argv.append(f'--config.{name}={value}')
  return job.main(argv)


@pytest.fixture(scope='module')
def finished(tmp_path_factory, tiny_bert):
  folder = tmp_path_factory.mktemp('finetune') / 'run'
  small = {**panel_a.SMALL, 'methods': ('probe', 'full'), 'model': tiny_bert}
  assert execute(panel_a, folder, **small, rates_full=(1e-3,)) == 0
  return folder


def test_panel_a_reports_every_row_with_an_interval(finished):
  result = json.loads((finished / 'result.json').read_text())
  metrics, ci95 = result['metrics'], result['ci95']
  names = ('majority class', 'nearest class mean', 'TF-IDF + linear SVM')
  for name in (*names, 'probe', 'full'):
    low, high = ci95[f'finetune/{name}']
    assert 0 <= low <= metrics[f'finetune/{name}'] <= high <= 1
  difference = metrics['finetune/full minus probe']
  whole = metrics['finetune/full'] - metrics['finetune/probe']
  np.testing.assert_allclose(difference, whole, atol=1e-12)
  assert result['trainable_parameters'] == result['total_parameters']
  assert len(result['data_sha256']) == 64


def test_the_full_model_of_a_run_answers_as_it_was_trained(finished):
  run = predict.load_run(finished)
  shares = predict.probabilities(run, ['number of samples to draw', ''])
  assert shares.shape == (2, 10)
  np.testing.assert_allclose(shares.sum(-1), 1, rtol=1e-5)


def test_a_finished_run_explains_itself(finished, tiny_bert, capsys):
  flags = ['--limit=12', '--attributions=1']
  assert explaining.main([str(finished), *flags]) == 0
  written = capsys.readouterr().out.split()
  assert [path.rpartition('/')[2] for path in written] == [
    'explain.html',
    'explain_blocks.png',
    'explain_rates.png',
  ]
  page = (finished / 'explain.html').read_text()
  for section in ('blocks', 'rates', 'flips', 'attributions', 'facts'):
    assert f'<section id="{section}">' in page
  assert 'body/layer_1' in page and 'completeness error' in page
  assert str(tiny_bert) in page


def test_the_recipe_gives_back_the_weights_before_the_first_step(finished):
  told = recipe.load(finished)
  start = recipe.start_of(told, 10)
  end = predict.load_run(finished).params
  assert told.multipliers == (('head/.*', 10.0), ('.*', 1.0))
  assert max(told.rates) == pytest.approx(1e-3)
  # One epoch of Adam moves the head's entries by about rate x 10 x steps.
  moved = np.abs(np.asarray(end['head']['kernel'] - start['head']['kernel']))
  assert 0 < moved.max() < 10 * 1.2 * sum(told.rates)


def test_explaining_without_a_start_is_one_line(finished, tmp_path, capsys):
  for argv, words in (
    ([str(tmp_path)], "has no folder 'model'"),
    ([str(finished), '--limit=1'], '--limit=1'),
    ([str(finished), '--examples=nowhere'], "examples 'nowhere' cannot be"),
    ([str(finished), '--start=nowhere'], "no model at 'nowhere'"),
    ([], 'required: workdir'),
  ):
    assert explaining.main(argv) == 2
    error = capsys.readouterr().err.strip()
    assert words in error and '\n' not in error


def test_resuming_a_finished_panel_repeats_no_trial(finished, monkeypatch):
  def refuse(*args, **kwargs):
    raise AssertionError('a finished trial ran again')

  before = json.loads((finished / 'result.json').read_text())
  monkeypatch.setattr(panel_a.Method, 'fit', refuse)
  assert job.main(['run', f'--workdir={finished}', '--resume']) == 0
  after = json.loads((finished / 'result.json').read_text())
  assert after['metrics'] == before['metrics']


def test_an_unknown_method_is_one_line(tmp_path, tiny_bert, capsys):
  small = {**panel_a.SMALL, 'methods': ('prob',), 'model': tiny_bert}
  assert execute(panel_a, tmp_path / 'run', **small) == 2
  error = capsys.readouterr().err.strip()
  assert "'prob'" in error and 'surgical' in error and '\n' not in error


def test_the_page_has_three_panels_and_their_pictures(tmp_path, monkeypatch):
  seen = {}

  def stub(name):
    def panel(config, context):
      seen[name] = config.seeds
      row = Row('naive', 0.5, (0.4, 0.6), more={'forgetting': 0.1})
      shown = Panel(name, f'How {name}?', [row], figure=bars([row]))
      return shown, {'metrics': {f'{name}/naive': 0.5}, 'data_sha256': name}

    return panel

  for name, module in main_job.PANELS.items():
    monkeypatch.setattr(module, 'panel', stub(name))
  folder = tmp_path / 'run'
  assert execute(main_job, folder, seeds=3) == 0
  assert seen == {'finetune': 3, 'fewshot': 3, 'continual': 3}
  result = json.loads((folder / 'result.json').read_text())
  assert result['metrics'] == {f'{name}/naive': 0.5 for name in seen}
  assert result['data_sha256'] == 'finetune'
  page = (folder / 'report.html').read_text()
  assert all(f'How {name}?' in page for name in seen)
  for letter in 'abc':
    assert (folder / f'panel_{letter}.png').read_bytes()[1:4] == b'PNG'


def descend(problem, config, phases):
  """The errors of plain gradient descent; phases: (steps, does B move)."""
  body, head = (
    np.float64(problem.params[name]['kernel']) for name in ('body', 'head')
  )
  x, target = (np.float64(problem.columns[key]) for key in ('x', 'target'))
  for steps, both in phases:
    for _ in range(steps):
      residual = 2 * (x @ body @ head - target) / len(x)
      pull = x.T @ residual
      head, body = (
        head - config.rate * body.T @ pull,
        body - config.rate * pull @ head.T * both,
      )
  off, true = (body @ head)[:, 0] - problem.weights, problem.weights
  inside = problem.basis.T
  return {
    'ID': np.sum((inside @ off) ** 2) / np.sum((inside @ true) ** 2),
    'OOD': np.sum(off**2) / np.sum(true**2),
  }


def test_lpft_theory_is_plain_gradient_descent_and_has_its_order(tmp_path):
  config = lpft_theory.Config(num_steps=300)
  problem = lpft_theory.draw(config, 0.2, 1)
  found = {
    name: lpft_theory.Method(config, name).run(Context(tmp_path), problem, 1)
    for name in lpft_theory.METHODS
  }
  schedules = {
    'LP': [(300, False)],
    'FT': [(300, True)],
    'LP-FT': [(150, False), (150, True)],
  }
  out = {name: run['errors'] for name, run in found.items()}
  for name, phases in schedules.items():
    for side, value in descend(problem, config, phases).items():
      np.testing.assert_allclose(  # 300 float32 steps, sums in another order
        out[name][side], value, rtol=1e-5, atol=1e-9
      )
  assert out['FT']['ID'] < out['LP-FT']['ID'] < out['LP']['ID']
  assert out['LP-FT']['OOD'] < out['LP']['OOD'] < out['FT']['OOD']


def test_lpft_theory_reports_paired_differences(tmp_path):
  folder = tmp_path / 'run'
  assert execute(lpft_theory, folder, **lpft_theory.SMALL) == 0
  result = json.loads((folder / 'result.json').read_text())
  metrics, ci95 = result['metrics'], result['ci95']
  for side in lpft_theory.SIDES:
    ft, lp = (metrics[f'noise 0.1 {side} {name}'] for name in ('FT', 'LP'))
    key = f'noise 0.1 {side} FT minus LP'
    np.testing.assert_allclose(metrics[key], ft - lp, atol=1e-12)
    assert ci95[key][0] <= metrics[key] <= ci95[key][1]
  assert result['steps'] == lpft_theory.SMALL['num_steps']
