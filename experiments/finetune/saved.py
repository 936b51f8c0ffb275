"""What a finished fine-tuning run leaves: its model, and how it came about."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from fmeta import data, optim, predict, pretrained
from fmeta.datasets import docparams
from fmeta.explain import recipe, text
from fmeta.train import Fitted

EXPLAINED = 500  # test texts kept for `python -m fmeta.explain` (untuned)


def save(
  bench: Any,
  multipliers: Sequence[tuple[str, float]],
  rate: float,
  seed: int,
  fitted: Fitted,
) -> None:
  """Writes `model/` for `fmeta.predict`, and beside it for `fmeta.explain`.

  Args:
    bench: of the experiment, see `methods.Bench`.
    multipliers: layer-wise rates.
    rate: the highest of the schedule.
    seed: of the run, counted from 0.
    fitted: what `fit` returned.
  """
  config, folder = bench.config, bench.context.workdir
  predict.save_run(
    folder,
    bench.module,
    fitted.params,
    pretrained.find(config.model),
    docparams.LABELS,
    config.max_length,
  )
  # The model kept is that of the best epoch; later steps were undone.
  steps = jnp.arange(fitted.best_step)
  rates = jax.vmap(optim.warmup_linear(rate, fitted.steps))(steps)
  told = recipe.Recipe(
    config.model,
    config.seed.init + seed,
    tuple(rates.tolist()),
    tuple(multipliers),
  )
  recipe.save(folder, told)
  test = data.take(bench.splits['test'], slice(0, EXPLAINED))
  labels = [docparams.LABELS[k] for k in test['label']]
  text.write_examples(folder / text.EXAMPLES, test['text'], labels)
