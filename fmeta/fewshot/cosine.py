"""Baseline++: a classifier by cosine, for training and for adapting."""

import jax.numpy as jnp

from fmeta.baselines import unit_length
from fmeta.types import Forward, Scalar


def cosine_classifier(
  embed: Forward, scale: Scalar = 2.0, head: str = 'head'
) -> Forward:
  """A classifier whose logits are cosines with one vector per class.

    l_k(x) = s cos(f(x), w_k)

  (Chen et al. 2019, https://arxiv.org/abs/1904.04232, section 3.2.) Train it
  on all base classes with plain `finetune`; then put a new kernel for the
  episode's ways under `head` and adapt that alone:

    predict_episodes(
      finetune(supervised(classifier, ...), sgd, tuning=select('head/.*')),
      classifier, num_steps=100)

  Args:
    embed: gives embeddings [B, D] from the other parameters.
    scale: s; 2 in the authors' code for up to 200 classes, 10 above.
    head: the parameters' key for `{'kernel': [D, classes]}`.
  """

  def run(params, model_state, batch, rng):
    body = {k: v for k, v in params.items() if k != head}
    rows, model_state = embed(body, model_state, batch, rng)
    vectors = unit_length(params[head]['kernel'].T)
    cosine = jnp.matmul(unit_length(rows), vectors.T, precision='highest')
    return scale * cosine, model_state

  return run
