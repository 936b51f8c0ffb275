"""The relation network: comparing is learned, too."""

from typing import Any

import chex
import jax
import jax.numpy as jnp

from fmeta.errors import UsageError
from fmeta.fewshot.heads import (
  Head,
  check_task,
  members,
  product,
  without_absent,
)
from fmeta.types import Array, Params


def relation(params: Params) -> Head:
  """The relation network's head: a small network compares query and class.

    l_k(q) = w' relu(V [s_k, q] + u) + b,   s_k = sum of the rows of class k

  (Sung et al. 2018, https://arxiv.org/abs/1711.06025, eqs. 1 and 2, and
  their fully connected layers; the embedding keeps the convolutions.) The
  paper's score is sigmoid(l): train with `relation_error`.

  Args:
    params: from `relation_init`; they are learned, so give
      `Learned(relation)` to `head_loss`.
  """

  def head(support, labels, queries, ways, weight=None):
    check_task(support, labels, queries, weight)
    member, present = members(labels, ways, weight, support.dtype)
    sums = product(member.T, support)
    hidden, score = params['hidden'], params['score']
    # V [s, q] = V_1 s + V_2 q: no pair is formed before the hidden layer.
    of_class, of_query = jnp.split(hidden['kernel'], 2)
    pairs = product(queries, of_query)[:, None] + product(sums, of_class)[None]
    active = jax.nn.relu(pairs + hidden['bias'][None, None])
    logits = product(active, score['kernel'])[..., 0] + score['bias'][0]
    return without_absent(logits, present)

  return head


def relation_init(rng: Array, features: int, hidden: int = 8) -> Params:
  """Parameters of `relation`, LeCun normal kernels and zero biases.

  Args:
    rng: `jax.random.key`.
    features: D, of the embedding.
    hidden: units; 8 as in the paper's figure 4.

  Raises:
    UsageError: if there are no features or no units.
  """
  if min(features, hidden) < 1:
    raise UsageError(
      f'{features} features and {hidden} hidden units compare nothing; give at '
      'least 1 of each'
    )
  keys = jax.random.split(rng)
  draw = jax.nn.initializers.lecun_normal()
  return {
    'hidden': {
      'kernel': draw(keys[0], (2 * features, hidden)),
      'bias': jnp.zeros(hidden),
    },
    'score': {'kernel': draw(keys[1], (hidden, 1)), 'bias': jnp.zeros(1)},
  }


def relation_error(
  outputs: Array, batch: Any
) -> tuple[Array, dict[str, Array]]:
  """sum_k (sigmoid(l_k) - [k = label])^2 and the accuracy, per query.

  (Sung et al. 2018, eq. 3, whose authors prefer it to cross entropy.)

  Args:
    outputs: logits [Q, ways].
    batch: `label` [Q].
  """
  label = batch['label']
  chex.assert_rank([outputs, label], [2, 1])
  target = jax.nn.one_hot(label, outputs.shape[-1], dtype=outputs.dtype)
  # sigmoid(-inf) = 0: an absent class adds nothing.
  error = jnp.sum((jax.nn.sigmoid(outputs) - target) ** 2, axis=-1)
  correct = (outputs.argmax(-1) == label).astype(error.dtype)
  return error, {'accuracy': correct}
