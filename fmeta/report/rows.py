"""Rows, panels, and what they say as plain text."""

import dataclasses
import textwrap
from collections.abc import Mapping, Sequence

from fmeta.errors import UsageError
from fmeta.report.figures import count
from fmeta.report.style import Picture

_WIDTH = 100  # columns of a terminal table, at most


@dataclasses.dataclass(frozen=True)
class Row:
  """One method's result; shares and differences are in [0, 1], not percent.

  Attributes:
    name: the method, a few words.
    value: the panel's metric.
    ci95: its ends (low, high).
    setting: what was chosen on validation.
    trainable: number of trainable parameters.
    seconds: training time.
    baseline: True for what methods have to beat; drawn in grey.
    ceiling: True for an upper bound such as joint training; not a contender.
    difference: (mean, low, high) of `value` minus the panel's reference,
      paired on the same test examples (`metrics.paired_bootstrap`).
    more: further columns, name -> number or None.
  """

  name: str
  value: float
  ci95: tuple[float, float] | None = None
  setting: str = ''
  trainable: int | None = None
  seconds: float | None = None
  baseline: bool = False
  ceiling: bool = False
  difference: tuple[float, float, float] | None = None
  more: Mapping[str, float | None] = dataclasses.field(default_factory=dict)

  def __post_init__(self):
    # Also catches NaN, which compares false.
    if not -1 <= self.value <= 1:
      raise UsageError(
        f'row {self.name!r} has value {self.value}; give a share in [0, 1]'
      )


@dataclasses.dataclass(frozen=True)
class Panel:
  """One question, its rows and its picture.

  Attributes:
    title: short, for example 'Fine-tuning'.
    question: the question in full.
    rows: in the order they are shown.
    note: the protocol: data, selection, what the interval is over.
    figure: the picture, or None.
    metric: name of `Row.value`.
    reference: name of the row that differences are taken against.
    total: number of parameters of the model, for shares.
  """

  title: str
  question: str
  rows: Sequence[Row]
  note: str = ''
  figure: Picture | None = None
  metric: str = 'accuracy'
  reference: str | None = None
  total: int | None = None

  def __post_init__(self):
    names = [row.name for row in self.rows]
    if not names:
      raise UsageError(f'panel {self.title!r} has no rows; give at least one')
    if self.reference is not None and self.reference not in names:
      raise UsageError(
        f'reference {self.reference!r} is no row of panel {self.title!r}; '
        f'possible: {names}'
      )


def percent(value: float | None, sign: bool = False) -> str:
  """0.7194 -> '71.9'; empty for None."""
  if value is None:
    return ''
  text = f'{100 * value:{"+" if sign else ""}.1f}'
  return text.replace('-0.0', '0.0').replace('+0.0', '0.0')


def interval(ends: Sequence[float] | None, sign: bool = False) -> str:
  """(0.70, 0.74) -> '70.0 to 74.0'; empty for None."""
  if ends is None:
    return ''
  return f'{percent(ends[0], sign)} to {percent(ends[1], sign)}'


def excludes_zero(difference: Sequence[float]) -> bool:
  """Whether the interval of a difference leaves zero out."""
  return difference[1] > 0 or difference[2] < 0


def more_columns(panel: Panel) -> list[str]:
  """Names of the extra columns of any row, in order of appearance."""
  return list(dict.fromkeys(name for row in panel.rows for name in row.more))


def duration(value: float | None) -> str:
  """Seconds with as many digits as they deserve; empty for None."""
  if value is None:
    return ''
  return f'{value:.1f}' if value < 10 else f'{value:,.0f}'


def best(panel: Panel) -> Row:
  """The row with the highest value that is neither baseline nor ceiling."""
  contenders = [r for r in panel.rows if not (r.baseline or r.ceiling)]
  return max(contenders or panel.rows, key=lambda row: row.value)


def answer(panel: Panel) -> str:
  """One sentence that answers the panel's question from its numbers.

  The best contender with its interval, whether it differs from the reference
  (only if the paired interval excludes zero), what it forgets where that was
  measured, and where the best baseline and the ceiling stand.
  """
  top = best(panel)
  clauses = [_reached(top, panel.metric) + _compared(top, panel)]
  lost = top.more.get('forgetting')
  if lost is not None:
    clauses.append(f'it forgets {percent(lost)} points')
  baselines = [r for r in panel.rows if r.baseline and r is not top]
  if baselines:
    rival = max(baselines, key=lambda row: row.value)
    clause = f'the best baseline, {rival.name}, reaches {percent(rival.value)}%'
    if top.name == panel.reference:
      clause += _compared(rival, panel)
    clauses.append(
      clause + (' and is ahead' if rival.value > top.value else '')
    )
  clauses += [
    f'{row.name}, the upper bound, reaches {percent(row.value)}%'
    for row in panel.rows
    if row.ceiling and row is not top
  ]
  text = '; '.join(clauses) + '.'
  return text[0].upper() + text[1:]


def _reached(row: Row, metric: str) -> str:
  ends = f' (95% CI {interval(row.ci95)})' if row.ci95 else ''
  return f'{row.name} reaches {percent(row.value)}% {metric}{ends}'


def _compared(row: Row, panel: Panel) -> str:
  if row.difference is None or row.name == panel.reference:
    return ''
  mean, *ends = row.difference
  shown = f'{percent(mean, sign=True)} points, CI {interval(ends, sign=True)}'
  if excludes_zero(row.difference):
    word = 'better' if mean > 0 else 'worse'
    return f', {word} than {panel.reference} ({shown})'
  return f', not distinguishable from {panel.reference} ({shown})'


def terminal_table(panel: Panel) -> str:
  """The panel as plain ASCII text of at most 100 columns.

  `*` marks a difference whose 95% interval excludes zero, `-` a baseline and
  `^` an upper bound.
  """
  columns = _columns(panel)
  settings = columns.pop(1)
  room = _WIDTH - sum(map(_natural, columns)) - 2 * len(columns)
  below = []
  if room >= _natural(settings):
    columns.insert(1, settings)
  else:
    below = [f'  {r.name}: {r.setting}' for r in panel.rows if r.setting]
  left = 1 if below else 2
  widths = _fit(columns)
  heads = zip(*(_two_lines(column[0]) for column in columns), strict=True)
  cells = zip(*(column[1:] for column in columns), strict=True)
  rule = '-' * (sum(widths) + 2 * (len(widths) - 1))
  title = _wrap(f'{panel.title}: {panel.question}')
  top = [_line(head, widths, left) for head in heads]
  body = [_line(row, widths, left) for row in cells]
  below = [line for text in below for line in _wrap(text)]
  return '\n'.join([*title, *filter(None, top), rule, *body, rule, *below])


def _natural(column: Sequence[str]) -> int:
  return max(map(len, [*_two_lines(column[0]), *column[1:]]))


def _wrap(text: str) -> list[str]:
  return textwrap.wrap(text, _WIDTH, subsequent_indent='    ')


def _two_lines(head: str) -> tuple[str, str]:
  """Splits at the space nearest to the middle, if it is long."""
  spaces = [i for i, letter in enumerate(head) if letter == ' ' and i > 1]
  if len(head) <= 10 or not spaces:
    return '', head
  middle = min(spaces, key=lambda i: abs(2 * i - len(head)))
  return head[:middle], head[middle + 1 :]


def _columns(panel: Panel) -> list[list[str]]:
  """Cells by column, a header first; empty columns are left out."""
  rows = panel.rows
  columns = [
    ['  method', *(f'{_mark(row)} {row.name}' for row in rows)],
    ['setting', *(row.setting for row in rows)],
    [f'{panel.metric} (%)', *(percent(row.value) for row in rows)],
    ['95% CI', *(interval(row.ci95) for row in rows)],
  ]
  for name in more_columns(panel):
    columns.append([f'{name} (%)', *(percent(r.more.get(name)) for r in rows)])
  versus = f'minus {_cut(panel.reference or "", 22)}'
  columns += [
    [versus, *map(_difference, rows)],
    ['trained', *(count(row.trainable) for row in rows)],
    ['sec', *(duration(row.seconds) for row in rows)],
  ]
  # The second, the setting, always stands: the caller takes it out.
  return [c for i, c in enumerate(columns) if i == 1 or any(c[1:])]


def _mark(row: Row) -> str:
  return '-' if row.baseline else '^' if row.ceiling else ' '


def _difference(row: Row) -> str:
  if row.difference is None:
    return ''
  star = '*' if excludes_zero(row.difference) else ' '
  mean, low, high = (percent(v, sign=True) for v in row.difference)
  return f'{mean} [{low}, {high}]{star}'


def _cut(text: str, width: int) -> str:
  return text if len(text) <= width else text[: max(width - 2, 0)] + '..'


def _fit(columns: Sequence[Sequence[str]]) -> list[int]:
  """Widths that fit the screen: names are cut if need be, numbers never.

  Raises:
    UsageError: if the numbers alone do not fit.
  """
  widths = [_natural(column) for column in columns]
  over = sum(widths) + 2 * (len(widths) - 1) - _WIDTH
  widths[0] -= min(max(over, 0), max(widths[0] - 12, 0))
  if sum(widths) + 2 * (len(widths) - 1) > _WIDTH:
    raise UsageError(
      f'a table of {len(widths)} columns needs more than {_WIDTH} characters; '
      'give fewer extra columns in Row.more'
    )
  return widths


def _line(cells: Sequence[str], widths: Sequence[int], left: int) -> str:
  """Text columns to the left, numbers to the right."""
  shown = [
    _cut(cell, width).ljust(width)
    if i < left
    else _cut(cell, width).rjust(width)
    for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
  ]
  return '  '.join(shown).rstrip()
