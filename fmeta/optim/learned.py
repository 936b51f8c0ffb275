"""Layer-wise rates as numbers that a meta-gradient can move.

A rate is positive and what matters is its order of magnitude, so its
logarithm is what is learned. The policy is one vector over ordered patterns:

  def inner(logs):
    return finetune(loss, sgd(1.0, multipliers=learned_rates(PATTERNS, logs)))

  meta_loss = episode_loss(inner, loss, num_steps)  # of {'model', 'hyper'}
  outer = finetune(meta_loss, adam(0.1), tuning=select('hyper'))

moves the rates and leaves the pre-trained start where it is. Afterwards
`plain_rates` gives the ordinary list back:

  rates = plain_rates(learned_rates(PATTERNS, fitted.params['hyper']))
  finetune(loss, sgd(1.0, multipliers=rates))
"""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from fmeta import tree
from fmeta.errors import UsageError
from fmeta.types import Array


def learned_rates(patterns: Sequence[str], logs: Array) -> tree.Patterns:
  """Multipliers with learnable logarithms, m_k = exp(l_k).

  Li et al. 2017 (https://arxiv.org/abs/1707.09835, section 3) learn a rate per
  weight, Antoniou et al. 2018 (https://arxiv.org/abs/1810.09502, section 4)
  one per layer and step; this is one per pattern, for all steps.

  Args:
    patterns: ordered regular expressions; they must cover what is trained.
    logs: [len(patterns)] natural logarithms; may be traced.

  Raises:
    UsageError: if there is not one logarithm per pattern.
  """
  given = np.shape(logs)
  if given != (len(patterns),):
    raise UsageError(
      f'logs of shape {given} for {len(patterns)} patterns; give '
      f'[{len(patterns)}]'
    )
  rates = jnp.exp(logs)
  return tuple((pattern, rates[k]) for k, pattern in enumerate(patterns))


def plain_rates(rates: tree.Patterns) -> tuple[tuple[str, float], ...]:
  """The same list with Python floats: it prints, it is JSON, it is constant.

  Args:
    rates: ordered `(pattern, scalar)` pairs; not traced.
  """
  return tuple((pattern, float(rate)) for pattern, rate in rates)


def moving(rates: tree.Patterns, share: float) -> tuple[str, ...]:
  """Patterns whose rate is at least `share` of the largest one.

  What a policy hardly moves need not move: `select(*moving(...))` freezes
  it, so it also costs nothing. A share of rates is a share of movement only
  where steps do not depend on the gradient's scale, as with Adam.

  Args:
    rates: ordered `(pattern, scalar)` pairs, of leaves that one compares: a
      fresh head's rate says nothing about a body's.
    share: in [0, 1].

  Raises:
    UsageError: if `share` is out of range or there are no rates.
  """
  if not rates or not 0 <= share <= 1:
    raise UsageError(
      f'share={share} of {len(rates)} rates; give a share in [0, 1] and at '
      'least one rate'
    )
  least = share * max(float(rate) for _, rate in rates)
  return tuple(pattern for pattern, rate in rates if float(rate) >= least)
