"""The tables of a comparison of methods on one stream."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from fmeta import metrics
from fmeta.report import sheet
from fmeta.report.rows import interval, percent
from fmeta.report.runs import Method

Values = Callable[[Method], list[float]]

# In the order of the table.
_OF_MATRICES: dict[str, Callable] = {
  'anytime': metrics.anytime_accuracy,
  'when learned': metrics.learning_accuracy,
  'forgetting (Chaudhry)': metrics.forgetting_chaudhry,
  'backward transfer': metrics.backward_transfer,
}
_OF_CURVES: dict[str, Callable] = {
  'min-ACC': metrics.minimum_accuracy,
  'WC-ACC': metrics.worst_case_accuracy,
  'stability gap': metrics.stability_gap,
  'WF10': functools.partial(metrics.windowed_forgetting, window=10),
  'WP10': functools.partial(metrics.windowed_plasticity, window=10),
}
_FORMULAS = (
  'R[i, j]: accuracy on task j after task i of T. Average accuracy: mean over j'
  ' of R[T, j]. Anytime: mean over i of the mean over j <= i of R[i, j]. When'
  ' learned: mean of R[j, j]. Forgetting (Chaudhry et al. 2018): mean over'
  ' j < T of the best of R[j..T-1, j] minus R[T, j]. Backward transfer: mean'
  ' over j < T of R[T, j] - R[j, j].'
)
_OF_CURVES_FORMULAS = (
  ' With evaluations during training (De Lange et al. 2023): min-ACC, mean over'
  ' j < T of the lowest accuracy after task j was learned; WC-ACC, the last'
  " task's accuracy / T + (1 - 1/T) min-ACC; stability gap, what the earlier"
  ' tasks recovered from their lowest point by the end; WF10 and WP10, mean'
  ' over tasks of the largest fall and rise between any two of ten consecutive'
  ' evaluations since the task began.'
)


def achieved(
  methods: Mapping[str, Method], tasks: Sequence[str], reference: str
) -> str:
  """Every metric of every method, and differences from one of them."""
  measures = _measures(methods, len(tasks))
  head = ['method', 'seeds', 'average accuracy', '95% CI', *measures]
  head += [f'accuracy minus {reference}', f'forgetting minus {reference}']
  rows = [
    [
      name,
      *_cells(method, measures),
      *_differences(method, methods[reference], len(tasks)),
    ]
    for name, method in methods.items()
  ]
  kept = [i for i in range(len(head)) if i < 3 or any(row[i] for row in rows)]
  caption = (
    'In percent, differences in points with their 95% t-interval over the seeds'
    ' that both methods share, pair by pair; * excludes zero.'
  )
  table = sheet.table(
    [head[i] for i in kept], [[row[i] for i in kept] for row in rows], caption
  )
  curves = any(name in measures for name in _OF_CURVES)
  formulas = _FORMULAS + (_OF_CURVES_FORMULAS if curves else '')
  return f'{table}<p class="note">{sheet.safe(formulas)}</p>\n'


def _measures(methods: Mapping[str, Method], count: int) -> dict[str, Values]:
  """The columns that some method fills."""
  made: dict[str, Values] = {}
  # A stream of one task has neither forgetting nor a low point after a task.
  if count > 1:
    for name, measure in _OF_MATRICES.items():
      made[name] = lambda method, f=measure: [
        f(matrix) for matrix in method.matrices.values()
      ]
  if count > 1 and any(method.curves for method in methods.values()):
    for name, measure in _OF_CURVES.items():
      made[name] = lambda method, f=measure: [
        f(curves) for curves in method.curves.values()
      ]
  return made


def _cells(method: Method, measures: Mapping[str, Values]) -> list[str]:
  values = list(method.finals.values())
  ends = metrics.mean_t(values).ci95 if len(values) > 1 else None
  cells = [str(len(values)), percent(float(np.mean(values))), interval(ends)]
  for measure in measures.values():
    found = measure(method)
    cells.append(percent(float(np.mean(found))) if found else '')
  return cells


def _differences(method: Method, reference: Method, count: int) -> list[str]:
  if method is reference:
    return ['', '']
  lost = ''
  if count > 1:
    forgetting = metrics.forgetting_chaudhry
    lost = _paired(method.matrices, reference.matrices, forgetting)
  return [_paired(method.finals, reference.finals, float), lost]


def _paired(first: Mapping, second: Mapping, measure: Callable) -> str:
  """Over the seeds that both have; empty where they are fewer than two."""
  shared = [seed for seed in first if seed in second]
  if len(shared) < 2:
    return ''
  found = metrics.paired_difference(
    {seed: first[seed] for seed in shared},
    {seed: second[seed] for seed in shared},
    measure,
  )
  star = '*' if found.excludes_zero else ''
  ends = interval(found.ci95, sign=True)
  return f'{percent(found.mean, sign=True)} ({ends}){star}'


def cost(methods: Mapping[str, Method]) -> str:
  """What each method costs."""
  head = ['method', 'examples seen', 'FLOPs', 'seconds', 'memory (bytes)']
  head.append('parameters added')
  rows = [
    [name, *map(_amount, dataclasses.astuple(method.cost))]
    for name, method in methods.items()
  ]
  return sheet.table(head, rows, 'Mean over seeds, of the whole stream.')


def _amount(value: float | None) -> str:
  if value is None:
    return 'not measured'
  return f'{value:.3g}' if value >= 1e9 else f'{value:,.0f}'
