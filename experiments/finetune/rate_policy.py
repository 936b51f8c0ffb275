"""A policy of layer-wise rates: learned over tasks, tested as a plain list.

`Policy` holds the two programs of `learned_rates.py`. One trains: the outer
loss is `episode_loss` around the very learner that is tested, and only the
logarithms of its rates move. The other fine-tunes each held-out task with the
rates it is given, as an ordinary `(pattern, rate)` list, and answers. All rows
of the table are lists, so each is compiled once.
"""

import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import fmeta
from experiments.common import placement
from experiments.finetune.rate_tasks import Tasks
from fmeta import optim, train, tree

HEAD = 'head/.*'
Rates = np.ndarray  # [patterns]


def patterns_of(params: Any, parts: Sequence[str]) -> tuple[str, ...]:
  """Groups from input to output: the parts of each layer, then the head."""
  found = (re.match(r'body/layer_(\d+)/', name) for name in tree.names(params))
  layers = sorted({int(match[1]) for match in found if match})
  body = [f'body/layer_{k}/{part}' for k in layers for part in parts]
  patterns = (*body, HEAD)
  tree.match(params, [(pattern, None) for pattern in patterns])
  return patterns


class Policy:
  """The fine-tuner of every row, and what its rates are learned with."""

  def __init__(self, tasks: Tasks):
    self.tasks, config = tasks, tasks.config
    self.patterns = patterns_of(tasks.start, config.parts)
    # A batched matmul of small ones is slower than one task after the other.
    self._over = fmeta.in_chunks(1)
    self._whole = self._program(fmeta.full())
    # A body that stays costs no gradient.
    self._probe = self._program(fmeta.select(HEAD))
    loss = fmeta.episode_loss(
      lambda logs: self.learner(optim.learned_rates(self.patterns, logs)),
      tasks.loss,
      config.inner_steps,
      over=self._over,
    )
    outer = optim.adam(optim.warmup_linear(config.outer_lr, config.iterations))
    self.program = train.Program(
      fmeta.finetune(loss, outer, tuning=fmeta.select('hyper'))
    )

  def learner(
    self, rates: tree.Patterns, tuning: fmeta.Tuning | None = None
  ) -> fmeta.Learner:
    """Plain fine-tuning with layer-wise rates: Adam, full batches.

    With eps_root, for it is differentiated; a rate of 0 is a frozen leaf.
    """
    adam = optax.scale_by_adam(eps_root=1e-8)
    optimizer = optim.with_rates(adam, 1.0, multipliers=rates)
    return fmeta.finetune(self.tasks.loss, optimizer, tuning=tuning)

  def _program(self, tuning: fmeta.Tuning):
    """Fine-tunes tasks with the rates in `hyper` and answers: compiled."""

    def inner(rates):
      return self.learner(list(zip(self.patterns, rates, strict=True)), tuning)

    steps = self.tasks.config.inner_steps
    return jax.jit(
      fmeta.predict_episodes(inner, self.tasks.classify, steps, over=self._over)
    )

  def uniform(self, rate: float, head: float) -> np.ndarray:
    """One rate for the body, one for the head: [patterns]."""
    return np.array([rate] * (len(self.patterns) - 1) + [head], np.float32)

  def decayed(self, rate: float, decay: float, head: float) -> np.ndarray:
    """Rates that shrink per layer away from the head: [patterns]."""
    parts = len(self.tasks.config.parts)
    layers = [f'{k}' for k in range(self.tasks.config.blocks)]
    factors = [m for _, m in optim.layerwise_decay(layers, decay)]
    return np.array([*np.repeat(factors, parts) * rate, head], np.float32)

  def learn(self, seed: int) -> train.Fitted:
    """Meta-trains the rates of one seed."""
    config, learner = self.tasks.config, self.program.learner
    start = self.uniform(config.start_rate, config.start_head)
    params = {'model': self.tasks.start, 'hyper': jnp.log(start)}
    return train.fit(
      learner,
      learner.init(params, jax.random.key(config.seed.init + seed)),
      [train.Stage('rates', self.tasks.training(seed), config.iterations)],
      jax.random.key(config.seed.train + seed),
      program=self.program,
      **placement(self.tasks.context),
    )

  def correct(self, rates: Rates, split: str, seed: int) -> np.ndarray:
    """Which queries are right after fine-tuning, [episodes, queries]."""
    params = {'model': self.tasks.start, 'hyper': jnp.asarray(rates)}
    predict, rights = self._whole if np.any(rates[:-1]) else self._probe, []
    for batch in self.tasks.held_out(split, seed):
      predicted = np.asarray(predict(params, batch, None)).argmax(-1)
      rights.append(predicted == batch['query']['label'])
    return np.concatenate(rights)
