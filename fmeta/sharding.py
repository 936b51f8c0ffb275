"""Sharding is where data lie, not another training loop.

One mesh with named axes, `jit`, and a `NamedSharding` for every leaf of the
state: XLA adds the communication. Batches are split over `data` and `fsdp`,
parameters over `fsdp` and `tensor` by ordered `(pattern, PartitionSpec)`
rules, and everything the state remembers about a parameter (moments, an
importance, an anchor) lies where the parameter lies.

  mesh = make_mesh(parse_mesh('data:2,fsdp:4'))
  state = place_state(learner.init(params, key), mesh)
  step = jax.jit(
    learner.step, out_shardings=(state_shardings(state, mesh), None)
  )
  state, aux = step(state, place_batch(batch, mesh), key)
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from fmeta import tree
from fmeta.errors import UsageError, suggest
from fmeta.mesh import (
  gather_to_host,
  initialize_processes,
  make_mesh,
  mesh_text,
  parse_mesh,
  place_batch,
  place_process_rows,
  synchronous_dispatch,
)
from fmeta.types import TrainState

__all__ = [
  'initialize_processes',
  'make_mesh',
  'mesh_text',
  'parse_mesh',
  'synchronous_dispatch',
  'check_spec',
  'fsdp_spec',
  'gather_to_host',
  'parameter_specs',
  'place_batch',
  'place_process_rows',
  'place_state',
  'shardings',
  'state_shardings',
]

# Leaves below this many scalars (1 MiB of f32) stay whole under the default
# rule: gathering them costs more than they take (untuned).
MIN_FSDP_SIZE = 2**18

Rules = Sequence[tuple[str, P]]


def fsdp_spec(shape: Sequence[int], mesh: Mesh) -> P:
  """The default rule: the largest divisible axis of a big leaf on `fsdp`.

  Leaves of fewer than `MIN_FSDP_SIZE` scalars, leaves without a divisible
  axis and meshes without `fsdp` give a replicated leaf. Of equal axes the
  last is taken (a kernel's outputs).
  """
  parts = mesh.shape.get('fsdp', 1)
  divisible = [i for i, n in enumerate(shape) if not n % parts]
  if parts == 1 or math.prod(shape) < MIN_FSDP_SIZE or not divisible:
    return P()
  chosen = max(divisible, key=lambda i: (shape[i], i))
  return P(*[None] * chosen, 'fsdp')


def parameter_specs(
  params: Any, mesh: Mesh, rules: Rules = ()
) -> dict[str, tuple[tuple[int, ...], P]]:
  """Name -> (shape, PartitionSpec) of every parameter.

  Args:
    params: arrays or shapes, all parameters (trainable and frozen).
    mesh: where they shall lie.
    rules: ordered `(pattern, PartitionSpec)`, full match, first match wins;
      `fsdp_spec` decides for names that none matches.

  Raises:
    UsageError: if a pattern matches no parameter, or a spec names an axis
      that the mesh lacks, has more entries than the leaf has axes, or does
      not divide it.
  """
  tree.check_patterns([pattern for pattern, _ in rules], tree.names(params))
  specs = {}

  def resolve(name, leaf):
    index = tree.first_match(name, rules)
    shape = tuple(leaf.shape)
    if index is None:
      specs[name] = shape, fsdp_spec(shape, mesh)
    else:
      pattern, spec = rules[index]
      check_spec(spec, shape, mesh, f'rule {pattern!r} for {name!r}')
      specs[name] = shape, spec

  tree.map_with_name(resolve, params)
  return specs


def check_spec(spec: P, shape: Sequence[int], mesh: Mesh, what: str) -> None:
  """Refuses a spec that does not fit the shape or the mesh.

  Raises:
    UsageError: beginning with `what`.
  """
  if len(spec) > len(shape):
    raise UsageError(
      f'{what}: {spec} has {len(spec)} entries, the leaf {tuple(shape)} has'
      f' {len(shape)} axes; shorten the spec or narrow the pattern'
    )
  for size, entry in zip(shape, spec, strict=False):
    axes = _axes_of(entry)
    for axis in axes:
      if axis not in mesh.shape:
        raise UsageError(
          f'{what}: no mesh axis {axis!r}{suggest(axis, mesh.shape)}'
        )
    parts = math.prod(mesh.shape[axis] for axis in axes)
    if size % parts:
      raise UsageError(
        f'{what}: {parts} parts do not divide an axis of {size} (leaf'
        f' {tuple(shape)}); shard another axis or replicate it with P()'
      )


def _axes_of(entry: Any) -> tuple[str, ...]:
  if entry is None:
    return ()
  return entry if isinstance(entry, tuple) else (entry,)


def shardings(
  state_part: Any,
  mesh: Mesh,
  rules: Rules = (),
  names: Any = None,
) -> Any:
  """A `NamedSharding` per leaf, resolved by trailing path components.

  `1/mu/body/layer_0/kernel` ends with the parameter `body/layer_0/kernel`
  and lies as it does. A leaf of the parameter's shape behind further leading
  axes (one per task, say) keeps those whole; a leaf of another shape (a
  factored moment), and one that names no parameter, is replicated.

  Args:
    state_part: any pytree: parameters, an optimiser's state, a penalty's.
    mesh: where it shall lie.
    rules: as for `parameter_specs`.
    names: the parameters; `state_part` itself by default.
  """
  params = state_part if names is None else names
  specs = parameter_specs(params, mesh, rules)

  def resolve(name, leaf):
    spec = _inherited(name, np.shape(leaf), specs)
    return NamedSharding(mesh, spec)

  return tree.map_with_name(resolve, state_part)


def _inherited(name, shape, specs) -> P:
  while name:
    if name in specs:
      own, spec = specs[name]
      extra = len(shape) - len(own)
      fits = extra >= 0 and tuple(shape[extra:]) == own
      return P(*[None] * extra, *spec) if fits else P()
    name = name.partition('/')[2]
  return P()


def state_shardings(
  state: TrainState, mesh: Mesh, rules: Rules | None = None
) -> TrainState:
  """The train state with a `NamedSharding` in place of every leaf.

  Hand it to `jit` as `out_shardings` for the state: without it XLA is free to
  lay out a step's results anew, and the next call compiles again.

  Args:
    state: arrays or shapes.
    mesh: where it shall lie.
    rules: ordered `(pattern, PartitionSpec)` over parameter names.

  Raises:
    UsageError: as `parameter_specs`.
  """
  params = tree.combine(state.frozen, state.trainable)
  rules = () if rules is None else rules

  def follow(part):
    return shardings(part, mesh, rules, params)

  def whole(part):
    return jax.tree.map(lambda _: NamedSharding(mesh, P()), part)

  return TrainState(
    step=whole(state.step),
    trainable=follow(state.trainable),
    frozen=follow(state.frozen),
    opt_state=follow(state.opt_state),
    model_state=whole(state.model_state),
    penalty_state=follow(state.penalty_state),
    # Rows come from everywhere in global batch order, and go everywhere.
    memory=whole(state.memory),
    dormant=follow(state.dormant),
  )


def place_state(
  state: TrainState, mesh: Mesh, rules: Rules | None = None
) -> TrainState:
  """The state on the mesh, in buffers of its own, so `fit` may donate it.

  With several processes each must give the same values.

  Args:
    state: as `Learner.init` or a checkpoint gives it.
    mesh: where it shall lie.
    rules: ordered `(pattern, PartitionSpec)` over parameter names.

  Raises:
    UsageError: as `parameter_specs`.
  """
  return jax.tree.map(_place, state, state_shardings(state, mesh, rules))


def _place(leaf: Any, sharding: NamedSharding) -> jax.Array:
  local = not isinstance(leaf, jax.Array) or leaf.is_fully_addressable
  if local and jax.process_count() > 1:
    host = np.asarray(leaf)
    return jax.make_array_from_callback(
      host.shape, sharding, lambda index: host[index]
    )
  # Copied: device_put shares the buffer on the device where it already is
  # (may_alias=False does not help), and donating it would delete the giver's.
  return jax.device_put(jnp.array(leaf, copy=True), sharding)
