"""The page and the numbers of an intent table."""

import time
from typing import Any

import jax
import numpy as np

from experiments.fewshot.intent_methods import UNTRAINED
from experiments.fewshot.text_table import REFERENCE, compare, outcome_of
from experiments.fewshot.text_task import Bench
from fmeta import report, result


def episodes_of(config: Any) -> str:
  """What names a list of episodes beside its texts."""
  return (
    f'{config.test_episodes} episodes, {config.ways} ways, {config.shots} '
    f'shots, {config.queries} queries, {config.max_length} tokens'
  )


def present(
  bench: Bench,
  results: dict[str, dict],
  *,
  name: str,
  title: str,
  note: str,
  tested_on: str,
  began: float,
) -> dict[str, Any]:
  """Prints the table, writes the page, gives what `run` returns.

  Args:
    bench: what was run on.
    results: row -> its trial.
    name: prefix of the metrics.
    title: of the table.
    note: the protocol in words.
    tested_on: names the test list.
    began: `time.perf_counter()` of the start.
  """
  config, rows = bench.config, dict(results)
  reference = rows.pop(REFERENCE)
  table = compare(
    name,
    {key: [made] for key, made in rows.items()},
    np.array(reference['correct']),
    config.test_steps,
    UNTRAINED,
    np.array(reference['shuffled']),
  )
  shown = report.Panel(
    title,
    'Which method beats the nearest class mean of the frozen encoder?',
    table.rows,
    note,
    report.curves(
      table.lines,
      xlabel=f'inner steps ({table.numbers[f"{name}/tests"]:,} tests each)',
      title=title,
    ),
    reference=REFERENCE,
    total=bench.total,
  )
  print(report.terminal_table(shown), flush=True)
  outcome = outcome_of(table, bench, tested_on)
  report.write_report(
    bench.context.workdir / 'report.html',
    f'Few-shot intents: MiniLM on {config.dataset}',
    [shown],
    {
      'hardware': f'{len(jax.devices())} x {jax.devices()[0].device_kind}',
      'seconds': round(time.perf_counter() - began),
      'date': time.strftime('%Y-%m-%d'),
      'commit': result.commit(),
      'data sha256': outcome['data_sha256'],
      'versions': result.versions(),
    },
  )
  return outcome
