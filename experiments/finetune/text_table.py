"""A table of recipes on one text data set: chosen, run, compared in pairs."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from experiments.finetune.text_task import Columns, Recipe, TextTask
from fmeta import data, metrics, report
from fmeta.errors import UsageError
from fmeta.scores import Scores

_COSTS = ('steps', 'examples_per_second', 'flops_per_step', 'peak_bytes')


class Plan(NamedTuple):
  """What is trained on what.

  Attributes:
    name: of the table; folder of its trials and prefix of its numbers.
    recipes: row -> recipe.
    search: what rates are chosen on.
    training: `seed -> columns` of a final run.
    seeds: how many.
    reference: the row that differences are taken against, if it is there.
  """

  name: str
  recipes: Mapping[str, Recipe]
  search: Columns
  training: Callable[[int], Columns]
  seeds: int
  reference: str


def train_rows(task: TextTask, plan: Plan) -> dict[str, tuple[float, list]]:
  """Row -> (chosen rate, one result per seed).

  Raises:
    UsageError: before anything is trained, if there is nothing to compare.
  """
  if plan.seeds < 1 or not plan.recipes:
    raise UsageError(
      f'{plan.seeds} seeds of {len(plan.recipes)} rows; give at least one each'
    )
  out = {}
  for row, recipe in plan.recipes.items():
    name = f'{plan.name}/{row}'
    rate = task.choose(name, recipe, plan.search)
    out[row] = (
      rate,
      [
        task.final(name, recipe, plan.training(seed), rate, seed)
        for seed in range(plan.seeds)
      ],
    )
  return out


def compare(
  task: TextTask, plan: Plan, question: str, note: str = ''
) -> dict[str, Any]:
  """Trains every row, prints the table and returns what `run` returns.

  Intervals resample test texts of the correctness averaged over seeds.
  """
  trained = train_rows(task, plan)
  correct = {
    row: np.array([made['correct'] for made in runs])
    for row, (_, runs) in trained.items()
  }
  numbers, ci95, rows = {}, {}, []

  def keep(name: str, interval: metrics.Interval) -> metrics.Interval:
    numbers[f'{plan.name}/{name}'] = interval.mean
    ci95[f'{plan.name}/{name}'] = interval.ci95
    return interval

  for row, (rate, runs) in trained.items():
    interval = keep(row, metrics.bootstrap_ci(correct[row]))
    difference = None
    if row != plan.reference and plan.reference in correct:
      against = metrics.paired_bootstrap(correct[row], correct[plan.reference])
      difference = keep(f'{row} minus {plan.reference}', against)
    rows.append(
      report.Row(
        row,
        interval.mean,
        interval.ci95,
        setting=f'rate {rate:g}',
        trainable=runs[0]['trainable'],
        seconds=float(np.mean([made['seconds'] for made in runs])),
        difference=difference and tuple(difference),
        more={'std over seeds': float(correct[row].mean(1).std())},
      )
    )
  reference = plan.reference if plan.reference in correct else None
  shown = report.Panel(plan.name, question, rows, note, reference=reference)
  print(report.terminal_table(shown), flush=True)
  tested_on = data.fingerprint(task.splits['test'])
  last = list(trained.values())[-1][1][0]
  return {
    'metrics': numbers,
    'ci95': ci95,
    **{key: last[key] for key in _COSTS},
    'trainable_parameters': last['trainable'],
    'scores': {
      f'{plan.name}/{row}': Scores(right, tested_on)
      for row, right in correct.items()
    },
  }
