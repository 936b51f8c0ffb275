"""DualPrompt: one prefix for all tasks, and one for each.

The general prompts are the leaves `.prefix` of `adapters.prefix`, the experts
have an axis of tasks, `.expert_prefix` [tasks, P, H].
"""

import jax
import jax.numpy as jnp

from fmeta.adapters import entry, siblings
from fmeta.adapters.prefix import PREFIX, prefix_init
from fmeta.continual.prompts.chosen import (
  first_of,
  leaves_of,
  matching_loss,
  only_leaf,
  run_with,
)
from fmeta.continual.prompts.query import cosines, query_of
from fmeta.continual.prompts.tasks import with_tasks
from fmeta.errors import UsageError
from fmeta.losses import Criterion
from fmeta.types import Forward, LossFn, Scalar, Tuning

EXPERT, KEYS = '.expert_prefix', '.expert_keys'
# The leaves [tasks, ...], for `of_this_task`.
DUAL_PROMPT = (EXPERT, KEYS)


def dual_prompt_tuning(
  *,
  general: tuple[str, ...],
  expert: tuple[str, ...],
  tasks: int,
  general_length: int,
  expert_length: int,
  query_size: int | None = None,
  also: tuple[str, ...] = (),
) -> Tuning:
  """A prefix for all tasks in some layers, one for each task in others.

    dual_prompt_tuning(
      general=('body/layer_[01]/attention/(key|value)/kernel',),
      expert=('body/layer_[234]/attention/(key|value)/kernel',),
      tasks=10, general_length=5, expert_length=20, also=('head/.*',),
    )

  Every prefix starts as `adapters.prefix_init` makes it. The keys, one for
  each task, are `<first expert kernel>.expert_keys` [tasks, query_size],
  standard normal (only their direction counts). The model is run by
  `dual_prompt_forward`.

  Args:
    general: full-match regular expressions of the kernels of keys and values
      whose attention has the general prompt; none: no such prompt.
    expert: of those with the task's own, in other layers.
    tasks: of the stream.
    general_length: of that prefix; the paper's L_g is twice it, half for keys
      and half for values.
    expert_length: likewise; 0 leaves those layers as they are.
    query_size: of the query; that of the kernels' inputs by default.
    also: patterns of ordinary parameters that move too, such as a new head.

  Raises:
    UsageError: without tasks, for a layer with both prompts, or as
      `adapters.prefix_init`.
  """
  if tasks < 1:
    raise UsageError(f'prompts for {tasks} tasks; give at least 1')

  def born(params, rng):
    owners = _experts(params, general, expert)
    leaves = _born_experts(params, rng, expert, tasks, expert_length)
    width = query_size or leaves[owners[0] + EXPERT].shape[-1]
    key = siblings.key_for(rng, owners[0] + KEYS)
    dtype = leaves[owners[0] + EXPERT].dtype
    leaves[owners[0] + KEYS] = jax.random.normal(key, (tasks, width), dtype)
    grown = siblings.grow(params, leaves)
    if not general:
      return grown
    return prefix_init(grown, rng, general, general_length)

  return entry.entering_tuning(born, (PREFIX, *DUAL_PROMPT), also)


def _experts(params, general, expert) -> list[str]:
  """The kernels with an expert prompt."""
  owners = siblings.owners(params, expert)
  both = set(owners) & set(siblings.owners(params, general))
  if both:
    raise UsageError(
      f'{min(both)!r} matches `general` and `expert`; give each layer one'
    )
  return owners


def _born_experts(params, rng, expert, tasks, length):
  """{name: [tasks, length, H]}."""

  def one(key):
    grown = prefix_init(params, key, expert, length)
    return siblings.collect(grown, PREFIX)

  stacked = jax.vmap(one)(jax.random.split(rng, tasks))
  return {owner + EXPERT: leaf for owner, leaf in stacked.items()}


def dual_prompt_forward(forward: Forward, query: Forward) -> Forward:
  """The model with the general prompt and the expert one of each example.

    softmax(q [P_k; K]' / sqrt(d)) [P_v; V]

  in every layer with a prompt (Wang et al. 2022,
  https://arxiv.org/abs/2204.04799, its prefix-tuning form; prompts stand
  beside projected keys and values, as in `adapters.prefix`). In training the
  expert of a row is that of its task; in evaluation that of the key nearest
  to the row's query by cosine, among the tasks that there have been.

  The task comes by the batch's `task` in training and never in evaluation,
  see `counting_tasks`; a task beyond the last has no expert and gives NaN.

  Args:
    forward: of parameters that `dual_prompt_tuning` grew.
    query: gives [B, D] of the parameters without prompts, see `query`.

  Raises:
    UsageError: in a step, if the query's size is not that of the keys, or
      nothing says the task.
  """
  return first_of(_matching(forward, query))


def dual_prompt_loss(
  forward: Forward, query: Forward, criterion: Criterion, strength: Scalar
) -> LossFn:
  """DualPrompt's objective: a task's key is pulled to its queries.

    criterion + strength * (1 - cos(q(x), k_t))

  as a mean over rows of task t (Wang et al. 2022,
  https://arxiv.org/abs/2204.04799). Experts and keys of other tasks get no
  gradient; that they do not move either takes `of_this_task`.

  Args:
    forward: as for `dual_prompt_forward`.
    query: likewise.
    criterion: of the model's outputs.
    strength: lambda; may be traced.
  """
  return matching_loss(_matching(forward, query), criterion, strength)


def _matching(forward: Forward, query: Forward) -> Forward:
  """Gives `(outputs, distance [B])`."""

  def run(params, model_state, batch, rng, told):
    _, keys = only_leaf(params, KEYS)
    bare = siblings.without(params, (PREFIX, *DUAL_PROMPT))
    asked = query_of(query, bare, model_state, batch)
    match = cosines(asked, keys)
    chosen = told.rows
    if chosen is None:
      there = jnp.arange(len(keys)) < told.seen
      chosen = jnp.where(there[None], match, -jnp.inf).argmax(1)
    near = jnp.take_along_axis(match, chosen[:, None], axis=1)[:, 0]
    mine = {
      owner + PREFIX: jnp.take(leaf, chosen, axis=0)
      for owner, leaf in leaves_of(params, EXPERT).items()
    }
    out, model_state = run_with(
      forward, mine, DUAL_PROMPT, params, model_state, batch, rng
    )
    return (out, 1 - near), model_state

  return with_tasks(run)
