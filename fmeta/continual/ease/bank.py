"""Adapters of all tasks side by side, a part of the parameters.

Leaves of the bank bear names of their own, `<name>.banked`, so a model that is
run on the same parameters does not take them for adapters that it shall enter.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from fmeta import tree
from fmeta.adapters import siblings
from fmeta.errors import UsageError
from fmeta.penalty.leaves import own
from fmeta.types import Array, Batch, Forward, ModelState, Params, TrainState

KEY = 'ease'
BANKED = '.banked'


def new_bank(
  moving: Params,
  start: Params,
  model_state: ModelState,
  sums: Mapping[str, Array],
  tasks: int,
) -> dict[str, Any]:
  """The bank before the first task's end.

  Args:
    moving: the leaves that are kept of each task.
    start: trainable leaves that a task begins with as they are now.
    model_state: of the model, kept and begun with likewise.
    sums: `sum` [C, D] and `count` [C] of no rows.
    tasks: T.
  """
  return {
    'adapters': _room(_hidden(moving), tasks),
    'model_state': _room(model_state, tasks),
    'sum': _room(sums['sum'], tasks),
    'rows': _room(sums['count'], tasks),
    'done': jnp.zeros((), jnp.int32),
    'start': own(_hidden(start)),
    'start_state': own(model_state),
  }


def banked(
  bank: Mapping[str, Any], moving: Params, model_state: ModelState
) -> dict[str, Any]:
  """The bank with one more adapter."""

  def put(room, now):
    return room.at[bank['done']].set(now)

  return {
    **bank,
    'adapters': jax.tree.map(put, bank['adapters'], _hidden(moving)),
    'model_state': jax.tree.map(put, bank['model_state'], model_state),
    'done': bank['done'] + 1,
  }


def start_of(bank: Mapping[str, Any], frozen: Params) -> Params:
  """The parameters that every task begins with, adapters not yet born."""
  return tree.combine(frozen, _shown(bank['start']))


def of(params: Params) -> dict[str, Any]:
  """The bank among the parameters.

  Raises:
    UsageError: if there is none.
  """
  if KEY not in params:
    raise UsageError(
      f'the parameters have no {KEY!r} but {sorted(params)}; give those of '
      'learner.params(state) with learner = ease(...)'
    )
  return params[KEY]


def without(params: Params) -> dict[str, Any]:
  """The parameters of the model alone."""
  return {key: value for key, value in params.items() if key != KEY}


def bare(state: TrainState) -> TrainState:
  """The state as the learner inside knows it."""
  return state.replace(frozen=without(state.frozen))


def with_bank(state: TrainState, bank: Mapping[str, Any]) -> TrainState:
  """The inverse of `bare`."""
  return state.replace(frozen={**state.frozen, KEY: bank})


def subspaces(embed: Forward, params: Params, batch: Batch) -> Array:
  """Features [T, B, D] by every banked adapter, in evaluation mode.

  Those of adapters to come are zero and cost no pass of the model.
  """
  bank, base = of(params), without(params)

  def one(adapter, model_state):
    return embed(tree.combine(base, adapter), model_state, batch, None)[0]

  held = _shown(bank['adapters']), bank['model_state']
  features = jax.eval_shape(one, *jax.tree.map(lambda x: x[0], held))

  def visit(numbered):
    index, mine = numbered
    return jax.lax.cond(
      index < bank['done'],
      lambda: one(*mine),
      lambda: jnp.zeros(features.shape, features.dtype),
    )

  return jax.lax.map(visit, (jnp.arange(len(bank['rows'])), held))


def _room(leaves: Any, tasks: int) -> Any:
  return jax.tree.map(
    lambda x: jnp.zeros((tasks, *jnp.shape(x)), jnp.result_type(x)), leaves
  )


def _hidden(leaves: Params) -> dict[str, Any]:
  pairs = zip(tree.names(leaves), jax.tree.leaves(leaves), strict=True)
  return siblings.grow({}, {name + BANKED: leaf for name, leaf in pairs})


def _shown(leaves: Params) -> dict[str, Any]:
  return siblings.grow({}, siblings.collect(leaves, BANKED))
