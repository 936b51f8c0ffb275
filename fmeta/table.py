"""The parameter table: what moves, how fast, and by which pattern.

Printed before a run starts, so that a pattern that does something else than
was meant is seen in the first second and not in the results.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from fmeta import tree
from fmeta.errors import UsageError
from fmeta.optim import DECAY, EVERYWHERE
from fmeta.sharding import parameter_specs
from fmeta.types import Array, Params, Tuning

WIDTH = 100


@dataclasses.dataclass(frozen=True)
class Row:
  """One leaf, or several that differ only in a number of their names.

  Attributes:
    name: `a/b/c`; folded leaves read `body/layer_{0-5}/kernel`.
    shape: of one leaf.
    trainable: whether it moves.
    rate: multiplier of the learning rate, None when frozen, 'array' when it
      is no single number.
    decay: multiplier of the weight decay, likewise.
    pattern: the rate pattern that matched, '' when frozen.
    placement: how it is laid out on the mesh, '' without rules.
    leaves: how many leaves this row stands for.
    size: scalars in all of them.
    num_bytes: bytes of all of them.
  """

  name: str
  shape: tuple[int, ...]
  trainable: bool
  rate: float | str | None
  decay: float | str | None
  pattern: str
  placement: str
  leaves: int
  size: int
  num_bytes: int


def parameter_rows(
  params: Params,
  tuning: Tuning,
  rng: Array,
  *,
  rates: tree.Patterns = EVERYWHERE,
  decay: tree.Patterns = DECAY,
  rules: tree.Patterns | None = None,
  mesh: Mesh | None = None,
) -> list[Row]:
  """A row per leaf, those that the tuning adds included, in natural order.

  Nothing is computed; `params` may be shapes.

  Args:
    params: full parameters.
    tuning: what moves.
    rng: a key, for a tuning that adds leaves.
    rates: ordered `(pattern, multiplier)` over the learning rate.
    decay: ordered `(pattern, multiplier)` over the weight decay.
    rules: ordered `(pattern, PartitionSpec)`; None without a mesh.
    mesh: where the leaves shall lie; it decides for those that no rule
      matches. Without one they are shown as replicated.

  Raises:
    UsageError: if a pattern matches no parameter at all, a trainable leaf is
      covered by no rate or no decay, or a rule does not fit leaf or mesh.
  """
  trainable, frozen = jax.eval_shape(tuning.init, params, rng)
  moving = set(tree.names(trainable))
  full = tree.combine(frozen, trainable)
  for patterns in _given(rates, decay, rules or ()):
    tree.check_patterns([p for p, _ in patterns], tree.names(full))

  places = _places(full, rules, mesh)

  def row(name, leaf):
    moves = name in moving
    return Row(
      name=name,
      shape=tuple(leaf.shape),
      trainable=moves,
      rate=_value(name, rates, 'rate')[1] if moves else None,
      decay=_value(name, decay, 'decay')[1] if moves else None,
      pattern=_value(name, rates, 'rate')[0] if moves else '',
      placement=places[name],
      leaves=1,
      size=leaf.size,
      num_bytes=leaf.size * leaf.dtype.itemsize,
    )

  rows = jax.tree.leaves(
    tree.map_with_name(row, full), is_leaf=lambda x: isinstance(x, Row)
  )
  return sorted(rows, key=lambda row: _natural(row.name))


def _given(*lists: tree.Patterns) -> list[tree.Patterns]:
  # A model without a bias is no reason to refuse our own default.
  own = [[p for p, _ in patterns] for patterns in (DECAY, EVERYWHERE)]
  return [given for given in lists if [p for p, _ in given] not in own]


def _value(
  name: str, patterns: tree.Patterns, what: str
) -> tuple[str, float | str]:
  index = tree.first_match(name, patterns)
  if index is None:
    raise UsageError(
      f'no pattern gives {name!r} a {what}; end the list with (".*", ...)'
    )
  pattern, value = patterns[index]
  # An array, such as a rate per step, has no single number to show.
  return pattern, float(value) if np.ndim(value) == 0 else 'array'


def _places(full: Params, rules, mesh) -> dict[str, str]:
  leaf_names = tree.names(full)
  if rules is None and mesh is None:
    return dict.fromkeys(leaf_names, '')
  if mesh is not None:
    specs = parameter_specs(full, mesh, rules or ())
    return {name: _spec_text(specs[name][1]) for name in leaf_names}
  fallback = [*(rules or ()), ('.*', ())]
  chosen = {name: tree.first_match(name, fallback) for name in leaf_names}
  return {name: _spec_text(fallback[i or 0][1]) for name, i in chosen.items()}


def _spec_text(spec: Iterable[Any]) -> str:
  """('fsdp', None) -> 'fsdp,-'; nothing sharded -> 'replicated'."""
  axes = [
    '+'.join(axis) if isinstance(axis, tuple) else axis or '-' for axis in spec
  ]
  return ','.join(axes) if any(a != '-' for a in axes) else 'replicated'


def _natural(name: str) -> list[tuple[bool, int, str]]:
  """Sorts layer_2 before layer_10."""
  parts = re.split(r'(\d+)', name)
  return [(p.isdigit(), int(p) if p.isdigit() else 0, p) for p in parts]


def fold(rows: Sequence[Row]) -> list[Row]:
  """Merges leaves that differ only in a number of their names.

  The number is that of a module, never of the leaf itself, and everything
  else in the row must be equal, so a layer with its own rate keeps its line.
  """
  tokens = {id(row): _tokens(row.name) for row in rows}
  positions = max((len(t) for t in tokens.values()), default=0)
  work = [(tokens[id(row)], row) for row in rows]
  for position in range(1, positions, 2):
    groups: dict[Any, list] = {}
    for parts, row in work:
      same = dataclasses.replace(row, name='', leaves=0, size=0, num_bytes=0)
      if position < len(parts):
        key = (position, *parts[:position], *parts[position + 1 :], same)
      else:
        key = (*parts, same)
      groups.setdefault((row.leaves, key), []).append((parts, row))
    work = [_merge(group, position) for group in groups.values()]
  return [dataclasses.replace(row, name=''.join(p)) for p, row in work]


def _tokens(name: str) -> tuple[str, ...]:
  """Text and numbers in turn; the leaf's own name stays whole."""
  module, slash, leaf = name.rpartition('/')
  *parts, last = re.split(r'(\d+)', module)
  return (*parts, last + slash + leaf)


def _merge(group: list, position: int) -> tuple[tuple[str, ...], Row]:
  parts, first = group[0]
  if len(group) == 1:
    return parts, first
  numbers = _ranges(sorted(int(parts[position]) for parts, _ in group))
  row = dataclasses.replace(
    first,
    leaves=sum(row.leaves for _, row in group),
    size=sum(row.size for _, row in group),
    num_bytes=sum(row.num_bytes for _, row in group),
  )
  return (*parts[:position], numbers, *parts[position + 1 :]), row


def _ranges(numbers: Sequence[int]) -> str:
  """[0, 1, 2, 5] -> '{0-2,5}'."""
  runs: list[list[int]] = []
  for number in numbers:
    if runs and number == runs[-1][-1] + 1:
      runs[-1] = [runs[-1][0], number]
    else:
      runs.append([number])
  return '{' + ','.join('-'.join(map(str, run)) for run in runs) + '}'


def idle_patterns(
  rows: Sequence[Row], lists: Mapping[str, tree.Patterns]
) -> list[str]:
  """One line per pattern that is valid but decides nothing.

  Args:
    rows: unfolded.
    lists: word -> ordered patterns that speak about trainable leaves.
  """
  lines = []
  for what, patterns in lists.items():
    if not _given(patterns):
      continue
    won = {
      tree.first_match(row.name, patterns) for row in rows if row.trainable
    }
    for index, (pattern, _) in enumerate(patterns):
      matched = [row for row in rows if re.fullmatch(pattern, row.name)]
      if index in won or not matched:
        continue
      only_frozen = not any(row.trainable for row in matched)
      reason = 'matches only frozen leaves' if only_frozen else 'is shadowed'
      lines.append(f'{what} {pattern!r} {reason}')
  return lines


def parameter_table(
  params: Params,
  tuning: Tuning,
  rng: Array,
  *,
  rates: tree.Patterns = EVERYWHERE,
  decay: tree.Patterns = DECAY,
  rate: float | None = None,
  rules: tree.Patterns | None = None,
  mesh: Mesh | None = None,
) -> str:
  """The table as text, at most 100 columns wide, without a final newline.

  Arguments and errors are those of `parameter_rows`, and

  Args:
    params: full parameters.
    tuning: what moves.
    rng: a key, for a tuning that adds leaves.
    rates: ordered `(pattern, multiplier)` over the learning rate.
    decay: ordered `(pattern, multiplier)` over the weight decay.
    rate: the schedule's peak; the column then shows peak times multiplier,
      otherwise the multiplier alone.
    rules: ordered `(pattern, PartitionSpec)`; adds a column.
    mesh: likewise; with it the column is what `place_state` will do.
  """
  rows = parameter_rows(
    params, tuning, rng, rates=rates, decay=decay, rules=rules, mesh=mesh
  )
  columns: dict[str, Callable[[Row], str]] = {
    'parameter': lambda row: row.name,
    'shape': lambda row: 'x'.join(map(str, row.shape)) or 'scalar',
    'moves': lambda row: 'yes' if row.trainable else 'frozen',
    'rate': lambda row: _rate_text(row.rate, rate),
    'decay': lambda row: _number(row.decay),
    'pattern': lambda row: row.pattern or '-',
  }
  if rules is not None or mesh is not None:
    columns['placement'] = lambda row: row.placement
  lines = _lines(list(columns), fold(rows), list(columns.values()))
  notes = idle_patterns(rows, {'rate': rates, 'decay': decay})
  return '\n'.join([*lines, totals(rows), *map(_cut_line, notes)])


def _rate_text(multiplier: Any, peak: float | None) -> str:
  if multiplier is None:
    return '-'
  if peak is None:
    return 'x' + _number(multiplier)
  return _number(peak * multiplier if multiplier != 'array' else multiplier)


def _number(value: Any) -> str:
  if value is None:
    return '-'
  return f'{value:.3g}' if isinstance(value, float) else value


def _lines(
  titles: Sequence[str],
  rows: Sequence[Row],
  columns: Sequence[Callable[[Row], str]],
) -> list[str]:
  cells = [list(titles), *([column(row) for column in columns] for row in rows)]
  widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
  # Names and patterns give way when the line is too long.
  for index in (titles.index('pattern'), titles.index('parameter')):
    excess = sum(widths) + 2 * (len(widths) - 1) - WIDTH
    widths[index] = max(12, widths[index] - max(excess, 0))
  return [
    '  '.join(
      _cut(cell, width).ljust(width)
      for cell, width in zip(line, widths, strict=True)
    ).rstrip()[:WIDTH]
    for line in cells
  ]


def _cut(text: str, width: int) -> str:
  """Keeps both ends of what is too long."""
  if len(text) <= width:
    return text
  head = (width - 2) // 2
  return f'{text[:head]}..{text[len(text) - (width - 2 - head) :]}'


def _cut_line(text: str) -> str:
  return _cut(text, WIDTH)


def totals(rows: Sequence[Row]) -> str:
  """Trainable of total, the share, and what the optimiser will hold."""
  total = sum(row.size for row in rows)
  moving = sum(row.size for row in rows if row.trainable)
  moments = 2 * sum(row.num_bytes for row in rows if row.trainable)
  return (
    f'trainable {moving:,} of {total:,} ({moving / max(total, 1):.2%}); two'
    f' Adam moments take {moments / 2**20:,.2f} MiB, frozen leaves 0'
  )
