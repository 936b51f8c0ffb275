"""One search over an MLP on digits: what all rows of `search_digits` share."""

from collections.abc import Callable
from typing import Any

import jax

import fmeta
from fmeta import data, evaluate, models, optim, search
from fmeta.datasets import digits
from fmeta.search.halving import num_steps
from fmeta.workdir import Context


class Bench:
  """Data, model and the programs that all rows and seeds share."""

  def __init__(self, config: Any, context: Context):
    self.config, self.context = config, context
    splits = digits.load(context.data_dir)
    # By rank, like the test split: neighbours tend to share their writer.
    count = config.train_examples
    self.train = data.take(splits['train'], slice(0, count))
    held_out = data.take(splits['train'], slice(count, None))
    self.test = splits['test']
    self.module = models.Mlp((config.hidden,), 10)
    self.forward = models.forward(self.module, ('image',))
    loss = fmeta.supervised(self.forward, fmeta.softmax_cross_entropy)
    self.learner = self._learner_of(loss)
    self.trials = search.Trials(self.learner)
    validation = data.eval_batches(held_out, len(held_out['label']))
    self.score = search.validation(self.trials, loss, validation)

  def _learner_of(self, loss) -> Callable[[Any], fmeta.Learner]:
    def learner(hyper):
      rates = (('head/.*', hyper['head']), ('.*', 1.0))
      optimizer = optim.adamw(
        hyper['rate'], weight_decay=hyper['decay'], multipliers=rates
      )
      return fmeta.finetune(loss, optimizer)

    return learner

  def box(self) -> dict[str, tuple[float, float]]:
    """What is searched, and between which ends."""
    config = self.config
    return {'rate': config.rate, 'decay': config.decay, 'head': config.head}

  def budget(self) -> int:
    """Training steps that a row may spend."""
    return self.config.trials * self.config.steps

  def afford(self, steps: int) -> int:
    """The steps, unless they are more than a row may spend.

    Raises:
      UsageError: if they are.
    """
    if steps > self.budget():
      raise fmeta.UsageError(
        f'a row of {steps} steps and a budget of {self.budget()} (trials x '
        'steps); lower halving_trials or ramp_steps'
      )
    return steps

  def test_correct(self, state: fmeta.TrainState) -> list[float]:
    """1.0 where the chosen model is right."""
    batches = data.eval_batches(self.test, len(self.test['label']))
    found = evaluate.evaluate(self.forward, state.trainable, {}, batches)
    return found.correct.tolist()


class Search:
  """One seed of one row."""

  def __init__(self, bench: Bench, seed: int, name: str):
    config = bench.config
    self.bench, self.number = bench, seed
    self.rng = jax.random.key(config.seed.train + seed)
    self.batches = data.batches(
      bench.train, config.batch_size, config.seed.data + seed
    )
    self.params, _ = models.init(
      bench.module,
      jax.random.key(config.seed.init + seed),
      bench.train,
      ('image',),
    )
    self.ledger = search.Ledger(
      bench.context.workdir / 'ledger' / name / f'seed_{seed}'
    )

  def draw(self, size: int, **narrower: tuple[float, float]) -> dict:
    """Random settings of this seed."""
    ranges = {**self.bench.box(), **narrower}
    return search.log_uniform(self.number, size, **ranges)

  def start(self, hyper) -> fmeta.TrainState:
    """All settings start from this seed's weights."""
    return self.bench.trials.init(self.params, hyper, self.rng)

  def halve(self, hyper, plan) -> search.Halved:
    """Trains settings through the rungs of a plan."""
    return search.halving(
      self.bench.trials,
      self.start(hyper),
      hyper,
      self.batches,
      self.rng,
      self.bench.score,
      plan,
      ledger=self.ledger,
    )

  def chosen(self, state, score: float, steps: int) -> dict:
    """What a row reports."""
    correct = self.bench.test_correct(state)
    return {'correct': correct, 'validation': score, 'steps': steps}

  def best_of(self, hyper, spent: int = 0) -> dict:
    """Trains all settings to the end and takes the best."""
    plan = [search.Rung(len(hyper['rate']), self.bench.config.steps)]
    steps = self.bench.afford(spent + num_steps(plan))
    found = self.halve(hyper, plan)
    return self.chosen(found.state, found.score, steps)
