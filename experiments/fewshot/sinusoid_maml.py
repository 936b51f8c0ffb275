"""MAML on sinusoids: regression from ten points.

  python -m experiments.run --config=experiments/fewshot/sinusoid_maml.py

Tasks are a sin(x - p) with a ~ U[0.1, 5], p ~ U[0, pi], x ~ U[-5, 5]; ten
support and ten query points, MLP 40-40, inner SGD 0.01, meta-batch 25, outer
Adam 1e-3, 70,000 iterations (Finn et al. 2017,
https://arxiv.org/abs/1703.03400, section 5.1). Mean squared error on 600 new
tasks with 100 query points. Expected and measured: experiments/README.md.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

import fmeta
from experiments.common import Seeds, fit_options, require
from fmeta import data, draw, evaluate, optim, train
from fmeta.models import forward, init
from fmeta.models.mlp import Mlp
from fmeta.scores import Scores
from fmeta.workdir import Context


@dataclasses.dataclass
class Config:
  """What one would sweep; defaults are the paper's."""

  seed: Seeds = dataclasses.field(default_factory=Seeds)
  shots: int = 10
  queries: int = 10
  meta_batch: int = 25
  inner_lr: float = 0.01
  inner_steps: int = 1
  outer_lr: float = 1e-3
  iterations: int = 70_000
  first_order: bool = False
  test_tasks: int = 600
  test_steps: tuple[int, ...] = (0, 1, 5, 10)


LEAST = {
  **dict.fromkeys(('shots', 'queries', 'meta_batch', 'iterations'), 1),
  **dict.fromkeys(('inner_steps', 'test_steps'), 0),
  'test_tasks': 1,
}
SMALL = {'iterations': 30, 'test_tasks': 20, 'test_steps': (0, 1)}


def sinusoids(seed: int, tasks: int, shots: int, queries: int):
  """`i -> {'support', 'query'}` with x and target [tasks, points, 1]."""
  points = shots + queries
  used = tasks * (2 + points)
  blocks = -(-used // 4)

  def episodes(i):
    words = draw.random_words(seed, draw.EPISODE, i * blocks, blocks * 4)
    uniform = (words[:used] >> np.uint64(11)) * 2.0**-53
    uniform = uniform.reshape(tasks, -1, 1)
    amplitude = 0.1 + 4.9 * uniform[:, :1]
    phase = np.pi * uniform[:, 1:2]
    x = -5 + 10 * uniform[:, 2:]
    both = {'x': x, 'target': amplitude * np.sin(x - phase)}
    both = {key: value.astype(np.float32) for key, value in both.items()}
    return {
      'support': {key: value[:, :shots] for key, value in both.items()},
      'query': {key: value[:, shots:] for key, value in both.items()},
    }

  return episodes


def run(config: Config, context: Context) -> dict:
  """Meta-trains, then measures the error after each number of steps."""
  model = Mlp((40, 40), 1)
  model_forward = forward(model, ('x',))
  loss = fmeta.supervised(model_forward, fmeta.squared_error)
  how = fmeta.first_order() if config.first_order else fmeta.gradients.plain
  inner = fmeta.finetune(loss, optim.sgd(config.inner_lr), value_and_grad=how)
  meta_loss = fmeta.episode_loss(inner, loss, config.inner_steps)
  return train_and_test(
    config,
    context,
    meta_loss,
    start(config, model, 1),
    lambda steps: fmeta.predict_episodes(inner, model_forward, steps),
  )


def start(config: Config, model: Mlp, inputs: int) -> Any:
  """Fresh parameters of a network that reads [B, inputs]."""
  example = {'x': np.zeros((1, inputs), np.float32)}
  return init(model, jax.random.key(config.seed.init), example, ('x',))[0]


def train_and_test(
  config: Config,
  context: Context,
  meta_loss: fmeta.LossFn,
  params: Any,
  predict_after: Callable[[int], Callable],
) -> dict:
  """Meta-trains, then measures the error after each number of steps.

  Args:
    config: of the task.
    context: of the job.
    meta_loss: of meta-batches.
    params: where the outer loop starts.
    predict_after: `inner steps -> predict function of episodes`.
  """
  require(config, LEAST, ('inner_lr', 'outer_lr'))
  learner = fmeta.finetune(meta_loss, optim.adam(config.outer_lr))
  episodes = sinusoids(
    config.seed.data, config.meta_batch, config.shots, config.queries
  )
  fitted = train.fit(
    learner,
    learner.init(params, jax.random.key(config.seed.init)),
    [train.Stage('meta', episodes, config.iterations)],
    jax.random.key(config.seed.train),
    steps_per_dispatch=500,
    log_every=100,
    checkpoint_every=10_000,
    **fit_options(context),
  )
  metrics, ci95, scores = {}, {}, {}
  tested_on = (
    f'{config.test_tasks} tasks of seed {config.seed.data + 1}, {config.shots} '
    'points'
  )
  for steps in config.test_steps:
    errors = test_errors(config, predict_after(steps), fitted.params)
    name = f'mse_{steps}'
    metrics[name], ci95[name], _ = evaluate.summarize(errors)
    scores[name] = Scores(errors, tested_on)
    print(f'mean squared error after {steps} steps: {metrics[name]:.3f}')
  first = episodes(0)
  return {
    'metrics': metrics,
    'ci95': ci95,
    'scores': scores,
    'steps': fitted.steps,
    'examples_per_second': fitted.examples_per_second,
    'flops_per_step': fitted.flops_per_step,
    'peak_bytes': fitted.peak_bytes,
    'trainable_parameters': fmeta.tree.size(fitted.state.trainable),
    'total_parameters': fmeta.tree.size(fitted.params),
    # Tasks are drawn without end; the first meta-batch stands for the rule.
    'data_sha256': data.fingerprint(
      {**first['support'], **{f'q_{k}': v for k, v in first['query'].items()}}
    ),
  }


def test_errors(config: Config, predict: Callable, params: Any) -> np.ndarray:
  """Mean squared error of each held-out task."""
  tasks = min(100, config.test_tasks)
  held_out = sinusoids(config.seed.data + 1, tasks, config.shots, 100)
  answer, errors = jax.jit(predict), []
  for i in range(-(-config.test_tasks // tasks)):
    episode = held_out(i)
    outputs = np.asarray(answer(params, episode, None))
    square = (outputs - episode['query']['target']) ** 2
    errors.append(square.mean((1, 2)))
  return np.concatenate(errors)[: config.test_tasks]
