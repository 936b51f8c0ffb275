"""Prompt tuning: trained embeddings before the input.

The leaf stands beside the table of words, `embedding.prompt`.
"""

from collections.abc import Mapping

import jax

from fmeta import tree
from fmeta.adapters import entry, siblings
from fmeta.errors import UsageError
from fmeta.types import Array, Params, Tuning

PROMPT = '.prompt'
SUFFIXES = (PROMPT,)


def prompt_init(params: Params, rng: Array, pattern: str, length: int) -> dict:
  """The parameters with a prompt beside the matching table.

  It starts as rows drawn uniformly from the table (Lester et al. 2021,
  section 3.2, draw from the 5,000 most common words).

  Args:
    params: full parameters; the matching table is [words, size].
    rng: key of the draw.
    pattern: full-match regular expression of the one table.
    length: of the prompt; 0 leaves the model as it is.

  Raises:
    UsageError: if the pattern matches no or several leaves, the leaf is no
      table, or the length is negative.
  """
  if length < 0:
    raise UsageError(f'prompt of length {length}; give at least 0')
  names = siblings.owners(params, (pattern,))
  table = tree.get(params, names[0]) if len(names) == 1 else None
  if table is None or table.ndim != 2:
    raise UsageError(
      f'prompt needs one table [words, size], but {pattern!r} matches '
      f'{len(names)} leaves, first {names[:1]}; narrow the pattern'
    )
  key = siblings.key_for(rng, names[0])
  rows = jax.random.randint(key, (length,), 0, table.shape[0])
  return siblings.grow(params, {names[0] + PROMPT: table[rows]})


def enter(leaves: entry.Leaves, shapes: Mapping) -> entry.Interceptor:
  """Answers the model's hook `prompt`; see `entering`."""
  del shapes
  ((owner, leaf),) = leaves[PROMPT].items()
  # The table's module lies in the one that puts embeddings together.
  place = siblings.module_path(siblings.module_path(owner))

  def interceptor(next_fun, args, kwargs, context):
    here = '/'.join(context.module.path) == place
    if context.method_name != 'prompt' or not here:
      return next_fun(*args, **kwargs)
    return entry.note(owner + PROMPT, leaf)

  return interceptor


def prompt(
  pattern: str = '.*/embeddings/word/embedding',
  *,
  length: int = 20,
  also: tuple[str, ...] = (),
) -> Tuning:
  """Prompt tuning: `length` trained embeddings before those of the words.

    [P; E(x)] -> the model

  (Lester et al. 2021, https://arxiv.org/abs/2104.08691, section 2.) The
  prompt takes the first positions and the first segment, is never padding,
  and has no share in the pooled vector; 'cls' still pools the row's own first
  token. `merge` gives the parameters with the prompt, which `models.forward`
  and `adapters.entering` run. Models answer through a method `prompt`; see
  `fmeta/models/bert_layers.py`.

  Args:
    pattern: full-match regular expression of the table of words; the default
      is our BERT's.
    length: of the prompt; 20, beyond which the paper saw marginal gains
      (section 3.2).
    also: patterns of ordinary parameters that move too, such as a new head.

  Raises:
    UsageError: as `prompt_init`, or, in the first step, if the model has no
      place for a prompt.
  """

  def born(params, rng):
    return prompt_init(params, rng, pattern, length)

  return entry.entering_tuning(born, SUFFIXES, also)
