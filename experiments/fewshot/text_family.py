"""An inner learner of the few-shot text tables, and how it is tested."""

import re
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import fmeta
from experiments.common import best_setting
from experiments.fewshot.text_task import Bench
from fmeta import episodes, fewshot, optim, train, tree


class Family:
  """One inner learner and the program that tests it, for several rows.

  Outer parameters are `{'model', 'hyper'}`; `hyper` holds the logarithm of
  each moving leaf's inner rate, so rows with given and with learned rates
  share everything, and test-time rates are an argument.

  Args:
    bench: its model, not its classes.
    tuning: what the inner loop moves.
    rates: ordered `(pattern, inner rate)` of what moves.
    birth: `(params, key) -> params` adds leaves, such as LoRA's factors.
    begin: where each task starts, see `fewshot.starting_from`.
  """

  def __init__(
    self,
    bench: Bench,
    tuning: fmeta.Tuning,
    rates: tree.Patterns,
    birth: Callable[[Any, jax.Array], Any] = lambda params, key: params,
    begin: fewshot.Start | None = None,
  ):
    self.bench, self.tuning, self.rates = bench, tuning, rates
    self.birth, self.begin = birth, begin
    self.predict = jax.jit(self._curve)

  def start(self, seed: int) -> dict:
    """Outer parameters before meta-training."""
    key = jax.random.key(self.bench.config.seed.init + seed)
    model = self.birth(self.bench.start, key)

    def log_rate(name, leaf):
      del leaf
      index = tree.first_match(name, self.rates)
      return jnp.log(list(self.rates)[index][1])

    moving = self.moving(model)
    return {'model': model, 'hyper': tree.map_with_name(log_rate, moving)}

  def moving(self, model: Any) -> Any:
    """The leaves that the inner loop moves."""
    return self.tuning.init(model, jax.random.key(0))[0]

  def inner(self, value_and_grad=fmeta.gradients.plain):
    """`hyper -> learner`: SGD with a rate per leaf."""

    def learner(hyper):
      rates = [
        (re.escape(name), jnp.exp(tree.get(hyper, name)))
        for name in tree.names(hyper)
      ]
      return fmeta.finetune(
        self.bench.loss,
        optim.sgd(1.0, multipliers=rates),
        tuning=self.tuning,
        value_and_grad=value_and_grad,
      )

    return learner

  def loss(self, value_and_grad=fmeta.gradients.plain) -> fmeta.LossFn:
    """MAML's objective."""
    bench = self.bench
    loss = fmeta.episode_loss(
      self.inner(value_and_grad), bench.loss, bench.config.inner_steps
    )
    if self.begin is None:
      return loss
    return fewshot.starting_from(self.begin, loss)

  def _curve(self, params, batch):
    """Query logits [tasks, steps, queries, ways] after each of `test_steps`."""
    learner = self.inner()(params['hyper'])
    steps = self.bench.config.test_steps

    def one(episode):
      key, begun = jax.random.key(0), params
      if self.begin is not None:
        begun = self.begin(params, {}, episode['support'], None)
      state, outputs = learner.init(begun['model'], key), []
      for more in np.diff((0, *steps)):
        state, _ = fmeta.adapt(
          learner, state, lambda _: episode['support'], key, num_steps=int(more)
        )
        with learner.using(state) as adapted:
          outputs.append(
            self.bench.classify(adapted, {}, episode['query'], None)[0]
          )
      return jnp.stack(outputs)

    return jax.vmap(one)(batch)

  def correct(
    self, params: Any, batches: Iterable[episodes.Episode], factor: float
  ) -> np.ndarray:
    """Right or not [episodes, steps, queries], inner rates times `factor`."""
    shift = jnp.log(factor)
    hyper = jax.tree.map(lambda rate: rate + shift, params['hyper'])
    params, rights = {**params, 'hyper': hyper}, []
    for batch in batches:
      predicted = np.asarray(self.predict(params, batch)).argmax(-1)
      rights.append(predicted == batch['query']['label'][:, None])
    return np.concatenate(rights)


def cost_of(fitted: train.Fitted) -> dict[str, Any]:
  """What meta-training took, JSON-ready."""
  keys = ('steps', 'examples_per_second', 'flops_per_step', 'peak_bytes')
  return {key: getattr(fitted, key) for key in keys}


def choose_and_test(
  family: Family, bench: Bench, params: Any, *, controls: bool = False
) -> dict[str, Any]:
  """Chooses inner rates and steps on validation episodes, then tests.

  Args:
    family: the inner learner.
    bench: whose classes are meant.
    params: `{'model', 'hyper'}`, meta-trained or not.
    controls: also tests with shuffled labels.
  """
  config, params = bench.config, bench.for_test(params)
  validation, test = bench.held_out('validation'), bench.held_out('test')

  def scores(batches, factor):
    return bench.scored(family.correct(params, batches, factor))

  tried = {
    f'{factor:g} x rate, {steps} steps': float(value)
    for factor in config.rate_factors
    for steps, value in zip(
      config.test_steps,
      scores(validation, factor).mean(0),
      strict=True,
    )
  }
  chosen = best_setting(tried)
  place = list(tried).index(chosen)
  factor = config.rate_factors[place // len(config.test_steps)]
  curve = scores(test, factor)
  column = place % len(config.test_steps)
  shuffled = {}
  if controls:
    right = scores(bench.controls(), factor)
    shuffled = {'shuffled': right[:, column].tolist()}
  return {
    'tried': tried,
    'setting': chosen,
    'correct': curve[:, column].tolist(),
    'curve': curve.T.tolist(),
    **shuffled,
    'trainable': tree.size(family.moving(params['model'])),
  }
