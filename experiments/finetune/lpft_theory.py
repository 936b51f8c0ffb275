"""Feature distortion: LP-FT in the theory of two-layer linear networks.

  python -m experiments.run --config=experiments/finetune/lpft_theory.py

The model is f(x) = x B v, features B [d, k] and head v [k]; targets are
x B* v*. Pre-trained features B0 span nearly what B* spans (B* plus noise,
orthonormal, turned), the head starts at random. Training inputs lie in a
random m-dimensional subspace, k < m < d - k, test inputs out of distribution
everywhere (Kumar et al. 2022, https://arxiv.org/abs/2202.10054, section 3).
LP moves the head, FT both from the random head, LP-FT the head for half of the
steps and then both, in two phases. The paper proves, for good features: FT
fits in distribution but distorts B0 and has the larger error out of
distribution; LP-FT has the better of both.

Full-batch gradient descent of one small rate stands for gradient flow, so
there is nothing to tune: all three have the same rate and number of steps.
Errors are exact expectations over x ~ N(0, I), in the subspace and outside,
divided by those of the zero function. Measured: experiments/README.md.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import fmeta
from experiments.common import Seeds, placement, trial
from fmeta import data, metrics, optim, train
from fmeta.workdir import Context

METHODS = ('LP', 'FT', 'LP-FT')
PAIRS = (('FT', 'LP'), ('LP-FT', 'FT'), ('LP-FT', 'LP'))
SIDES = ('ID', 'OOD')


@dataclasses.dataclass
class Config:
  """What one would sweep; sizes, rate and steps are untuned."""

  seed: Seeds = dataclasses.field(default_factory=Seeds)
  seeds: int = 10
  noises: tuple[float, ...] = (0.1, 0.2, 0.4)
  inputs: int = 20
  features: int = 5
  subspace: int = 10
  examples: int = 40
  rate: float = 0.05
  num_steps: int = 1000


SMALL = {'seeds': 2, 'noises': (0.1,), 'num_steps': 60}


class Problem(NamedTuple):
  """One draw: where the model starts, what it sees, what is true.

  Attributes:
    params: `body/kernel` B0 [d, k] and `head/kernel` v0 [k, 1].
    columns: `x` [n, d] and `target` [n, 1].
    weights: the true B* v* [d].
    basis: orthonormal basis [d, m] of the training inputs' subspace.
  """

  params: dict
  columns: data.Columns
  weights: np.ndarray
  basis: np.ndarray


def draw(config: Config, noise: float, seed: int) -> Problem:
  """The problem of a seed; `noise` is the length of the features' errors."""
  random = np.random.default_rng((config.seed.data, seed))
  d, k = config.inputs, config.features

  def orthonormal(columns):
    return np.linalg.qr(random.normal(size=(d, columns)))[0]

  true = orthonormal(k)
  weights = true @ random.normal(size=k) / k**0.5
  error = noise * random.normal(size=(d, k)) / d**0.5
  turn = np.linalg.qr(random.normal(size=(k, k)))[0]
  features = np.linalg.qr(true + error)[0] @ turn
  basis = orthonormal(config.subspace)
  x = random.normal(size=(config.examples, config.subspace)) @ basis.T
  random = np.random.default_rng((config.seed.init, seed))
  head = random.normal(size=(k, 1)) / k**0.5
  columns = {'x': x, 'target': x @ weights[:, None]}
  return Problem(
    jax.tree.map(
      np.float32, {'body': {'kernel': features}, 'head': {'kernel': head}}
    ),
    {key: value.astype(np.float32) for key, value in columns.items()},
    weights,
    basis,
  )


def forward(params, model_state, batch, rng):
  """x B v."""
  del rng
  hidden = batch['x'] @ params['body']['kernel']
  return hidden @ params['head']['kernel'], model_state


def errors(problem: Problem, params: dict) -> dict[str, float]:
  """Expected squared error over that of the zero function, by side."""
  body, head = (np.float64(params[name]['kernel']) for name in ('body', 'head'))
  off = (body @ head)[:, 0] - problem.weights

  def share(direction):
    return float(
      np.sum(direction(off) ** 2 / np.sum(direction(problem.weights) ** 2))
    )

  return {
    'ID': share(lambda w: problem.basis.T @ w),
    'OOD': share(lambda w: w),
  }


def phases_of(config: Config) -> dict[str, tuple[fmeta.Phase, ...]]:
  """What moves when, for each method; equally many steps."""
  steps = config.num_steps
  return {
    'LP': fmeta.phases([(steps, fmeta.select('head/.*'))]),
    'FT': fmeta.phases([(steps, fmeta.full())]),
    'LP-FT': fmeta.lp_ft(
      'head/.*', probe_steps=steps // 2, full_steps=steps - steps // 2
    ),
  }


class Method:
  """A method with its learners, built and compiled once for all problems."""

  def __init__(self, config: Config, name: str):
    loss = fmeta.supervised(forward, fmeta.squared_error)

    def learner_of(tuning):
      return fmeta.finetune(loss, optim.sgd(config.rate), tuning=tuning)

    self.name, self.config = name, config
    phases = phases_of(config)[name]
    self.phased = train.Phased(phases, learner_of)
    self.programs = [train.Program(each) for each in self.phased.learners]

  def run(self, context: Context, problem: Problem, seed: int) -> dict:
    """Trains on one problem; its errors and costs."""
    config, first = self.config, self.phased.learners[0]
    params = jax.tree.map(jnp.asarray, problem.params)
    fitted = train.fit(
      first,
      first.init(params, jax.random.key(config.seed.init)),
      self.phased.stages(self.name, lambda i: problem.columns),
      jax.random.key(config.seed.train + seed),
      steps_per_dispatch=250,
      log_every=250,
      quiet=True,
      program=self.programs,
      **placement(context),
    )
    return {
      'errors': errors(problem, fitted.params),
      'train_loss': fitted.history[-1]['loss'],
      'steps': fitted.steps,
      'examples_per_second': fitted.examples_per_second,
      'flops_per_step': fitted.flops_per_step,
      'trainable': fmeta.tree.size(fitted.state.trainable),
      'total': fmeta.tree.size(fitted.params),
    }


def measure(config: Config, context: Context) -> dict[str, list[list[dict]]]:
  """Method -> noise -> seed -> result of the run."""
  out = {}
  for name in METHODS:
    method = Method(config, name)

    def one(noise, seed, method=method):
      problem = draw(config, noise, seed)
      return trial(
        context,
        f'{method.name}/noise_{noise:g}/seed_{seed}',
        lambda: method.run(context, problem, seed),
      )

    out[name] = [
      [one(noise, seed) for seed in range(config.seeds)]
      for noise in config.noises
    ]
  return out


def summary(config: Config, results: dict) -> tuple[dict, dict]:
  """Means and paired differences, with 95% bootstrap intervals over seeds."""
  numbers, ci95 = {}, {}
  for index, noise in enumerate(config.noises):
    for side in SIDES:
      values = {
        name: [run['errors'][side] for run in results[name][index]]
        for name in METHODS
      }
      rows = {name: metrics.bootstrap_ci(values[name]) for name in METHODS}
      for a, b in PAIRS:
        rows[f'{a} minus {b}'] = metrics.paired_bootstrap(values[a], values[b])
      for row, interval in rows.items():
        key = f'noise {noise:g} {side} {row}'
        numbers[key], ci95[key] = interval.mean, interval.ci95
  return numbers, ci95


def table(config: Config, numbers: dict, ci95: dict) -> str:
  """The numbers as text, a line per noise and row."""
  lines = [f'{"noise":>6} {"":14}' + ''.join(f'{s:>34}' for s in SIDES)]
  rows = [*METHODS, *(f'{a} minus {b}' for a, b in PAIRS)]
  for noise in config.noises:
    for row in rows:
      cells = []
      for side in SIDES:
        key = f'noise {noise:g} {side} {row}'
        low, high = ci95[key]
        cells.append(f'{numbers[key]:12.2e} [{low:9.2e},{high:10.2e}]')
      lines.append(f'{noise:6g} {row:14}' + ' '.join(cells))
  return '\n'.join(lines)


def run(config: Config, context: Context) -> dict:
  """All methods on the same problems; relative errors and a table."""
  results = measure(config, context)
  numbers, ci95 = summary(config, results)
  print('squared error over that of the zero function, mean and 95% interval')
  print(table(config, numbers, ci95))
  last = results['LP-FT'][-1][-1]
  numbers['largest training loss of FT and LP-FT'] = max(
    run['train_loss']
    for name in ('FT', 'LP-FT')
    for runs in results[name]
    for run in runs
  )
  return {
    'metrics': numbers,
    'ci95': ci95,
    **{k: last[k] for k in ('steps', 'examples_per_second', 'flops_per_step')},
    'trainable_parameters': last['trainable'],
    'total_parameters': last['total'],
    'data_sha256': data.fingerprint(draw(config, config.noises[0], 0).columns),
  }
