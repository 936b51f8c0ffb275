import html.parser
import io
import re
import struct

import matplotlib
import numpy as np
import PIL.Image
import pytest

from fmeta import report
from fmeta.errors import UsageError
from fmeta.report import figures, matrices, rows

VOID = {'meta', 'img', 'br', 'hr', 'link', 'input'}
TOTAL = 22_713_216
TASKS = ['numpy', 'scipy', 'sklearn']
MATRIX = np.array([[0.72, np.nan, np.nan], [0.6, 0.7, np.nan], [0.5, 0.6, 0.7]])


def _rows():
  return [
    report.Row(
      'nearest mean',
      0.561,
      (0.540, 0.583),
      'cosine <raw>',
      3840,
      6.1,
      baseline=True,
      difference=(-0.158, -0.180, -0.135),
    ),
    report.Row(
      'linear probe',
      0.7151,
      (0.690, 0.738),
      'lr 1e-2',
      3850,
      21.0,
      difference=(-0.004, -0.012, 0.005),
    ),
    report.Row('full', 0.7194, (0.698, 0.739), 'lr 5e-5', TOTAL, 1183.2),
  ]


def _panel(**changes):
  given = {
    'title': 'Fine-tuning',
    'question': 'How well does it fine-tune?',
    'rows': _rows(),
    'note': 'Six settings each.',
    'figure': report.bars(_rows(), total=TOTAL),
    'reference': 'full',
    'total': TOTAL,
  }
  return report.Panel(**(given | changes))


def _stream_rows():
  return [
    report.Row('naive', 0.60, (0.58, 0.62), more={'forgetting': 0.16}),
    report.Row(
      'replay',
      0.68,
      (0.66, 0.70),
      difference=(0.08, 0.05, 0.11),
      more={'forgetting': 0.024},
    ),
    report.Row('joint', 0.71, ceiling=True, more={'forgetting': None}),
  ]


class _Page(html.parser.HTMLParser):
  """Insists on balanced tags; collects table cells, attributes and text."""

  def __init__(self):
    super().__init__()
    self.stack, self.tables, self.attributes, self.text = [], [], [], []

  def handle_starttag(self, tag, attrs):
    self.attributes += [(tag, name, value) for name, value in attrs]
    if tag not in VOID:
      self.stack.append(tag)
    if tag == 'table':
      self.tables.append([])
    elif tag == 'tr':
      self.tables[-1].append([])
    elif tag in ('td', 'th'):
      self.tables[-1][-1].append('')

  def handle_endtag(self, tag):
    assert self.stack.pop() == tag

  def handle_data(self, data):
    self.text.append(data)
    if self.stack and self.stack[-1] in ('td', 'th'):
      self.tables[-1][-1][-1] += data


def _parse(path):
  page = _Page()
  page.feed(path.read_text(encoding='utf-8'))
  page.close()
  assert page.stack == []
  return page


def _size(png):
  assert png[:8] == b'\x89PNG\r\n\x1a\n'
  return struct.unpack('>II', png[16:24])


def _ink(png):
  """Share of pixels that are not white."""
  pixels = np.asarray(PIL.Image.open(io.BytesIO(png)).convert('L'))
  return (pixels < 250).mean()


@pytest.fixture(scope='module')
def written(tmp_path_factory):
  panels = [
    _panel(),
    _panel(title='Second & last', figure=None, reference=None),
  ]
  facts = {'versions': {'jax': '0.10.2'}, 'seeds': [0, 1], 'commit': 'abc'}
  return report.write_report(
    tmp_path_factory.mktemp('page') / 'report.html',
    'One <step>',
    panels,
    facts,
    ['Same splits.'],
  )


def test_page_is_well_formed_and_escapes_what_it_is_given(written):
  page = _parse(written[0])
  assert 'cosine <raw>' in page.tables[0][1]
  text = ' '.join(page.text)
  for expected in ('One <step>', 'Second & last', 'jax 0.10.2', '0, 1', 'abc'):
    assert expected in text
  assert 'Same splits.' in text and 'Six settings each.' in text


def test_page_needs_nothing_but_itself(written):
  page = _parse(written[0])
  links = [v for _, name, v in page.attributes if name in ('src', 'href')]
  assert links and all(link.startswith('data:image/png') for link in links)
  raw = written[0].read_text(encoding='utf-8')
  assert '<script' not in raw and '<link' not in raw
  assert 'url(' not in raw and '@import' not in raw


def test_numbers_in_the_table_equal_the_inputs(written):
  head, *body = _parse(written[0]).tables[0]
  column = {name: index for index, name in enumerate(head)}
  for row, cells in zip(_rows(), body, strict=True):
    assert cells[column['method']] == row.name
    assert float(cells[column['accuracy (%)']]) == round(100 * row.value, 1)
    ends = [float(x) for x in cells[column['95% CI']].split(' to ')]
    assert ends == [round(100 * end, 1) for end in row.ci95]
    trained = cells[column['trained parameters']].split(' ')[0]
    assert int(trained.replace(',', '')) == row.trainable
    found = re.findall(r'[+-]?[\d.]+', cells[column['minus full (points)']])
    expected = [round(100 * x, 1) for x in row.difference or ()]
    assert [float(x) for x in found] == expected


def test_only_real_differences_are_bold(written):
  raw = written[0].read_text(encoding='utf-8')
  assert re.findall(r'<td class="real">([^ ]+)', raw)[:1] == ['-15.8']
  assert not re.search(r'<td class="real">-0.4', raw)


def test_columns_without_content_are_left_out(written):
  first, second = _parse(written[0]).tables
  assert 'minus full (points)' in first[0]
  assert not any(name.startswith('minus') for name in second[0])


def test_pictures_lie_beside_the_page_and_inside_it_with_a_text(written):
  assert [path.name for path in written] == ['report.html', 'panel_a.png']
  page = _parse(written[0])
  alts = [
    v for tag, name, v in page.attributes if (tag, name) == ('img', 'alt')
  ]
  assert alts == [
    'Bar chart of accuracy in percent: nearest mean 56.1, '
    'linear probe 71.5, full 71.9.'
  ]


def test_bars_have_the_size_they_promise_and_are_not_empty():
  picture = report.bars(_rows(), total=TOTAL)
  width, height = _size(picture.png)
  assert width == 1760 and picture.width == 845
  assert height == round(200 * (1.0 + 0.42 * 3))
  assert 0.05 < _ink(picture.png) < 0.6


def test_same_numbers_give_the_same_picture():
  assert report.bars(_rows()).png == report.bars(_rows()).png
  other = [*_rows()[:2], report.Row('full', 0.5)]
  assert report.bars(_rows()).png != report.bars(other).png


def test_drawing_leaves_the_users_style_alone():
  before = dict(matplotlib.rcParams)
  report.bars(_rows())
  assert dict(matplotlib.rcParams) == before


def test_bar_lengths_and_interval_ends_are_the_values():
  axes = matplotlib.figure.Figure().add_subplot()
  values = [row.value for row in _rows()]
  figures.draw_bars(axes, _rows(), values, 'accuracy')
  lengths = [patch.get_width() for patch in axes.patches]
  np.testing.assert_allclose(lengths, [56.1, 71.51, 71.94])
  spans = [line.get_xdata() for line in axes.lines[::2]]
  np.testing.assert_allclose(spans, [100 * np.array(r.ci95) for r in _rows()])
  assert axes.get_xlim()[0] == 0


def test_a_value_that_was_not_measured_is_named_not_drawn():
  axes = matplotlib.figure.Figure().add_subplot()
  lost = [row.more.get('forgetting') for row in _stream_rows()]
  figures.draw_bars(axes, _stream_rows(), lost, 'forgetting', ends=False)
  assert len(axes.patches) == 2
  assert [text.get_text() for text in axes.texts] == ['16.0', '2.4', 'n/a']
  axes = matplotlib.figure.Figure().add_subplot()
  none = [None] * len(lost)  # One task: nothing to forget.
  figures.draw_bars(axes, _stream_rows(), none, 'forgetting', ends=False)
  assert [text.get_text() for text in axes.texts] == ['n/a'] * 3


def test_curves_draw_every_line_and_say_so():
  lines = [
    report.Line('MAML', [0, 1, 5], [0.2, 0.6, 0.65], [(0.1, 0.3)] * 3),
    report.Line('nearest mean', [0, 5], [0.63, 0.63], baseline=True),
  ]
  picture = report.curves(lines, xlabel='inner steps', title='5-way')
  assert _size(picture.png) == (1760, 880)
  assert 'MAML from 20.0 at 0 to 65.0 at 5' in picture.alt
  assert _ink(picture.png) > 0.02
  single = report.curves([report.Line('one', [1], [0.5])], xlabel='shots')
  assert _size(single.png) == (1760, 880)


def test_labels_are_pushed_apart_by_the_least_and_stay_inside():
  # The three near ones share a mean displacement: 51.33 is their mean.
  places = figures._spread([50.0, 50.0, 10.0, 54.0], 5, 0, 60)
  np.testing.assert_allclose(places, [46.333, 51.333, 10, 56.333], atol=0.01)
  crowded = figures._spread([59.0, 59.5, 60.0], 5, 0, 60)
  np.testing.assert_allclose(crowded, [50, 55, 60])
  alone = figures._spread([3.0, 30.0], 5, 0, 60)
  np.testing.assert_allclose(alone, [3, 30])


def test_stream_picture_tells_accuracy_forgetting_and_matrices():
  picture = report.stream(_stream_rows(), {'naive': MATRIX}, TASKS)
  assert 'naive 60.0' in picture.alt
  assert 'Forgetting in points: naive 16.0, replay 2.4.' in picture.alt
  assert 'after the last task: naive 50, 60, 70' in picture.alt
  without = report.stream(_stream_rows(), {}, TASKS)
  assert _size(without.png)[1] == _size(picture.png)[1] - 600


def test_matrix_cells_carry_their_numbers():
  axes = matplotlib.figure.Figure().add_subplot()
  scale = matrices._scale([MATRIX])
  matrices._draw_matrix(axes, MATRIX, TASKS, 'naive', scale)
  shown = [text.get_text() for text in axes.texts]
  assert shown == ['72', '60', '70', '50', '60', '70']
  assert scale == (40, 90)
  assert _ink(report.heatmap(MATRIX, TASKS, title='naive').png) > 0.1


def test_terminal_table_fits_and_carries_the_numbers():
  lines = report.terminal_table(_panel()).splitlines()
  assert max(map(len, lines)) <= 100
  text = '\n'.join(lines)
  assert text.isascii()
  assert '-15.8 [-18.0, -13.5]*' in text
  assert '-0.4 [-1.2, +0.5] ' in text
  assert '71.9  69.8 to 73.9' in text and '22.7M  1,183' in text
  (baseline,) = [line for line in lines if 'nearest mean' in line]
  assert baseline.startswith('- ')


def test_terminal_table_moves_long_settings_below_uncut():
  setting = 'rate 5e-5, 3 epochs, warm-up 10%, clip 1.0, batch 32, last two'
  long = [
    report.Row(f'a method with a long name {i}', *row_fields, setting)
    for i, row_fields in enumerate([(0.5, (0.4, 0.6)), (0.6, (0.5, 0.7))])
  ]
  panel = _panel(rows=long, reference=None, figure=None)
  text = report.terminal_table(panel)
  assert max(map(len, text.splitlines())) <= 100
  assert ' '.join(text.split()).count(setting) == 2


def test_terminal_table_cuts_names_but_never_numbers():
  long = [
    report.Row(
      'x' * 60,
      0.5,
      (0.4, 0.6),
      's' * 30,
      TOTAL,
      99_999.0,
      difference=(-0.1, -0.2, -0.05),
      more={'forgetting': 0.111},
    )
  ]
  text = report.terminal_table(_panel(rows=long, reference=None, figure=None))
  assert max(map(len, text.splitlines())) <= 100
  for number in ('50.0', '40.0 to 60.0', '11.1', '22.7M', '99,999'):
    assert number in text
  assert '-10.0 [-20.0, -5.0]*' in text
  many = {f'metric number {i}': 0.5 for i in range(12)}
  wide = [report.Row('x', 0.5, (0.4, 0.6), more=many)]
  with pytest.raises(UsageError, match='fewer extra columns'):
    report.terminal_table(_panel(rows=wide, reference=None))


def test_answer_names_the_best_and_admits_what_is_not_distinguishable():
  assert report.answer(_panel()) == (
    'Full reaches 71.9% accuracy (95% CI 69.8 to 73.9); the best baseline, '
    'nearest mean, reaches 56.1%, worse than full '
    '(-15.8 points, CI -18.0 to -13.5).'
  )
  probe = report.Row('probe', 0.73, difference=(0.011, -0.002, 0.02))
  changed = report.answer(_panel(rows=[*_rows(), probe]))
  assert changed.startswith(
    'Probe reaches 73.0% accuracy, not distinguishable from full '
    '(+1.1 points, CI -0.2 to +2.0)'
  )


def test_answer_says_when_a_baseline_is_ahead():
  ahead = report.Row('nearest mean', 0.9, baseline=True)
  text = report.answer(_panel(rows=[ahead, _rows()[2]]))
  assert text.endswith('nearest mean, reaches 90.0% and is ahead.')


def test_answer_reports_forgetting_and_the_upper_bound():
  text = report.answer(_panel(rows=_stream_rows(), reference='naive'))
  assert text == (
    'Replay reaches 68.0% accuracy (95% CI 66.0 to 70.0), better than naive '
    '(+8.0 points, CI +5.0 to +11.0); it forgets 2.4 points; joint, the upper '
    'bound, reaches 71.0%.'
  )


def test_small_formats():
  assert [figures.count(n) for n in (999, 3850, 151_306, TOTAL, None)] == [
    '999',
    '3.9K',
    '151K',
    '22.7M',
    '',
  ]
  assert [rows.percent(x, sign=True) for x in (0.0001, -0.0001, 0.01)] == [
    '0.0',
    '0.0',
    '+1.0',
  ]
  assert rows.percent(-0.0951, sign=True) == '-9.5'
  assert rows.percent(0.10049, sign=True) == '+10.0'
  assert [rows.duration(x) for x in (0.0, 12.3, 1234.5)] == [
    '0.0',
    '12',
    '1,234',
  ]


@pytest.mark.parametrize(
  'call, message',
  [
    (lambda: _panel(rows=[]), 'no rows'),
    (lambda: _panel(reference='ful'), "'ful' is no row"),
    (lambda: report.Row('full', 71.9), r'share in \[0, 1\]'),
    (lambda: report.Row('full', float('nan')), 'value nan'),
    (lambda: report.curves([], xlabel='steps'), 'no lines'),
    (
      lambda: report.curves([report.Line('a', [1, 2], [0.1])], xlabel='s'),
      r"line 'a': x, y and ci have \[1, 2\] points",
    ),
    (lambda: report.heatmap(MATRIX, ['a', 'b']), 'for 2 tasks'),
  ],
)
def test_wrong_input_is_named_in_one_line(call, message):
  with pytest.raises(UsageError, match=message) as caught:
    call()
  assert '\n' not in str(caught.value)
