"""Rows, curves and paired differences of a few-shot text table."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments.fewshot.text_task import Bench
from fmeta import data, evaluate, metrics
from fmeta.report import Line, Row
from fmeta.scores import Scores

REFERENCE = 'nearest class mean'
_COSTS = ('steps', 'examples_per_second', 'flops_per_step', 'peak_bytes')


class Table(NamedTuple):
  """What `compare` makes of the trials.

  Attributes:
    rows: the reference, then one per method.
    lines: accuracy over inner steps, where a method has any.
    numbers: metric -> value.
    ci95: metric -> interval.
    cost: of the last method that was meta-trained.
    values: metric -> accuracies [seeds, n] of the test list.
  """

  rows: list[Row]
  lines: list[Line]
  numbers: dict[str, float]
  ci95: dict[str, tuple[float, float]]
  cost: dict[str, Any]
  values: dict[str, np.ndarray]


def compare(
  name: str,
  results: Mapping[str, Sequence[Mapping[str, Any]]],
  reference: np.ndarray,
  steps: Sequence[int],
  baselines: Sequence[str] = (),
  shuffled: np.ndarray | None = None,
) -> Table:
  """Compares methods on the same episodes.

  Args:
    name: prefix of the metrics.
    results: method -> a result per seed, see `choose_and_test`.
    reference: accuracy [episodes] of the nearest class mean.
    steps: inner steps of the curves.
    baselines: methods drawn in grey.
    shuffled: accuracies of the reference with shuffled labels.
  """
  base = evaluate.summarize(reference)
  control = {} if shuffled is None else {'shuffled labels': shuffled.mean()}
  first = Row(
    REFERENCE, base.mean, base.ci95, 'cosine', baseline=True, more=control
  )
  numbers = {f'{name}/{REFERENCE}': base.mean, f'{name}/tests': base.n}
  ci95 = {f'{name}/{REFERENCE}': base.ci95}
  for key, value in control.items():
    numbers[f'{name}/{REFERENCE}, {key}'] = float(value)
  ends = [base.ci95] * len(steps)
  lines = [Line(REFERENCE, steps, [base.mean] * len(steps), ends, True)]
  values = {f'{name}/{REFERENCE}': reference[None]}
  table = Table([first], lines, numbers, ci95, {}, values)
  for method, runs in results.items():
    _add(table, name, method, runs, reference, method in baselines)
    if 'curve' in runs[0]:
      lines.append(_line(method, runs, steps))
    if 'steps' in runs[0]:
      table.cost.update({key: runs[0][key] for key in _COSTS})
  return table


def _add(table: Table, name, method, runs, reference, baseline) -> None:
  """One method's row and numbers."""
  right = np.array([one['correct'] for one in runs])
  table.values[f'{name}/{method}'] = right
  summary = evaluate.summarize(right.mean(0))
  difference = metrics.paired_bootstrap(right, reference)
  for key, found in (
    (f'{name}/{method}', summary),
    (f'{name}/{method} minus {REFERENCE}', difference),
  ):
    table.numbers[key], table.ci95[key] = found.mean, found.ci95
  more = {}
  if 'shuffled' in runs[0]:
    control = evaluate.summarize(np.mean([one['shuffled'] for one in runs], 0))
    key = f'{name}/{method}, shuffled labels'
    table.numbers[key], table.ci95[key] = control.mean, control.ci95
    more = {'shuffled labels': control.mean}
  table.rows.append(
    Row(
      method,
      summary.mean,
      summary.ci95,
      setting='; '.join(dict.fromkeys(one['setting'] for one in runs)),
      trainable=runs[0]['trainable'],
      seconds=float(np.mean([one['seconds'] for one in runs])),
      baseline=baseline,
      difference=tuple(difference),
      more=more,
    )
  )


def _line(method, runs, steps) -> Line:
  points = [
    evaluate.summarize(point)
    for point in np.mean([one['curve'] for one in runs], 0)
  ]
  ends = [point.ci95 for point in points]
  return Line(method, steps, [point.mean for point in points], ends)


def merged(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
  """One method's results on several folds as one on all their episodes."""
  out = dict(runs[0])
  for key in ('correct', 'shuffled', 'curve'):
    if key in out:
      parts = [np.array(one[key]) for one in runs]
      out[key] = np.concatenate(parts, axis=-1).tolist()
  if 'setting' in out:
    out['setting'] = '; '.join(dict.fromkeys(one['setting'] for one in runs))
  return {**out, 'seconds': sum(one['seconds'] for one in runs)}


def show_grid(name: str, result: Mapping[str, Any]) -> None:
  """Prints what was tried on validation episodes."""
  tried = {k: round(value, 3) for k, value in result['tried'].items()}
  print(f'{name}: validation accuracy by setting {tried}', flush=True)


def outcome_of(table: Table, bench: Bench, tested_on: str) -> dict[str, Any]:
  """What an experiment's `run` returns; `tested_on` names the test list."""
  tests_sha256 = data.fingerprint(bench.test_texts)
  return {
    'metrics': table.numbers,
    'ci95': table.ci95,
    **{key: table.cost.get(key) for key in _COSTS},
    'trainable_parameters': table.rows[-1].trainable,
    'total_parameters': bench.total,
    'data_sha256': data.fingerprint(bench.texts),
    'scores': {
      key: Scores(values, f'{tests_sha256}, {tested_on}')
      for key, values in table.values.items()
    },
  }
