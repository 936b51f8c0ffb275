"""What moves: full fine-tuning and any selection of parameters.

A tuning splits the parameters before anything is differentiated, so a frozen
leaf costs no gradient, no optimiser state and no share of a clipping norm.
"""

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from fmeta import tree
from fmeta.types import ModelState, Params, Tuning, merged


def is_moving(
  path: Sequence[str], moving: Sequence[str], still: Sequence[str]
) -> bool:
  """Whether the module at `path` belongs to what is trained.

  A module without parameters of its own follows the nearest module around it
  that has some.

  Args:
    path: names from the outermost module to this one.
    moving: names of the trainable leaves.
    still: names of the frozen leaves.
  """
  path = list(path)
  while path:
    prefix = '/'.join(path) + '/'
    if any(leaf.startswith(prefix) for leaf in moving):
      return True
    if any(leaf.startswith(prefix) for leaf in still):
      return False
    path.pop()
  return bool(moving)


def keep_under(
  old: ModelState, new: ModelState, trainable: Params, frozen: Params
) -> ModelState:
  """Lets a statistic move only when its module has a trainable parameter.

  See `is_moving`. Leaves of `old` and `new` are named
  `<collection>/<module path>/<statistic>`.
  """
  if not frozen or not new:
    return new
  moving, still = tree.names(trainable), tree.names(frozen)

  def moves(name):
    return is_moving(name.split('/')[1:-1], moving, still)

  return tree.map_with_name(
    lambda name, before, after: after if moves(name) else before, old, new
  )


@contextmanager
def run_frozen_norms(
  merge, trainable: Params, frozen: Params
) -> Iterator[Params]:
  """Runs on the merged parameters; a frozen BatchNorm uses running statistics.

  Freezing only the scale and bias would leave the layer normalising by the
  batch, which is another function of its input than the pre-trained one.
  """
  from fmeta import adapters  # the only module that knows flax.linen

  with adapters.running_statistics(trainable, frozen):
    yield merge(trainable, frozen)


def full() -> Tuning:
  """Every parameter moves."""
  return Tuning(
    init=lambda params, rng: (params, {}),
    merge=lambda trainable, frozen: trainable,
    keep=keep_under,
    intercept=functools.partial(merged, lambda trainable, frozen: trainable),
  )


def select(*patterns: str) -> Tuning:
  """Only parameters whose whole name matches one of the patterns move.

  `select('head/.*')` is a linear probe, `select('body/block_0/.*', 'head/.*')`
  surgical fine-tuning (Lee et al. 2022, https://arxiv.org/abs/2210.11466),
  `select('.*/bias')` BitFit.

  Args:
    *patterns: regular expressions, full match on `a/b/c` names.

  Raises:
    UsageError: at `init`, if a pattern matches no parameter.
  """

  def init(params, rng):
    del rng
    tree.check_patterns(patterns, tree.names(params))
    pairs = [(pattern, None) for pattern in patterns]
    return tree.partition(
      params, lambda name: tree.first_match(name, pairs) is not None
    )

  return Tuning(
    init=init,
    merge=tree.combine,
    keep=keep_under,
    intercept=functools.partial(run_frozen_norms, tree.combine),
  )
