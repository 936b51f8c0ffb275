"""Rows, panels, and what they say as plain text."""

import dataclasses
from collections.abc import Mapping, Sequence

from fmeta.errors import UsageError
from fmeta.report.figures import Picture

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


def count(number: int | None) -> str:
  """22713216 -> '22.7M'; empty for None."""
  if number is None:
    return ''
  for unit, size in (('M', 1_000_000), ('K', 1_000)):
    if number >= size:
      scaled = number / size
      return f'{scaled:.0f}{unit}' if scaled >= 100 else f'{scaled:.1f}{unit}'
  return str(number)


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
    ahead = ' and is ahead' if rival.value > top.value else ''
    clauses.append(
      f'the best baseline, {rival.name}, reaches {percent(rival.value)}%{ahead}'
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
  natural = [max(map(len, column)) for column in columns]
  widths = _fit(natural, _WIDTH - 2 * (len(columns) - 1))
  lines = [_line(cells, widths) for cells in zip(*columns, strict=True)]
  rule = '-' * max(map(len, lines))
  head = f'{panel.title}: {panel.question}'
  return '\n'.join([_cut(head, _WIDTH), lines[0], rule, *lines[1:], rule])


def _columns(panel: Panel) -> list[list[str]]:
  """Cells by column, a header first; empty columns are left out."""
  rows = panel.rows
  columns = [
    ['  method', *(f'{_mark(row)} {row.name}' for row in rows)],
    ['setting', *(row.setting for row in rows)],
    [panel.metric + ' %', *(percent(row.value) for row in rows)],
    ['95% CI', *(interval(row.ci95) for row in rows)],
  ]
  for name in more_columns(panel):
    columns.append([name + ' %', *(percent(r.more.get(name)) for r in rows)])
  versus = f'vs {_cut(panel.reference or "", 19)}'
  columns += [
    [versus, *map(_difference, rows)],
    ['trained', *(count(row.trainable) for row in rows)],
    ['sec', *(duration(row.seconds) for row in rows)],
  ]
  return [column for column in columns if any(column[1:])]


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


def _fit(widths: list[int], room: int) -> list[int]:
  """Narrows the setting, then the name, then whatever is widest."""
  widths = list(widths)
  for column, least in ((1, 8), (0, 14)):
    over = sum(widths) - room
    widths[column] -= min(max(over, 0), max(widths[column] - least, 0))
  while sum(widths) > room:
    widths[widths.index(max(widths))] -= 1
  return widths


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
  """Text columns to the left, numbers to the right."""
  shown = [
    _cut(cell, width).ljust(width) if i < 2 else _cut(cell, width).rjust(width)
    for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
  ]
  return '  '.join(shown).rstrip()
