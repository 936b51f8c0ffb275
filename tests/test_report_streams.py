"""Pictures of streams, and the page that compares methods and seeds."""

import json
import re
import struct

import matplotlib.figure
import numpy as np
import pytest
from test_report import _parse

from fmeta import metrics, report
from fmeta.errors import UsageError
from fmeta.report import __main__ as command
from fmeta.report import costs, matrices, progress, runs, style

NAN = float('nan')
STREAM = np.array([[0.90, NAN, NAN], [0.95, 0.80, NAN], [0.70, 0.85, 0.90]])
TASKS = ['0/1', '2/3', '4/5']


def axes_of():
  return matplotlib.figure.Figure().add_subplot()


def size_of(png):
  return struct.unpack('>II', png[16:24])


def made(folder, methods, seeds=3, **more):
  """A finished run; `methods`: name -> what is added to every accuracy."""
  for name, shift in methods.items():
    for seed in range(seeds):
      rows = [
        [x + shift + 0.01 * seed * (1 + shift) for x in row if x == x]
        for row in STREAM.tolist()
      ]
      matrix = [rows[-1]] if name == 'joint' else rows
      trial = {'matrix': matrix, 'steps': 10, 'seconds': 2.0 + seed, **more}
      path = folder / 'trials' / 'class' / name / f'seed_{seed}.json'
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_text(json.dumps(trial))
  return folder


def test_cells_of_twenty_tasks_carry_numbers_and_unlearned_ones_are_blank():
  matrix = np.where(np.tri(20, dtype=bool), 1.0, np.nan)
  names = [f'task {k}' for k in range(20)]
  for cell in (0.16, 0.25, 0.37, 0.55):
    axes = axes_of()
    matrices._draw_matrix(axes, matrix, names, 'naive', (90, 110), cell=cell)
    places = {text.get_position() for text in axes.texts}
    assert places == {(j, i) for i in range(20) for j in range(i + 1)}
    # Digits of DejaVu Sans are 0.64 of their size wide.
    wide = {0.64 * 3 * text.get_fontsize() for text in axes.texts}
    assert max(wide) < 0.85 * 72 * cell
    blank = axes.images[0].get_array()
    assert np.ma.getmaskarray(blank).sum() == 190


def test_matrices_share_one_scale_and_fit_the_page():
  picture = report.heatmaps({'a': STREAM, 'b': STREAM / 2}, TASKS)
  assert 'a 70, 85, 90; b 35, 42, 45' in picture.alt
  for count, tasks in [(1, 3), (5, 3), (7, 10), (2, 20)]:
    matrix = np.where(np.tri(tasks, dtype=bool), 0.5, np.nan)
    many = {f'method {k} of a long name': matrix for k in range(count)}
    names = [f'a task of a long name {k}' for k in range(tasks)]
    assert report.heatmaps(many, names).width <= 96 * style.WIDTH + 1
  with pytest.raises(UsageError, match='no matrices to draw'):
    report.heatmaps({}, TASKS)


def test_matrices_below_the_bars_stand_four_on_a_line():
  rows = [report.Row(f'method {k}', 0.5) for k in range(14)]
  tall = {}
  for count in (4, 5, 14):
    many = {row.name: STREAM for row in rows[:count]}
    # Too little room for a matrix is a warning, and so an error here.
    picture = report.stream(rows, many, TASKS)
    wide, tall[count] = size_of(picture.png)
  assert tall[5] - tall[4] == (tall[14] - tall[5]) / 2 > wide / 4


def test_looks_of_thirty_six_lines_differ_and_the_first_are_the_house_style():
  looks = [style.look(k) for k in range(36)]
  assert len(set(looks)) == 36
  assert looks[:6] == list(zip(style.COLOURS, style.MARKERS, strict=True))


def test_averages_are_those_of_the_tasks_seen_with_a_t_band(monkeypatch):
  drawn = []
  monkeypatch.setattr(
    progress, 'curves', lambda lines, **options: drawn.extend(lines)
  )
  second = STREAM + 0.02
  progress.averages({'a': [STREAM, second], 'b': [STREAM]})
  means = np.array([0.9, 1.75 / 2, 2.45 / 3])
  np.testing.assert_allclose(drawn[0].y, means + 0.01)
  low, high = metrics.mean_t([means[2], means[2] + 0.02]).ci95
  np.testing.assert_allclose(drawn[0].ci[2], (low, high))
  assert drawn[1].ci is None and list(drawn[1].x) == [1, 2, 3]


def test_a_band_of_averages_ends_where_accuracies_do(monkeypatch):
  drawn = []
  monkeypatch.setattr(
    progress, 'curves', lambda lines, **options: drawn.extend(lines)
  )
  progress.averages({'a': [STREAM, STREAM - 0.3]})
  assert metrics.mean_t([0.9, 0.6]).ci95[0] < 0
  assert metrics.mean_t([0.9, 0.6]).ci95[1] > 1
  np.testing.assert_array_equal(drawn[0].ci[0], (0, 1))


def test_a_task_is_drawn_from_where_it_is_learned():
  axes = axes_of()
  full = np.where(np.isnan(STREAM), 0.1, STREAM)  # measured before, too
  runs_of = {'a': [full, full + 0.1], 'b': [full]}
  progress._draw_task(axes, runs_of, 1, np.array([1, 2, 3]), 2.0)
  mark, first, second = axes.get_lines()
  assert list(mark.get_xdata()) == [2, 2]
  assert list(first.get_xdata()) == [2, 3]
  np.testing.assert_allclose(first.get_ydata(), [85, 90])
  np.testing.assert_allclose(second.get_ydata(), [80, 85])
  (band,) = axes.collections  # one seed has none
  low, high = band.get_datalim(axes.transData).intervaly
  assert (low, high) == pytest.approx((80, 95))


def test_every_task_gets_a_panel_and_every_method_a_name():
  curves = np.linspace(0.2, 0.9, 40 * 7).reshape(40, 7)
  picture = report.over_time(
    {'a': [curves], 'b': [curves, curves / 2]},
    [str(k) for k in range(7)],
    steps=np.arange(40) * 10,
    ends=np.arange(7) * 60,
  )
  assert picture.width == pytest.approx(96 * style.WIDTH, abs=1)
  taller = report.over_time({'a': [curves[:7]]}, [str(k) for k in range(7)])
  flat = report.over_time({'a': [STREAM]}, TASKS)
  assert size_of(taller.png)[1] > size_of(flat.png)[1]
  assert 'a: 0/1 70, 2/3 85, 4/5 90' in flat.alt


def test_points_stand_at_their_costs_and_labels_at_the_right():
  points = [
    costs.Point('cheap', 2e9, 0.3, (0.25, 0.35)),
    costs.Point('dear', 9e12, 0.1),
  ]
  picture = costs.against_cost(points, cost='FLOPs')
  assert 'cheap 30.0 at 2e+09, dear 10.0 at 9e+12' in picture.alt
  assert size_of(picture.png)[0] == pytest.approx(200 * style.WIDTH, abs=2)
  for close in (1.0, 1.05, 3.0):
    near = [points[0], points[0]._replace(cost=close * 2e9)]
    assert size_of(costs.against_cost(near, cost='FLOPs').png)[1] > 0


def test_close_costs_have_ticks_that_do_not_touch():
  axes = axes_of()
  axes.set_xscale('log')
  costs._few_ticks(axes, [3e9, 3.1e9, 3.6e9])
  assert list(axes.xaxis.get_majorticklocs()) == [3e9, 3.6e9]


def test_runs_are_read_with_their_cost(tmp_path):
  cost = {'examples': 320, 'seconds': None}
  folder = made(
    tmp_path,
    {'none': 0.0, 'ewc': 0.05, 'joint': 0.09},
    flops_per_step=7.0,
    penalty_bytes=12,
    memory_bytes=30,
    tasks=TASKS,
    cost=cost,
  )
  methods, tasks = runs.read_runs([folder])
  assert tasks == TASKS and sorted(methods) == ['ewc', 'joint', 'none']
  np.testing.assert_allclose(methods['none'].matrices[0], STREAM)
  assert methods['joint'].matrices == {}
  assert methods['joint'].finals[0] == pytest.approx(2.45 / 3 + 0.09)
  assert methods['ewc'].cost == metrics.Cost(
    examples=320, flops=70, seconds=3, memory_bytes=42
  )


def test_two_runs_with_a_method_of_one_name_are_told_apart(tmp_path):
  one = made(tmp_path / 'a' / '001', {'none': 0.0, 'ewc': 0.1})
  two = made(tmp_path / 'b' / '001', {'none': 0.0, 'er': 0.1})
  methods, tasks = runs.read_runs([one, two])
  assert set(methods) == {'a/001: none', 'b/001: none', 'ewc', 'er'}
  assert tasks == ['1', '2', '3']


def test_frequent_evaluations_become_curves(tmp_path):
  evaluations = [
    {'step': k, 'stage': stage, 'evaluation': dict.fromkeys(TASKS, value)}
    for k, stage, value in [
      (1, '0/1', 0.9),
      (2, '2/3', 0.4),
      (3, '2/3', 0.8),
      (4, '4/5', 0.7),
    ]
  ]
  made(tmp_path, {'none': 0.0}, tasks=TASKS, evaluations=evaluations)
  methods, tasks = runs.read_runs([tmp_path])
  curves = methods['none'].curves[0]
  # Task 0 falls to .4, task 1 to .7.
  assert metrics.minimum_accuracy(curves) == pytest.approx(0.55)
  assert command.main([str(tmp_path), f'--out={tmp_path / "page.html"}']) == 0
  cells = cells_of(tmp_path / 'page.html')
  assert cells['none']['min-ACC'] == '55.0'
  # .7 / 3 + 2/3 * .55
  assert cells['none']['WC-ACC'] == '60.0'
  assert cells['none']['stability gap'] == '15.0'
  # Task 0 is .9 .4 .8 .7, task 1 from its start .4 .8 .7, task 2 .7.
  assert cells['none']['WF10'] == '20.0'
  assert cells['none']['WP10'] == '26.7'


def cells_of(path, table=0):
  head, *rows = _parse(path).tables[table]
  return {row[0]: dict(zip(head, row, strict=True)) for row in rows}


@pytest.fixture(scope='module')
def page(tmp_path_factory):
  folder = tmp_path_factory.mktemp('runs')
  made(folder, {'none': 0.0, 'e<w>c': 0.05, 'joint': 0.09}, flops_per_step=1e9)
  (folder / 'run.json').write_text(json.dumps({'command': ['--seeds', '3']}))
  out = folder / 'page.html'
  assert command.main([str(folder), f'--out={out}']) == 0
  return out


def test_the_page_has_every_metric_and_the_paired_difference(page):
  cells = cells_of(page)
  assert list(cells) == ['joint', 'e<w>c', 'none']
  none = cells['none']
  shift = 0.01  # of three seeds, on average
  assert none['average accuracy'] == f'{100 * (2.45 / 3 + shift):.1f}'
  assert none['anytime'] == '87.4' and none['when learned'] == '87.7'
  assert none['forgetting (Chaudhry)'] == '10.0'
  assert none['backward transfer'] == '-7.5'
  assert none['accuracy minus none'] == ''
  other = {s: 2.45 / 3 + 0.05 + 0.01 * s * 1.05 for s in range(3)}
  own = {s: 2.45 / 3 + 0.01 * s for s in range(3)}
  found = metrics.paired_difference(other, own, float)
  low, high = (f'{100 * end:+.1f}' for end in found.ci95)
  shown = cells['e<w>c']['accuracy minus none']
  assert shown == f'{100 * found.mean:+.1f} ({low} to {high})*'
  assert cells['e<w>c']['forgetting minus none'].endswith('(0.0 to 0.0)')
  assert cells['joint']['forgetting (Chaudhry)'] == ''
  assert cells['joint']['accuracy minus none'].startswith('+9.')


def test_the_page_shows_cost_and_what_was_not_measured(page):
  cells = cells_of(page, 1)['none']
  assert cells['FLOPs'] == '1e+10' and cells['seconds'] == '3'
  assert cells['examples seen'] == 'not measured'


def test_the_page_is_one_file_with_pictures_beside_it(page):
  text = page.read_text()
  assert not re.search(r'(src|href)="(?!data:)', text)
  assert text.count('<img') == 4 and '<w>' not in text
  assert '--seeds 3' in text
  names = {p.name for p in page.parent.glob('*.png')}
  assert names == {
    f'page_{name}.png' for name in ('averages', 'cost', 'tasks', 'matrices')
  }


def test_one_seed_gives_a_page_without_intervals(tmp_path):
  made(tmp_path, {'none': 0.0, 'ewc': 0.05}, seeds=1)
  out = tmp_path / 'page.html'
  assert command.main([str(tmp_path), f'--out={out}', '--reference=ewc']) == 0
  assert set(cells_of(out)['none']) == {
    'method',
    'seeds',
    'average accuracy',
    'anytime',
    'when learned',
    'forgetting (Chaudhry)',
    'backward transfer',
  }


def test_seeds_that_only_one_method_has_are_left_out_of_the_difference(
  tmp_path,
):
  made(tmp_path, {'none': 0.0}, seeds=2)
  made(tmp_path, {'ewc': 0.05}, seeds=4)
  out = tmp_path / 'page.html'
  assert command.main([str(tmp_path), f'--out={out}']) == 0
  cells = cells_of(out)
  assert cells['ewc']['seeds'] == '4' and cells['none']['seeds'] == '2'
  # Seeds 0 and 1: .0500 and .0505.
  assert cells['ewc']['accuracy minus none'].startswith('+5.0 (')


def test_a_stream_of_one_task_has_a_page_too(tmp_path):
  for seed in range(2):
    path = tmp_path / 'trials' / 'none' / f'seed_{seed}.json'
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({'matrix': [[0.5 + 0.1 * seed]]}))
  out = tmp_path / 'page.html'
  assert command.main([str(tmp_path), f'--out={out}']) == 0
  assert cells_of(out)['none']['average accuracy'] == '55.0'


def test_bad_commands_are_one_line_and_exit_two(tmp_path, capsys):
  run = str(made(tmp_path / 'run', {'none': 0.0}))
  only = str(made(tmp_path / 'only', {'joint': 0.0}))
  other = tmp_path / 'other' / 'trials' / 'er' / 'seed_0.json'
  other.parent.mkdir(parents=True)
  other.write_text(json.dumps({'matrix': [[0.5], [0.5, 0.6]]}))
  costly = str(made(tmp_path / 'costly', {'none': 0.0}, cost={'sekonds': 1}))
  (tmp_path / 'empty').mkdir()
  out = f'--out={tmp_path / "page.html"}'
  for argv, message in [
    ([], 'the following arguments are required: runs'),
    ([str(tmp_path / 'no')], 'no run at'),
    ([str(tmp_path / 'empty')], 'has no trials/<method>/seed_<k>.json'),
    ([run, '--reference=non'], "no method 'non'; did you mean 'none'"),
    ([run, str(tmp_path / 'other')], 'streams of different lengths'),
    ([only], 'no method learns task after task'),
    ([costly], r"unknown cost ['sekonds']"),
    ([run, f'--out={tmp_path}/no/page.html'], 'give another --out'),
  ]:
    assert command.main([*argv, out] if '--out' not in str(argv) else argv) == 2
    error = capsys.readouterr().err
    assert message in error and error.count('\n') == 1, error


@pytest.mark.parametrize(
  'call, message',
  [
    (lambda: report.over_time({}, TASKS), 'no accuracies to draw'),
    (lambda: report.over_time({'a': []}, TASKS), 'one run per method or more'),
    (
      lambda: report.over_time({'a': [STREAM[:, :2]]}, TASKS),
      r'shapes \[\(3, 2\)\] for 3 tasks',
    ),
    (
      lambda: report.over_time({'a': [STREAM]}, TASKS, steps=[1, 2]),
      '2 steps and 3 ends for 3 evaluations',
    ),
    (lambda: report.against_cost([], cost='FLOPs'), 'no points to draw'),
    (
      lambda: report.against_cost([report.Point('a', 0, 0.1)], cost='FLOPs'),
      "'a' costs 0 FLOPs; a log scale",
    ),
  ],
)
def test_wrong_pictures_are_named_in_one_line(call, message):
  with pytest.raises(UsageError, match=message) as caught:
    call()
  assert '\n' not in str(caught.value)
