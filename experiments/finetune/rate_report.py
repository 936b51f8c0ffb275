"""What `learned_rates.py` says in the end: a table, intervals, the rates."""

import json

import jax
import numpy as np

from experiments.fewshot.names import SPLITS, Bench
from experiments.finetune.rate_policy import HEAD, Policy
from experiments.finetune.rate_rows import (
  DECAY,
  FEW,
  LEARNED,
  UNIFORM,
  Outcome,
)
from fmeta import baselines, metrics, tree
from fmeta.report import Panel, Row

MEAN = 'nearest class mean'


def nearest_mean(policy: Policy) -> np.ndarray:
  """The frozen model's answers to the test tasks, by cosine."""
  bench = policy.bench
  predict = jax.jit(
    baselines.nearest_mean_episodes(
      bench.embed, baselines.nearest_mean_cosine, bench.config.ways
    )
  )

  def right(seed):
    return [
      predict(bench.start, batch, None).argmax(-1) == batch['query']['label']
      for batch in policy.tasks('test', seed)
    ]

  seeds = range(bench.config.seeds)
  return np.array([np.concatenate(right(seed)) for seed in seeds])


def asked(policy: Policy) -> np.ndarray:
  """The parameter names of all test queries [seeds, episodes, queries]."""
  names, found = policy.bench.columns['name'], []
  for seed in range(policy.bench.config.seeds):
    tasks = policy.tasks('test', seed)
    rows = [tasks.source.rows(i)[1] for i in range(len(tasks))]
    found.append(names[np.concatenate(rows)])
  return np.array(found)


def compare(
  answers: dict[str, np.ndarray], names: np.ndarray
) -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
  """Accuracies and intervals of all rows and of their paired differences.

  Intervals resample names; those of keys that end in `by seed` whole seeds,
  each with its own training and test tasks.

  Args:
    answers: row -> right or not, [seeds, episodes, queries].
    names: what each query asks for, likewise.
  """
  numbers, ci95 = {}, {}
  seeds = np.broadcast_to(np.arange(len(names))[:, None, None], names.shape)
  units = {'': names.ravel(), ', by seed': seeds.ravel()}
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
  numbers, ci95 = compare(answers, asked(policy))

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
    note_of(policy.bench),
    reference=UNIFORM,
  )
  return panel, {'metrics': numbers, 'ci95': ci95}


def note_of(bench: Bench) -> str:
  """The protocol in words."""
  config = bench.config
  train_names, validation, test = (len(bench.classes[s]) for s in SPLITS)
  return (
    f'{config.seeds} seeds, each with {config.iterations * config.meta_batch} '
    f'tasks of {train_names} training names to learn rates from and '
    f'{config.test_episodes} test tasks of {test} other names. Every row chose '
    f'among {len(config.heads)} settings on '
    f'{config.seeds * config.validation_episodes} validation tasks of '
    f'{validation} names. Intervals resample the test names; differences are '
    'paired by query.'
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
  path = policy.bench.context.workdir / 'rates.json'
  path.write_text(json.dumps(written, indent=1))
  return {
    f'rate of {name}': float(mean)
    for name, mean in zip(policy.patterns, means, strict=True)
  }
