"""What a run started from and how fast it moved, kept beside its model.

`explain.json` in a workdir holds it; an experiment writes it with `save` when
it saves its model. With it a finished run explains itself.
"""

import os
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import jax

from fmeta import blocks as blocks_of
from fmeta import tree
from fmeta.blocks import Blocks
from fmeta.errors import UsageError
from fmeta.pretrained import load_bert
from fmeta.types import Params
from fmeta.workdir import read_json, write_json

RECIPE = 'explain.json'


class Recipe(NamedTuple):
  """How a model was fine-tuned.

  Attributes:
    source: of the pre-trained weights, see `fmeta.pretrained.find`.
    seed: of the key that drew the fresh head.
    rates: the schedule, one rate per step that was taken.
    multipliers: ordered `(pattern, multiplier)` of the rates; a pattern that
      was frozen has 0.
  """

  source: str
  seed: int
  rates: tuple[float, ...] = ()
  multipliers: tuple[tuple[str, float], ...] = (('.*', 1.0),)


def save(workdir: str | os.PathLike, recipe: Recipe) -> None:
  """Writes `explain.json`, all of it or nothing."""
  write_json(pathlib.Path(workdir) / RECIPE, recipe._asdict())


def load(workdir: str | os.PathLike) -> Recipe | None:
  """The recipe of a run; None if it left none.

  Raises:
    UsageError: if the file is broken.
  """
  path = pathlib.Path(workdir) / RECIPE
  if not path.exists():
    return None
  stored = read_json(path)
  try:
    return Recipe(
      str(stored['source']),
      int(stored['seed']),
      tuple(map(float, stored['rates'])),
      tuple((str(p), float(m)) for p, m in stored['multipliers']),
    )
  except (KeyError, TypeError, ValueError) as error:
    raise UsageError(
      f'{path} is no recipe ({error!r}); give the start with --start=SOURCE '
      'after removing it'
    ) from error


def start_of(recipe: Recipe, num_classes: int) -> Params:
  """The parameters before the first step: published body, fresh head.

  Raises:
    UsageError: if the source is not to be found.
  """
  key = jax.random.key(recipe.seed)
  return load_bert(recipe.source, num_classes, key)[1]


def block_multipliers(
  multipliers: Sequence[tuple[str, float]], params: Params, blocks: Blocks
) -> dict[str, float]:
  """Mean multiplier of each block's parameters.

  Parameters that no pattern covers were frozen: 0.
  """
  names = tree.names(params)
  owner = blocks_of.assign(blocks, names)
  total, size = dict.fromkeys(blocks, 0.0), dict.fromkeys(blocks, 0)
  for name, leaf in zip(names, jax.tree.leaves(params), strict=True):
    if name in owner:
      index = tree.first_match(name, multipliers)
      value = 0.0 if index is None else multipliers[index][1]
      total[owner[name]] += value * leaf.size
      size[owner[name]] += leaf.size
  return {name: total[name] / size[name] for name in blocks}
