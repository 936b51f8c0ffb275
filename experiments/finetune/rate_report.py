"""What `learned_rates.py` says in the end: a table, intervals, the rates."""

import json

import jax
import numpy as np

from experiments.finetune.rate_policy import HEAD, Policy
from experiments.finetune.rate_rows import (
  DECAY,
  FEW,
  LEARNED,
  UNIFORM,
  Outcome,
)
from experiments.finetune.rate_tasks import Tasks
from fmeta import baselines, metrics, tree
from fmeta.report import Panel, Row

MEAN = 'nearest class mean'


def nearest_mean(policy: Policy) -> np.ndarray:
  """The frozen model's answers to the test tasks, by cosine."""
  tasks = policy.tasks
  predict = jax.jit(
    baselines.nearest_mean_episodes(
      tasks.embed, baselines.nearest_mean_cosine, tasks.config.ways
    )
  )

  def right(seed):
    return [
      predict(tasks.start, batch, None).argmax(-1) == batch['query']['label']
      for batch in tasks.held_out('test', seed)
    ]

  seeds = range(tasks.config.seeds)
  return np.array([np.concatenate(right(seed)) for seed in seeds])


def compare(
  answers: dict[str, np.ndarray], files: np.ndarray
) -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
  """Accuracies and intervals of all rows and of their paired differences.

  Intervals resample files; those of keys that end in `by seed` whole seeds,
  each with its own training and test tasks.

  Args:
    answers: row -> right or not, [seeds, episodes, queries].
    files: where each query is from, likewise.
  """
  numbers, ci95 = {}, {}
  seeds = np.broadcast_to(np.arange(len(files))[:, None, None], files.shape)
  units = {'': files.ravel(), ', by seed': seeds.ravel()}
  for row, right in answers.items():
    whole = metrics.bootstrap_ci(right.ravel(), units[''])
    numbers[row], ci95[row] = whole.mean, whole.ci95
    for other in (UNIFORM, DECAY):
      for words, groups in units.items():
        found = metrics.paired_bootstrap(
          right.ravel(), answers[other].ravel(), groups
        )
        if row != other:
          key = f'{row} minus {other}{words}'
          numbers[key], ci95[key] = found.mean, found.ci95
  return numbers, ci95


def table(policy: Policy, found: dict[str, Outcome]) -> tuple[Panel, dict]:
  """The rows and, for `result.json`, metrics and intervals."""
  answers = {MEAN: nearest_mean(policy)}
  answers |= {row: one.correct for row, one in found.items()}
  seeds = range(policy.tasks.config.seeds)
  files = np.array([policy.tasks.files(seed) for seed in seeds])
  numbers, ci95 = compare(answers, files)

  def shown(row, setting, seconds=None):
    key = f'{row} minus {UNIFORM}'
    return Row(
      row,
      numbers[row],
      ci95[row],
      setting,
      seconds=seconds,
      baseline=row not in (LEARNED, FEW),
      difference=(numbers[key], *ci95[key]) if key in numbers else None,
    )

  rows = [shown(row, one.setting, one.seconds) for row, one in found.items()]
  panel = Panel(
    'Learned rates',
    'Do learned layer-wise rates beat one rate and a tuned decay on new tasks?',
    [shown(MEAN, 'cosine'), *rows],
    note_of(policy.tasks),
    reference=UNIFORM,
  )
  return panel, {'metrics': numbers, 'ci95': ci95}


def note_of(tasks: Tasks) -> str:
  """The protocol in words."""
  config = tasks.config
  return (
    f'{config.seeds} seeds, each with {config.iterations * config.meta_batch} '
    f'training tasks to learn rates from and {config.test_episodes} test tasks '
    f'of {config.ways} of {len(tasks.classes["test"])} types, texts of other '
    f'files. Every row chose among {len(config.heads)} settings on '
    f'{config.seeds * config.validation_episodes} validation tasks. Intervals '
    'resample the test files; differences are paired by query.'
  )


def verdict(outcome: dict) -> str:
  """The two differences that the experiment is about, by both units."""
  lines = []
  for other in (UNIFORM, DECAY):
    for unit in ('', ', by seed'):
      key = f'{LEARNED} minus {other}{unit}'
      low, high = (100 * end for end in outcome['ci95'][key])
      value = 100 * outcome['metrics'][key]
      lines.append(f'{key}: {value:+.2f} [{low:+.2f}, {high:+.2f}] points')
  return '\n'.join(lines)


def hand_over(
  policy: Policy, lists: list[tree.Patterns], found: dict[str, Outcome]
) -> dict[str, float]:
  """Writes `rates.json` and prints the rates; metrics of each part's rate."""
  values = np.array([[rate for _, rate in rates] for rates in lists])
  logs = np.log(values)
  means, spreads = np.exp(logs.mean(0)), np.exp(logs.std(0))
  largest = means[:-1].max()
  print('learned rates: geometric mean and factor of spread over seeds')
  for name, mean, spread in zip(policy.patterns, means, spreads, strict=True):
    share = '' if name == HEAD else f'  {mean / largest:.2f} of the largest'
    print(f'  {name:<45} {mean:.2e} x/ {spread:.2f}{share}')
  written = {
    'rates': lists,
    LEARNED: found[LEARNED].setting,
    FEW: found[FEW].setting,
  }
  path = policy.tasks.context.workdir / 'rates.json'
  path.write_text(json.dumps(written, indent=1))
  return {
    f'rate of {name}': float(mean)
    for name, mean in zip(policy.patterns, means, strict=True)
  }
