"""Continual backprop: the least useful hidden units are born again."""

import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fmeta import tree
from fmeta.continual.plasticity.activity import sizes_of
from fmeta.errors import UsageError
from fmeta.types import Array, Params, Scalar


class ContinualState(NamedTuple):
  """Of `continual_backprop`; the dicts have one entry per hidden layer.

  Attributes:
    inner: state of the wrapped optimiser.
    count: steps taken; it names the random draws.
    utility: [units] decaying averages, not corrected.
    age: [units] steps since birth.
    due: fraction of a unit that waits to be replaced.
  """

  inner: Any
  count: Array
  utility: dict[str, Array]
  age: dict[str, Array]
  due: dict[str, Array]


def continual_backprop(
  optimizer: optax.GradientTransformation,
  layers: Sequence[str],
  rng: Array,
  *,
  rate: Scalar = 1e-4,
  maturity: Scalar = 100,
  decay: Scalar = 0.99,
  kernel_init: Callable[..., Array] | None = None,
) -> optax.GradientTransformationExtraArgs:
  """An optimiser that also replaces hidden units of little utility.

  After each step, for hidden unit i of age a_i with outgoing weights w,

    u_i <- decay u_i + (1 - decay) mean|h_i| sum_k |w_ik|,   a_i <- a_i + 1.

  Of the n units with a_i > maturity, `rate * n` are due; whenever a whole unit
  is, those of least u_i / (1 - decay^a_i) are replaced: incoming weights are
  drawn anew, the bias and outgoing weights are zero, as are u_i, a_i, and the
  optimiser's slots of these weights are as at its start (Dohare et al. 2024,
  https://doi.org/10.1038/s41586-024-07711-7; the correction of u_i is that of
  the released code, which also moves the next layer's bias by what the
  unit contributed on average; this does not).

  The model reports mean|h| of the step's batch through `watched`:

    layers = ('body/layer_0', 'body/layer_1', 'head')
    loss = supervised(watched(forward, layers[:-1]), criterion)
    optimizer = continual_backprop(adam_per_entry(1e-3), layers, key)
    learner = finetune(loss, optimizer)
    state = learner.init(params, key, no_activity(params, layers[:-1]))

  Adam has one count for all entries and its first steps after a reset are
  three times too large: give `adam_per_entry`.

  Args:
    optimizer: any optax transformation.
    layers: paths of a chain of dense modules; each but the last is hidden and
      feeds the next. All must be trainable.
    rng: key of the draws.
    rate: share of mature units replaced per step; may be traced. 1e-4 and
      `decay` are the released code's defaults for one layer.
    maturity: least age, in steps; may be traced. 100 as in that code.
    decay: of the utility; may be traced.
    kernel_init: `(key, shape, dtype) -> kernel`; flax's of a Dense by default.

  Raises:
    UsageError: fewer than two layers; at `init`, if they are no chain; in a
      step, if the model does not report its activity.
  """
  if len(layers) < 2:
    raise UsageError(
      f'layers={tuple(layers)}; give at least a hidden layer and the next one'
    )
  inner_optimizer = optax.with_extra_args_support(optimizer)
  draw = kernel_init or jax.nn.initializers.lecun_normal()
  pairs = list(zip(layers, layers[1:], strict=False))

  def init(params):
    _check_chain(params, pairs)
    units = {
      layer: jnp.zeros(tree.get(params, f'{layer}/kernel').shape[-1])
      for layer, _ in pairs
    }
    return ContinualState(
      inner=inner_optimizer.init(params),
      count=jnp.zeros((), jnp.int32),
      utility=units,
      age={k: jnp.zeros(x.shape, jnp.int32) for k, x in units.items()},
      due={k: jnp.zeros(()) for k in units},
    )

  def update(updates, state, params=None, *, model_state=None, **extra):
    if params is None:
      raise UsageError('continual_backprop needs `params` in each update')
    sizes = sizes_of(model_state, layers[:-1])
    moved, inner = inner_optimizer.update(
      updates, state.inner, params, model_state=model_state, **extra
    )
    weights = jax.tree.map(jnp.add, params, moved)
    tested = {
      layer: _test(
        sizes[layer] * jnp.abs(tree.get(weights, f'{after}/kernel')).sum(1),
        (state.utility[layer], state.age[layer], state.due[layer]),
        rate,
        maturity,
        decay,
      )
      for layer, after in pairs
    }
    chosen = {layer: mask for layer, (mask, _) in tested.items()}

    def replace(moved, inner):
      key = jax.random.fold_in(rng, state.count)
      born, fresh = _reborn(weights, pairs, chosen, draw, key)
      new = jax.tree.map(jnp.where, born, fresh, weights)
      moved = jax.tree.map(
        lambda b, f, p, u: jnp.where(b, f - p, u), born, fresh, params, moved
      )
      return moved, _reset(inner, inner_optimizer.init(new), born)

    # Rare, so what it draws is not drawn in every step.
    some = jnp.any(jnp.concatenate(list(chosen.values())))
    moved, inner = jax.lax.cond(some, replace, lambda *x: x, moved, inner)
    utility, age, due = (
      {layer: kept[k] for layer, (_, kept) in tested.items()} for k in range(3)
    )
    return moved, ContinualState(inner, state.count + 1, utility, age, due)

  return optax.GradientTransformationExtraArgs(init, update)


def _test(
  contribution: Array,
  kept: tuple[Array, Array, Array],
  rate: Scalar,
  maturity: Scalar,
  decay: Scalar,
) -> tuple[Array, tuple[Array, Array, Array]]:
  """Which units of a layer are replaced now; their utility, age and due."""
  utility, age, due = kept
  utility = decay * utility + (1 - decay) * contribution
  age = age + 1
  eligible = age > maturity
  due = due + rate * eligible.sum()
  corrected = utility / (1 - decay**age)
  order = jnp.argsort(jnp.where(eligible, corrected, jnp.inf))
  rank = jnp.argsort(order)  # its inverse: position of each unit
  mask = eligible & (rank < jnp.floor(due))
  kept = jnp.where(mask, 0, utility), jnp.where(mask, 0, age), due - mask.sum()
  return mask, kept


def _reborn(
  params: Params,
  pairs: Sequence[tuple[str, str]],
  chosen: Mapping[str, Array],
  draw: Callable[..., Array],
  rng: Array,
) -> tuple[Params, Params]:
  """Which entries start anew, and trees with their values (elsewhere zero)."""
  names = tree.names(params)
  born = {
    name: jnp.zeros(leaf.shape, bool)
    for name, leaf in zip(names, jax.tree.leaves(params), strict=True)
  }
  fresh = {}
  for layer, after in pairs:
    mask = chosen[layer]
    kernel = tree.get(params, f'{layer}/kernel')
    key = jax.random.fold_in(rng, zlib.crc32(layer.encode()))
    drawn = draw(key, kernel.shape, kernel.dtype)
    fresh[f'{layer}/kernel'] = jnp.where(mask[None, :], drawn, 0)
    born[f'{layer}/kernel'] |= mask[None, :]
    if f'{layer}/bias' in born:
      born[f'{layer}/bias'] |= mask
    born[f'{after}/kernel'] |= mask[:, None]
  return (
    tree.map_with_name(lambda name, p: born[name], params),
    tree.map_with_name(
      lambda name, p: fresh.get(name, jnp.zeros_like(p)), params
    ),
  )


def _reset(slots: Any, start: Any, born: Params) -> Any:
  """Slots of the entries in `born` as at the optimiser's start."""
  named = dict(zip(tree.names(born), jax.tree.leaves(born), strict=True))

  def one(name, slot, first):
    while name and name not in named:
      name = name.partition('/')[2]
    if not name or named[name].shape != jnp.shape(slot):
      return slot
    return jnp.where(named[name], first, slot)

  return tree.map_with_name(one, slots, start)


def _check_chain(params: Params, pairs: Sequence[tuple[str, str]]) -> None:
  names = tree.names(params)
  for layer in [*(layer for layer, _ in pairs), pairs[-1][1]]:
    if f'{layer}/kernel' not in names:
      raise UsageError(
        f'no trainable kernel of a layer {layer!r}; names look like {names[:3]}'
      )
  for layer, after in pairs:
    here, there = (
      tree.get(params, f'{name}/kernel').shape for name in (layer, after)
    )
    if len(here) != 2 or len(there) != 2 or here[1] != there[0]:
      raise UsageError(
        f'{layer!r} has a kernel {here}, {after!r} one {there}; give dense '
        'layers in order, each feeding the next'
      )
