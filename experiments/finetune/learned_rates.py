"""Do learned layer-wise rates beat one rate and a tuned decay on new tasks?

  python -m experiments.run --config=experiments/finetune/learned_rates.py

A task has five of docparams' ten types in random order, five descriptions of
each to fine-tune on and twenty of each to answer for; training, validation and
test tasks come from different files. The last three layers of MiniLM and a
zero head move for five full-batch Adam steps. What differs between rows is the
list of rates alone:

  head only    the body stays
  uniform      one rate for the body, one for the head
  decay        the body's rate shrinks per layer away from the head
  learned      a rate for each part of each layer and for the head, learned on
               training tasks through the same five steps
  learned few  the same, parts with small rates frozen

The outer loop moves only the logarithms of the rates (`optim.learned_rates`);
the model still starts from its pre-trained weights, so what comes out is an
ordinary list, `rates.json`, that plain fine-tuning takes. Every row chooses
one setting by its accuracy on validation tasks from a grid of equal size:
uniform tunes the head's rate as well, decay takes that one over, and learned
rates are multiplied by a grid of factors of the same shape. A seed has its own
training, validation and test tasks.

Chosen on training and validation texts alone (2026-11-24, 24 validation tasks
each, ten queries per class). Tasks of parameter names, as in the few-shot
panel, gain little from the body: head only .88, one rate .89 to .90 between
1e-4 and 1e-3, learned .8975. Tasks of types do: head only .52, one rate .550
to .560 at 3e-4 to 1.2e-3, learned .583.
Expected and measured: experiments/README.md.
"""

import dataclasses

from experiments.common import Seeds, trial
from experiments.finetune import rate_report, rate_rows
from experiments.finetune.rate_policy import Policy
from experiments.finetune.rate_tasks import Tasks
from fmeta import optim, tree
from fmeta.errors import UsageError
from fmeta.pretrained import MINILM
from fmeta.report import terminal_table
from fmeta.workdir import Context


@dataclasses.dataclass
class Config:
  """What one would sweep; what has no source is untuned."""

  seed: Seeds = dataclasses.field(default_factory=Seeds)
  seeds: int = 10
  model: str = MINILM
  ways: int = 5
  shots: int = 5
  queries: int = 20
  max_length: int = 16
  blocks: int = 3
  inner_steps: int = 5
  # Of each layer, first match wins.
  parts: tuple[str, ...] = (
    '.*/norm/.*',
    'attention/(query|key)/.*',
    'attention/.*',
    'mlp/.*',
  )
  iterations: int = 30
  meta_batch: int = 1
  outer_lr: float = 0.2  # of logarithms
  start_rate: float = 3e-4
  start_head: float = 0.1
  # The grids.
  heads: tuple[float, ...] = tuple(0.01 * 1.5**k for k in range(9))
  rates: tuple[float, ...] = (3e-4, 6e-4, 1.2e-3)
  head_rates: tuple[float, ...] = (0.03, 0.06, 0.12)
  # 1 / 2.6: Howard & Ruder 2018, section 3.2. Above 1 rates grow away from the
  # head: where the lower layers have to move, a tuned decay may say so.
  decays: tuple[float, ...] = (1 / 2.6, 0.7, 1.4)
  factors: tuple[float, ...] = (0.5, 1.0, 2.0)
  head_factors: tuple[float, ...] = (0.5, 1.0, 2.0)
  shares: tuple[float, ...] = (0.1, 0.3, 0.6)
  validation_episodes: int = 4  # of each seed
  test_episodes: int = 24


SMALL = {
  'seeds': 2,
  'shots': 2,
  'queries': 2,
  'blocks': 1,
  'inner_steps': 1,
  'iterations': 1,
  'heads': (0.1,),
  'rates': (1e-3,),
  'head_rates': (0.1,),
  'decays': (0.5,),
  'factors': (1.0,),
  'head_factors': (1.0,),
  'shares': (0.5,),
  'validation_episodes': 1,
  'test_episodes': 2,
}


def check(config: Config) -> None:
  """Refuses what cannot be run or compared, before anything is loaded."""
  counts = ('seeds', 'blocks', 'inner_steps', 'iterations')
  for name in (*counts, 'validation_episodes', 'test_episodes'):
    if getattr(config, name) < 1:
      raise UsageError(f'{name}={getattr(config, name)}; give at least 1')
  for name in ('start_rate', 'start_head', 'outer_lr'):
    if not getattr(config, name) > 0:
      raise UsageError(f'{name}={getattr(config, name)}; give a positive rate')
  rate_rows.check_grids(config)


def learn(policy: Policy, seed: int) -> dict:
  """Meta-trains one seed: its rates and what that cost."""

  def run():
    fitted = policy.learn(seed)
    rates = optim.learned_rates(policy.patterns, fitted.params['hyper'])
    return {
      'rates': optim.plain_rates(rates),
      'losses': [float(record['loss']) for record in fitted.history],
      'steps': fitted.steps,
      'examples_per_second': fitted.examples_per_second,
      'flops_per_step': fitted.flops_per_step,
      'peak_bytes': fitted.peak_bytes,
    }

  return trial(policy.tasks.context, f'policy/seed_{seed}', run)


def run(config: Config, context: Context) -> dict:
  """Learns the rates of every seed, compares all rows, prints the table."""
  check(config)
  tasks = Tasks(config, context)
  policy = Policy(tasks)
  made = [learn(policy, seed) for seed in range(config.seeds)]
  lists = [one['rates'] for one in made]
  found = dict(rate_rows.given(policy))
  found |= dict(rate_rows.learned(policy, lists))
  rates = rate_report.hand_over(policy, lists, found)
  shown, outcome = rate_report.table(policy, found)
  print(terminal_table(shown))
  print(rate_report.verdict(outcome))
  cost = ('steps', 'examples_per_second', 'flops_per_step', 'peak_bytes')
  return {
    'metrics': outcome['metrics'] | rates,
    'ci95': outcome['ci95'],
    **{key: made[0][key] for key in cost},
    'trainable_parameters': tree.size(tasks.start),
    'total_parameters': tasks.total,
    'data_sha256': tasks.fingerprint(),
  }
