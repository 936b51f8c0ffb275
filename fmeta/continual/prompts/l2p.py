"""Learning to prompt: each example picks prompts from one pool.

Task-free: nothing here knows of tasks.
"""

import jax
import jax.numpy as jnp

from fmeta import tree
from fmeta.adapters import entry, siblings
from fmeta.adapters.prompt import PROMPT, prompt_init
from fmeta.continual.prompts.chosen import (
  first_of,
  matching_loss,
  only_leaf,
  run_with,
)
from fmeta.continual.prompts.query import cosines, query_of
from fmeta.errors import UsageError
from fmeta.losses import Criterion
from fmeta.types import Forward, LossFn, Scalar, Tuning

POOL, KEYS = '.pool', '.pool_keys'
SUFFIXES = (POOL, KEYS)


def l2p_tuning(
  pattern: str = '.*/embeddings/word/embedding',
  *,
  size: int,
  length: int,
  query_size: int | None = None,
  also: tuple[str, ...] = (),
) -> Tuning:
  """A pool of prompts, each with a key, beside the table of words.

  Leaves `<table>.pool` [size, length, H], rows drawn from the table as
  `adapters.prompt` draws them, and `<table>.pool_keys` [size, query_size],
  standard normal (only their direction counts). The model is run by
  `l2p_forward`; a forward pass that does not know the pool leaves it out.

  Args:
    pattern: full-match regular expression of the table of words; the default
      is our BERT's.
    size: prompts in the pool.
    length: of each; 0 leaves the model as it is.
    query_size: of the query; that of an embedding by default.
    also: patterns of ordinary parameters that move too, such as a new head.

  Raises:
    UsageError: if the pool is empty, or as `adapters.prompt_init`.
  """
  if size < 1:
    raise UsageError(f'a pool of {size} prompts; give at least 1')

  def born(params, rng):
    grown = prompt_init(params, rng, pattern, size * length)
    owner, rows = only_leaf(grown, PROMPT)
    width = query_size or rows.shape[-1]
    key = siblings.key_for(rng, owner + KEYS)
    leaves = {
      owner + POOL: rows.reshape(size, length, rows.shape[1]),
      owner + KEYS: jax.random.normal(key, (size, width), rows.dtype),
    }
    return siblings.grow(params, leaves)

  return entry.entering_tuning(born, SUFFIXES, also)


def l2p_forward(forward: Forward, query: Forward, chosen: int) -> Forward:
  """The model with the prompts that each example picks.

    x -> [P_s1; ...; P_sN; E(x)],   s = the N largest cos(q(x), k_i)

  (Wang et al. 2022, https://arxiv.org/abs/2112.08654). Every example picks
  for itself, the nearest first, so the order and the size of a batch do not
  matter. The paper classifies the mean over the states of the prompts: that
  is a model with `pooling='prompt'`; 'mean' and 'cls' pool the text's own
  tokens.

  The paper's variant that keeps to seldom used prompts while training needs
  counts per task, and is not here.

  Args:
    forward: of parameters that `l2p_tuning` grew.
    query: gives [B, D] of the parameters without prompts, see `query`.
    chosen: N.

  Raises:
    UsageError: in a step, if N is not 1 to the pool's size, or the query's
      size is not that of the keys.
  """
  return first_of(_picking(forward, query, chosen))


def l2p_loss(
  forward: Forward,
  query: Forward,
  criterion: Criterion,
  *,
  chosen: int,
  strength: Scalar,
) -> LossFn:
  """L2P's objective: keys are pulled to the queries that pick them.

    criterion + strength * sum_{i picked} (1 - cos(q(x), k_i))

  as a mean over rows (Wang et al. 2022, https://arxiv.org/abs/2112.08654).
  Only the picked prompts and their keys get a gradient; picking has none.

  Args:
    forward: as for `l2p_forward`.
    query: likewise.
    criterion: of the model's outputs.
    chosen: prompts per example.
    strength: lambda; may be traced.
  """
  return matching_loss(_picking(forward, query, chosen), criterion, strength)


def _picking(forward: Forward, query: Forward, chosen: int) -> Forward:
  """Gives `(outputs, distance [B])`."""

  def run(params, model_state, batch, rng):
    owner, pool = only_leaf(params, POOL)
    if not 1 <= chosen <= len(pool):
      raise UsageError(
        f'chosen={chosen} of a pool of {len(pool)}; give 1 to {len(pool)}'
      )
    base = siblings.without(params, SUFFIXES)
    asked = query_of(query, base, model_state, batch)
    match = cosines(asked, tree.get(params, owner + KEYS))
    _, picked = jax.lax.top_k(jax.lax.stop_gradient(match), chosen)
    distance = (1 - jnp.take_along_axis(match, picked, axis=1)).sum(1)
    _, length, width = pool.shape
    mine = pool[picked].reshape(len(picked), chosen * length, width)
    out, model_state = run_with(
      forward, {owner + PROMPT: mine}, SUFFIXES, params, model_state, batch, rng
    )
    return (out, distance), model_state

  return run
