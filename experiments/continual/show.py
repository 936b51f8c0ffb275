"""Shows measured rows: a table on the terminal, the matrices as a picture."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.continual import methods
from experiments.continual.measured import (
  Measured,
  difference_of,
  interval_of,
  standard_error,
)
from experiments.continual.table import Table
from fmeta import data, metrics, report


def shown(
  name: str,
  measured: Measured,
  more: Mapping[str, float | None],
  reference: Measured | None,
) -> tuple[report.Row, dict[str, float], dict[str, tuple[float, float]]]:
  """The table's row, its numbers and their intervals."""
  row, runs = measured.row, measured.runs
  average, error = standard_error(runs)
  ends = interval_of(measured)
  # Trained on all at once, a method has no matrix over time.
  matrices = [] if row.at_once else [run['matrix'] for run in runs]
  learned = methods.summary(matrices) if matrices else {}
  numbers = {name: average, f'{name} standard error': error}
  numbers |= {f'{name} {key}': value for key, value in learned.items()}
  ci95, difference = {} if ends is None else {name: ends}, None
  if reference is not None and (against := difference_of(measured, reference)):
    difference = (against.mean, *against.ci95)
    numbers[f'{name} minus {reference.row.title}'] = against.mean
    ci95[f'{name} minus {reference.row.title}'] = against.ci95
  made = report.Row(
    row.title,
    average,
    ends,
    setting=f'{measured.strength:g}' if row.grid else '',
    trainable=runs[0]['trainable'],
    seconds=None if 'compute' in more else _seconds(runs),
    baseline=reference is None,
    ceiling=row.at_once,
    difference=difference,
    more={**more, 'forgetting': learned.get('forgetting (Chaudhry)')},
  )
  return made, numbers, ci95


def _seconds(runs: Sequence[Mapping[str, Any]]) -> float:
  return float(np.mean([run['seconds'] for run in runs]))


def compute_of(measured: Mapping[str, Measured]) -> dict[str, float]:
  """FLOPs of a row's training steps over those of the cheapest trained row.

  What a task's end computes is not among them.
  """
  spent = {
    name: found.runs[0]['steps'] * found.runs[0]['flops_per_step']
    for name, found in measured.items()
    if found.runs[0].get('flops_per_step')
  }
  return {name: flops / min(spent.values()) for name, flops in spent.items()}


def run(
  table: Table,
  title: str,
  published: Mapping[str, float],
  picture: str,
  more: Mapping[str, Measured] | None = None,
) -> dict:
  """All rows, the table and the matrices as a picture.

  Args:
    table: with the methods of its config.
    title: of the table.
    published: method -> average accuracy.
    picture: its file name in the workdir.
    more: rows measured otherwise; differences are against the first of them,
      or of all.
  """
  config, measured = table.config, dict(more or {})
  for name in config.methods:
    measured[name] = table.measure(name)
  first, compute = next(iter(measured)), compute_of(measured)
  made, numbers, ci95, matrices = [], {}, {}, {}
  for name, found in measured.items():
    against = None if name == first else measured[first]
    # A terminal has room for one of what a row costs and what is published;
    # the page has all costs, and result.json the compute.
    beside = {'compute': compute.get(name)}
    if published:
      beside = {'published': published.get(name)}
    row, values, ends = shown(name, found, beside, against)
    made.append(row)
    numbers, ci95 = numbers | values, ci95 | ends
    if name in compute:
      numbers[f'{name} compute'] = compute[name]
    if not found.row.at_once:
      every = [metrics.accuracy_matrix(r['matrix']) for r in found.runs]
      matrices[row.name] = np.mean(every, axis=0)
  last = [*measured.values()][-1].runs[0]
  names = tuple(last['tasks'])
  if table.reorders:
    names = tuple(f'task {k + 1}' for k in range(len(names)))
  panel = report.Panel(
    title,
    f'How much is forgotten in the {config.scenario} scenario?',
    made,
    _note(table, bool(published)),
    report.stream(made, matrices, names) if matrices else None,
    metric='average accuracy',
    reference=measured[first].row.title if measured else None,
  )
  print(report.terminal_table(panel))
  print(panel.note)
  if panel.figure:
    (table.context.workdir / picture).write_bytes(panel.figure.png)
  costs = 'steps', 'examples_per_second', 'flops_per_step', 'peak_bytes'
  return {
    'metrics': numbers,
    'ci95': ci95,
    **{key: last.get(key) for key in costs},
    'trainable_parameters': last['trainable'],
    'total_parameters': table.parameters,
    'data_sha256': data.fingerprint(table.splits['train']),
  }


def _note(table: Table, with_published: bool) -> str:
  """How it was measured, below the table."""
  config = table.config
  seeds = f'mean over {config.seeds} seed{"s" * (config.seeds > 1)}; '
  if table.reorders:
    seeds += 'each with its order of tasks; intervals over test rows'
  else:
    seeds += 't-intervals over seeds, of differences pair by pair'
  if not config.methods:
    return seeds
  note = (
    f'{seeds}; {config.iterations} iterations a task, batches of '
    f'{config.batch_size}, Adam {config.rate:g}; memory of '
    f'{config.memory_size} rows; importance over at most '
    f'{config.fisher_examples} rows of a task'
  )
  if with_published:
    return note
  return (
    f'{note}; compute: FLOPs of the steps over those of the cheapest row that '
    'trains'
  )
